// The gradients of the biases on the stepwise path: each step's kernel adds what its rows give, so that
// nobody reads the gradients of the gates once more, and the last one's adds up what the blocks have.
#pragma once
#include "element.cuh"
#include "step.h"

namespace fastrnn::cuda {

// Whether this is the last of so many blocks to come here: then it sees what the others wrote before. For
// all threads of a block, after a __syncthreads, which puts their writes before the add; that is a
// release, and for the last an acquire of what the others released.
__device__ __forceinline__ bool last_to_come(unsigned* counter, unsigned blocks) {
    __shared__ bool last;
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

// For all threads of a block, one unit of one row each. The sums are of rows in their order, and then of
// blocks in theirs: the same whoever is the last.
template <class Cell, class S>
class BiasSums {
    using A = Arithmetic<S>;

public:
    // Asks for what the block has, early: nobody is to wait for it.
    __device__ __forceinline__ BiasSums(const BackwardStep& step, int64_t hidden, int64_t unit)
        : step_(step), hidden_(hidden), unit_(unit) {
        const bool begun = first_row() < step.linked;
        for_each_own([&](int k, A* own) { had_[k] = begun ? *own : A{}; });
    }

    // Adds a row's gradients, zeros where there is none.
    __device__ __forceinline__ void add(const BackwardOutputs<Cell, S>& out) {
        if (!step_.biases.sums) return;
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
        unsigned* const counter = step_.biases.done + blockIdx.y;
        if (step_.first && blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) *counter = 0;
        if (!step_.last) return;
        __syncthreads();
        if (gridDim.x == 1 || last_to_come(counter, gridDim.x)) finish();
    }

private:
    __device__ __forceinline__ int64_t first_row() const {
        return int64_t(blockIdx.x) * blockDim.y;
    }
    __device__ __forceinline__ A* sum_of(int block, int grad) const {
        return static_cast<A*>(step_.biases.sums) +
               (int64_t(block) * Cell::grads + grad) * hidden_ + unit_;
    }

    // Calls f(k, sum) for the k-th of the block's sums that is the thread's, if there are any.
    template <class F>
    __device__ __forceinline__ void for_each_own(F f) const {
#pragma unroll
        for (int k = 0; k < Cell::grads; ++k) {
            const int grad = threadIdx.y + k * blockDim.y;
            if (step_.biases.sums && first_row() < step_.rows && grad < Cell::grads &&
                unit_ < hidden_)
                f(k, sum_of(blockIdx.x, grad));
        }
    }

    __device__ __forceinline__ void finish() const {
        BackwardOutputs<Cell, S>::for_each_stored([&](int i, int grad) {
            if (i % blockDim.y != threadIdx.y || unit_ >= hidden_) return;
            A sum{};
            for (int block = 0; block < gridDim.x; ++block) sum += *sum_of(block, grad);
            const bool of_x = i < Cell::gates, of_h = Cell::grads == Cell::gates || !of_x;
            const int64_t at = int64_t(i % Cell::gates) * hidden_ + unit_;
            if (step_.biases.ih && of_x) store<S>(step_.biases.ih, at, sum);
            if (step_.biases.hh && of_h) store<S>(step_.biases.hh, at, sum);
        });
    }

    const BackwardStep& step_;
    int64_t hidden_, unit_;
    A had_[Cell::grads];
};

}  // namespace fastrnn::cuda
