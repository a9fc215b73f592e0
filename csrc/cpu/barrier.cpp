#include "barrier.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <sched.h>
#endif

namespace fastrnn::cpu {
namespace {

// About the time of a few short steps. Longer, and waiting threads starve the one they wait for
// when there are more threads than cores; shorter, and they enter the kernel at every step.
constexpr int spins = 200;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Sleeps while `word` is `value`, or a little less.
void sleep_while(uint32_t* word, uint32_t value) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    sched_yield();
#endif
}

void wake_all(uint32_t* word) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

}  // namespace

void Barrier::wait() {
    if (size_ == 1) return;
    const uint32_t epoch = __atomic_load_n(&epoch_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == static_cast<uint32_t>(size_)) {
        __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
        // Either this thread sees that another is about to sleep, or that one sees the new epoch: the
        // order of these two, and of the two below, is the same for all.
        __atomic_store_n(&epoch_, epoch + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST)) wake_all(&epoch_);
        return;
    }
    for (int i = 0; i < spins; ++i) {
        if (__atomic_load_n(&epoch_, __ATOMIC_ACQUIRE) != epoch) return;
        pause();
    }
    __atomic_add_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&epoch_, __ATOMIC_SEQ_CST) == epoch) sleep_while(&epoch_, epoch);
    __atomic_sub_fetch(&sleepers_, 1, __ATOMIC_RELAXED);
}

}  // namespace fastrnn::cpu
