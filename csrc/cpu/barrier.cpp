#include "barrier.h"

#include <sched.h>

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

}  // namespace

void Barrier::wait() {
    if (size_ == 1) return;
    const uint32_t epoch = __atomic_load_n(&epoch_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == static_cast<uint32_t>(size_)) {
        __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&epoch_, epoch + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int i = 0; __atomic_load_n(&epoch_, __ATOMIC_ACQUIRE) == epoch; ++i) {
        if (i < spins)
            pause();
        else
            sched_yield();
    }
}

}  // namespace fastrnn::cpu
