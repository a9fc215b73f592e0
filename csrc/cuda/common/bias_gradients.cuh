// The gradients of the biases, added up by the kernels that compute the gate gradients, so that no
// other kernel reads those again. Each block adds up its own rows; the last block to finish adds up
// the sums of all blocks.
#pragma once
#include "element.cuh"

namespace fastrnn::cuda {

// Whether this block is the last of `blocks` to call it. The last sees what all others wrote before
// their calls: the add is a release, and for the last block an acquire of those releases. Called by
// all threads of a block, after a __syncthreads, which orders their writes before thread 0's add.
// last: in shared memory.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned blocks, bool& last) {
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        unsigned before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                     : "=r"(before)
                     : "l"(counter)
                     : "memory");
        last = before == blocks - 1;
    }
    __syncthreads();
    return last;
}

// Adds up the sums of all blocks of rows, in the order of the blocks, so that the result does not
// depend on which block is the last. The gradients of a unit are shared among `threads` threads, of
// which this is the `thread`-th. sum_of(block, grad): a block's sum.
template <class Cell, class S, class SumOf>
__device__ __forceinline__ void store_bias_gradients(const BiasGradients& to, int64_t hidden,
                                                     int64_t unit, int blocks, int thread,
                                                     int threads, SumOf sum_of) {
    BackwardOutputs<Cell, S>::for_each_stored([&](int i, int grad) {
        if (i % threads != thread || unit >= hidden) return;
        Arithmetic<S> sum{};
        for (int block = 0; block < blocks; ++block) sum += sum_of(block, grad);
        const bool of_x = i < Cell::gates, of_h = Cell::grads == Cell::gates || !of_x;
        const int64_t at = int64_t(i % Cell::gates) * hidden + unit;
        if (to.ih && of_x) store<S>(to.ih, at, sum);
        if (to.hh && of_h) store<S>(to.hh, at, sum);
    });
}

}  // namespace fastrnn::cuda
