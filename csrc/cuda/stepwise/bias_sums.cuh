// The gradients of the biases on the stepwise path, where every step is a launch.
#pragma once
#include "../common/bias_gradients.cuh"
#include "step.h"

namespace fastrnn::cuda {

// Used by all threads of a block, each with an element. The kernel of each step adds the gradients
// of its rows to the block's sums, in the order of the rows.
template <class Cell, class S>
class BiasSums {
    using A = Arithmetic<S>;

public:
    // Loads the block's sums early, so that `add` does not wait for them.
    __device__ __forceinline__ BiasSums(const BackwardStep& step, const BiasGradients& to,
                                        int64_t hidden, int64_t unit)
        : step_(step), to_(to), hidden_(hidden), unit_(unit) {
        const bool has_sums = first_row() < step.rows_after;
        for_each_sum([&](int k, A* sum) { previous_[k] = has_sums ? *sum : A{}; });
    }

    // Adds the gradients of an element; zeros for a thread without one.
    __device__ __forceinline__ void add(const BackwardOutputs<Cell, S>& out) {
        if (!to_.sums) return;
        __shared__ A of_rows[step_tile_rows][Cell::grads][step_tile_units];
        for (int i = 0; i < Cell::grads; ++i)
            of_rows[threadIdx.y][i][threadIdx.x] = widen(out.dgates[i]);
        __syncthreads();
        for_each_sum([&](int k, A* sum) {
            const int grad = threadIdx.y + k * blockDim.y;
            A of_step{};  // a sum of short sums loses less to rounding than one long sum
            for (int row = 0; row < blockDim.y; ++row) of_step += of_rows[row][grad][threadIdx.x];
            *sum = previous_[k] + of_step;
        });
        unsigned* const counter = to_.done + blockIdx.y;
        if (step_.first && blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) *counter = 0;
        if (!step_.last) return;
        __syncthreads();
        __shared__ bool last;
        if (gridDim.x > 1 && !is_last_block(counter, gridDim.x, last)) return;
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

    // Calls f(k, sum) for each of the block's sums that this thread adds up, the k-th of its own.
    template <class F>
    __device__ __forceinline__ void for_each_sum(F f) const {
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
    A previous_[Cell::grads];
};

}  // namespace fastrnn::cuda
