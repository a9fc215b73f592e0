#include "barrier.h"

#include <omp.h>

#include <algorithm>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <sched.h>
#endif

#include "choices.h"
#include "clock.h"

namespace fastrnn::cpu {
namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");  // takes tens of cycles; most CPUs ignore `yield`
#endif
}

// Of a thread: how many of its sleeps still come without long spins, and how many the next time.
struct Omitted {
    int left = 0, next = fewest_without_long_spins;
};
thread_local Omitted omitted;

// Whether `epoch` changes while it is read so many times.
bool changes(const uint32_t& epoch, uint32_t from, int times) {
    for (int i = 0; i < times; ++i) {
        if (__atomic_load_n(&epoch, __ATOMIC_ACQUIRE) != from) return true;
        pause();
    }
    return false;
}

bool changes_during_long_spins(const uint32_t& epoch, uint32_t from) {
    if (omitted.left > 0) {
        --omitted.left;
        return false;
    }
    if (changes(epoch, from, long_spins)) {
        omitted.next = fewest_without_long_spins;
        return true;
    }
    omitted.left = omitted.next;
    omitted.next = std::min(2 * omitted.next, most_without_long_spins);
    return false;
}

thread_local int64_t waited = 0;

// Sleeps while `word` is `value`; may return early.
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
        // Store the epoch, then load sleepers_; a thread that is about to sleep increments
        // sleepers_, then loads the epoch. All threads see these four in one order: either this
        // thread sees the sleeper, or the sleeper sees the new epoch.
        __atomic_store_n(&epoch_, epoch + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST)) wake_all(&epoch_);
        return;
    }
    if (changes(epoch_, epoch, uncounted_spins)) return;
    const int64_t began = nanoseconds();
    spin_or_sleep(epoch);
    waited += nanoseconds() - began;
}

void Barrier::spin_or_sleep(uint32_t epoch) {
    static const int cores = omp_get_num_procs();
    const bool crowded = size_ > cores;
    if (changes(epoch_, epoch, crowded ? crowded_spins : spins)) return;
    if (!crowded && changes_during_long_spins(epoch_, epoch)) return;
    __atomic_add_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&epoch_, __ATOMIC_SEQ_CST) == epoch) sleep_while(&epoch_, epoch);
    __atomic_sub_fetch(&sleepers_, 1, __ATOMIC_RELAXED);
}

int64_t nanoseconds_waited() { return waited; }

}  // namespace fastrnn::cpu
