// What the kernels of the one-block path share (forward.cuh, backward.cuh).
#pragma once
#include "../common/register_weights.cuh"
#include "../common/step_rows.cuh"
#include "kernel.h"
#include "pair_prefetch.cuh"

namespace fastrnn::cuda {

// The rows of the current step and the next two. They are looked up that early because the offsets
// of packed data are read from memory.
class StepWindow {
public:
    __device__ __forceinline__ StepWindow(const DeviceSequence& sequence, bool in_order)
        : sequence_(sequence), in_order_(in_order) {
        for (int step = 0; step < 3; ++step) at_[step] = step_rows(sequence_, in_order_, step);
    }
    __device__ __forceinline__ const DeviceStepRows& operator[](int later) const {
        return at_[later];
    }
    // Moves on by one, to `step`.
    __device__ __forceinline__ void advance(int step) {
        at_[0] = at_[1], at_[1] = at_[2];
        at_[2] = step_rows(sequence_, in_order_, step + 2);
    }

private:
    const DeviceSequence& sequence_;
    const bool in_order_;
    DeviceStepRows at_[3];
};

// A lane's two units and two rows, and the block's two buffers of rows to multiply: one is read in
// a step, the other is written for the next step.
template <class M>
class OneBlock {
    using S = Stored<M>;

public:
    template <class Arguments>
    __device__ __forceinline__ OneBlock(const Arguments& a, bool paired, void* shared)
        : units(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 * 2, int(a.size.hidden), paired),
          first_row(blockIdx.y * a.group_rows),
          group_rows(a.group_rows),
          stride_(one_block_stride(a.width, sizeof(S))),
          read_(static_cast<S*>(shared)),
          write_(read_ + group_rows * stride_) {
        for (int i = threadIdx.x; i < 2 * group_rows * stride_; i += blockDim.x)
            read_[i] = narrow<S>(0);
        __syncthreads();
    }

    // Calls f(i, row) for those of the lane's two rows that are among the group's first `count`. i:
    // 0 or 1; row: in the group.
    template <class F>
    __device__ __forceinline__ void for_each_row(int count, F f) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = threadIdx.x % 4 + 4 * i;
            if (row < count && units.count() > 0) f(i, row);
        }
    }
    // Rows of the group among the first n of the batch.
    __device__ __forceinline__ int rows_among(int n) const {
        return max(0, min(n - first_row, group_rows));
    }

    // Stores a row's values of the lane's units for the next step. first: where the values of all
    // units start in the row.
    __device__ __forceinline__ void put(int row, int first, const float (&value)[2]) const {
        store_pair(write_ + row * stride_ + first + units.first(),
                   UnitPair<S>{{operand<M>(value[0]), operand<M>(value[1])}});
    }
    template <class Weights, int N>
    __device__ __forceinline__ void multiply(const Weights& weights, int chunks,
                                             float (&sum)[N][2][2]) const {
        weights.multiply(read_, stride_, group_rows, chunks, sum);
    }
    // Ends the step for all threads, and swaps the buffers.
    __device__ __forceinline__ void end_step() {
        S* const read = read_;
        read_ = write_, write_ = read;
        __syncthreads();
    }

    const LaneUnits units;
    const int first_row, group_rows;

private:
    const int stride_;
    S *read_, *write_;
};

__device__ __forceinline__ int stage_after(int stage, int by) {
    return stage + by < prefetch_stages ? stage + by : stage + by - prefetch_stages;
}

// Keeps a pointer in a register. Without this the compiler reads it from the arguments at every
// step.
template <class T>
__device__ __forceinline__ T* in_register(const void* pointer) {
    size_t in_global = __cvta_generic_to_global(pointer);
    asm volatile("" : "+l"(in_global));
    return static_cast<T*>(__cvta_global_to_generic(in_global));
}

}  // namespace fastrnn::cuda
