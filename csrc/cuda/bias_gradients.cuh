// The gradients of the biases, added up by the kernels that make the gradients of the gates, so that
// nobody reads those once more. Each block has the sums of its rows, and the last to end adds them up.
#pragma once
#include "element.cuh"
#include "step.h"

namespace fastrnn::cuda {

// Whether this is the last of so many blocks to come here: then it sees what the others wrote before. For
// all threads of a block, after a __syncthreads, which puts their writes before the add; that is a
// release, and for the last an acquire of what the others released. last: in shared memory.
__device__ __forceinline__ bool last_to_come(unsigned* counter, unsigned blocks, bool& last) {
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

// Adds up what the blocks of rows have, in their order: the same whoever is the last. Of the threads that
// have this unit, the `thread`-th of so many. sum_of(block, grad): a block's sum.
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

// On the stepwise path, for all threads of a block, one unit of one row each: each step's kernel adds
// what its rows give. The sums are of rows in their order, and then of
// blocks in theirs.
template <class Cell, class S>
class BiasSums {
    using A = Arithmetic<S>;

public:
    // Asks for what the block has, early: nobody is to wait for it.
    __device__ __forceinline__ BiasSums(const BackwardStep& step, const BiasGradients& to,
                                        int64_t hidden, int64_t unit)
        : step_(step), to_(to), hidden_(hidden), unit_(unit) {
        const bool begun = first_row() < step.linked;
        for_each_own([&](int k, A* own) { had_[k] = begun ? *own : A{}; });
    }

    // Adds a row's gradients, zeros where there is none.
    __device__ __forceinline__ void add(const BackwardOutputs<Cell, S>& out) {
        if (!to_.sums) return;
        __shared__ A of_rows[step_tile_rows][Cell::grads][step_tile_units];
        for (int i = 0; i < Cell::grads; ++i)
            of_rows[threadIdx.y][i][threadIdx.x] = widen(out.dgates[i]);
        __syncthreads();
        for_each_own([&](int k, A* own) {
            const int grad = threadIdx.y + k * blockDim.y;
            A of_step{};  // a sum of short sums loses less to rounding than one long sum
            for (int row = 0; row < blockDim.y; ++row) of_step += of_rows[row][grad][threadIdx.x];
            *own = had_[k] + of_step;
        });
        unsigned* const counter = to_.done + blockIdx.y;
        if (step_.first && blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) *counter = 0;
        if (!step_.last) return;
        __syncthreads();
        __shared__ bool last;
        if (gridDim.x > 1 && !last_to_come(counter, gridDim.x, last)) return;
        store_bias_gradients<Cell, S>(to_, hidden_, unit_, gridDim.x, threadIdx.y, blockDim.y,
                                      [&](int block, int grad) { return *sum_of(block, grad); });
    }

private:
    __device__ __forceinline__ int64_t first_row() const {
        return int64_t(blockIdx.x) * blockDim.y;
    }
    __device__ __forceinline__ A* sum_of(int block, int grad) const {
        return static_cast<A*>(to_.sums) + (int64_t(block) * Cell::grads + grad) * hidden_ + unit_;
    }

    // Calls f(k, sum) for the k-th of the block's sums that is the thread's, if there are any.
    template <class F>
    __device__ __forceinline__ void for_each_own(F f) const {
#pragma unroll
        for (int k = 0; k < Cell::grads; ++k) {
            const int grad = threadIdx.y + k * blockDim.y;
            if (to_.sums && first_row() < step_.rows && grad < Cell::grads && unit_ < hidden_)
                f(k, sum_of(blockIdx.x, grad));
        }
    }

    const BackwardStep& step_;
    const BiasGradients& to_;
    int64_t hidden_, unit_;
    A had_[Cell::grads];
};

}  // namespace fastrnn::cuda
