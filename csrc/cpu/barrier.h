// A barrier for threads that meet every few microseconds. A waiting thread spins for a while, then
// sleeps. If it only yielded its core, another process could run there for a whole time slice, at
// every step.
#pragma once
#include <stdint.h>

namespace fastrnn::cpu {

class Barrier {
public:
    void reset(int size) {
        size_ = size;
        arrived_ = 0;
    }
    // Returns when `size` threads have called it. What each wrote before is then visible to all.
    void wait();

private:
    alignas(64) int size_ = 1;
    uint32_t arrived_ = 0;
    alignas(64) uint32_t epoch_ = 0;
    uint32_t sleepers_ = 0;
};

}  // namespace fastrnn::cpu
