// A barrier for threads that meet every few microseconds: it spins a little, then sleeps. A thread
// that only yielded its core would leave it to whatever else the machine runs for a whole time slice,
// at every step.
#pragma once
#include <stdint.h>

namespace fastrnn::cpu {

class Barrier {
public:
    void reset(int size) {
        size_ = size;
        arrived_ = 0;
    }
    // Returns when `size` threads have called it. What each wrote before is visible to all after.
    void wait();

private:
    alignas(64) int size_ = 1;
    uint32_t arrived_ = 0;
    alignas(64) uint32_t epoch_ = 0;
    uint32_t sleepers_ = 0;
};

}  // namespace fastrnn::cpu
