// Compiled into the libraries of wheels. libstdc++ reads this variable, which glibc has since 2.32,
// to skip atomic operations in a process of one thread. With a copy of their own, the libraries run
// with glibc 2.28, like torch's.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
