// The barrier among the blocks that share the rows of one direction.
#pragma once

namespace fastrnn::cuda {

// Each block adds 1 to a counter that only grows; all are there once it has reached the number of
// blocks times the number of barriers. Between arriving and waiting a block may do other work.
//
// Why the readers after `wait` see what was written before `arrive`: the __syncthreads in `arrive`
// puts the writes of every thread of a block before thread 0's add, which is a release (and
// cumulative: it covers what thread 0 has synchronised with); thread 0's load is an acquire; the
// __syncthreads in `wait` puts it before the reads of the other threads. An acquire at gpu scope
// also drops what the L1 cache holds, so that plain loads may be used.
//
// Why two buffers, used in turn, are enough: what is read after barrier n is written again after
// barrier n + 1, and a block arrives there only when it has done with reading.
class GroupBarrier {
public:
    __device__ __forceinline__ GroupBarrier(unsigned* counter, unsigned blocks)
        : counter_(counter), blocks_(blocks) {}

    __device__ __forceinline__ void arrive() const {
        __syncthreads();
        if (blocks_ > 1 && threadIdx.x == 0)
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter_) : "memory");
    }

    // Until all have arrived so many times; the same for all threads. The differences are right
    // even after the counter has wrapped round.
    __device__ __forceinline__ void wait(unsigned times) const {
        if (blocks_ == 1) return;  // the __syncthreads in `arrive` was all
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
