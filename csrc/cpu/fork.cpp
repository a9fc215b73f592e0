#include "fork.h"

#include <dirent.h>
#include <pthread.h>

#include <atomic>

namespace fastrnn::cpu {
namespace {

std::atomic<bool> had_threads{false}, lost{false};

// Threads that others started, such as those of NumPy's OpenBLAS, count too: nothing distinguishes
// them from OpenMP's.
void count_threads() {
    DIR* tasks = opendir("/proc/self/task");
    int entries = 0;  // ".", "..", and the threads
    while (tasks && readdir(tasks)) ++entries;
    had_threads = !tasks || entries > 3;
    if (tasks) closedir(tasks);
}

const int registered = pthread_atfork(count_threads, nullptr, [] {
    if (had_threads) lost = true;
});

}  // namespace

bool lost_threads() { return lost; }

}  // namespace fastrnn::cpu
