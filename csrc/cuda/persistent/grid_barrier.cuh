// The barrier among the blocks of a group: those that share the rows of one direction.
#pragma once

namespace fastrnn::cuda {

// Each block adds 1 to a counter that only grows. All have arrived at the n-th barrier when the
// counter is n times the number of blocks. Between arriving and waiting a block can do other work.
//
// Why readers after `wait` see what was written before `arrive`: the __syncthreads in `arrive`
// orders the writes of all threads of a block before thread 0's add, which is a release (and
// cumulative: it covers what thread 0 has synchronised with). Thread 0's load in `wait` is an
// acquire, and the __syncthreads after it orders it before the reads of the other threads. An
// acquire at gpu scope also invalidates the L1 cache, so that plain loads may follow.
//
// Why two alternating buffers are enough: what is read after barrier n is overwritten after barrier
// n + 1, and a block arrives there only when it has finished reading.
class GroupBarrier {
public:
    __device__ __forceinline__ GroupBarrier(unsigned* counter, unsigned blocks)
        : counter_(counter), blocks_(blocks) {}

    __device__ __forceinline__ void arrive() const {
        __syncthreads();
        if (blocks_ > 1 && threadIdx.x == 0)
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter_) : "memory");
    }

    // Waits until all blocks have arrived `times` times. Called by all threads. The difference is
    // right even after the counter has wrapped around.
    __device__ __forceinline__ void wait(unsigned times) const {
        if (blocks_ == 1) return;  // the __syncthreads in `arrive` is enough
        if (threadIdx.x == 0) {
            unsigned count;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                             : "=r"(count)
                             : "l"(counter_)
                             : "memory");
            } while (static_cast<int>(count - times * blocks_) < 0);
        }
        __syncthreads();
    }

private:
    unsigned* counter_;
    unsigned blocks_;
};

}  // namespace fastrnn::cuda
