// A barrier for threads that meet every few microseconds. A waiting thread spins for a while, then
// sleeps. If it only yielded its core, another process could run there for a whole time slice, at
// every step.
#pragma once
#include <stdint.h>

#include "../api.h"

namespace fastrnn::cpu {

class Barrier {
public:
    void reset(int size) {
        size_ = size;
        arrived_ = 0;
    }
    // Returns when `size` threads have called it. What each wrote before is then visible to all.
    FASTRNN_API void wait();

private:
    // Returns when the epoch is no longer `epoch`.
    void spin_or_sleep(uint32_t epoch);

    alignas(64) int size_ = 1;
    uint32_t arrived_ = 0;
    alignas(64) uint32_t epoch_ = 0;
    uint32_t sleepers_ = 0;
};

// For how long this thread has waited at barriers so far. The first spins of a wait do not count:
// uncounted_spins in choices.h.
int64_t nanoseconds_waited();

}  // namespace fastrnn::cpu
