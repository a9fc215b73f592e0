// A block's part of a persistent kernel's work, and the buffer in which blocks exchange values.
#pragma once
#include "operands.cuh"
#include "persistent_kernel.h"
#include "step_rows.cuh"

namespace fastrnn::cuda {

// Worked out wherever it is used: there are no registers to keep it in.
__device__ __forceinline__ StepRows rows_at(const Sequence& s, bool in_order, int step) {
    asm volatile("" : "+r"(step));
    return rows_of(s, in_order, step);
}

// A block's part of the work, and a warp's and a thread's part of that. O: outputs of a unit; tile:
// units of a tile. What is counted here fits into an int: the plan sees to it.
template <class M, int O, int tile>
class Part {
    using S = Stored<M>;

public:
    template <class Arguments>
    __device__ __forceinline__ explicit Part(const Arguments& a)
        : tiling_(a.tiling),
          column_(threadIdx.x % a.tiling.units()),
          first_unit(blockIdx.x * a.tiling.units()),
          first_row(blockIdx.y * a.tiling.group_rows) {
        const int first = slice() * a.tiling.slice;
        first_unit_ = first_unit + own_tile() * tile;
        first_k_ = first * chunk_size;
        chunks_ = min(a.tiling.slice, a.chunks - first);
        // A thread without a unit has no rows either.
        unit_row_ = unit() < a.size.hidden ? threadIdx.x / a.tiling.units() : tile_rows;
    }

    // Has the compiler work out anew what follows from the thread's place: else it keeps addresses of
    // the whole loop in registers that the product needs.
    __device__ __forceinline__ void forget() { asm volatile("" : "+r"(column_), "+r"(unit_row_)); }

    // Rows of the group among the first n of the batch.
    __device__ __forceinline__ int rows_among(int n) const {
        return max(0, min(n - first_row, tiling_.group_rows));
    }

    // Whether the thread's i-th element of the tile of rows from row0 on is one of `count` rows of
    // the group; row: which.
    __device__ __forceinline__ bool element(int row0, int i, int count, int& row) const {
        const int row_of_tile = unit_row_ + i * (32 / tile) * tiling_.slices;
        row = row0 + row_of_tile;
        return row_of_tile < tile_rows && row < count;
    }

    // Calls f(row) for each of the thread's elements in `count` rows of the group.
    template <class F>
    __device__ __forceinline__ void for_each_element(int count, F f) const {
        int row;
        for (int row0 = 0; row0 < count; row0 += tile_rows)
            for (int i = 0; i < most_elements; ++i)
                if (element(row0, i, count, row)) f(row);
    }

    // The thread's unit in the block, and in the layer.
    __device__ __forceinline__ int column() const { return column_; }
    __device__ __forceinline__ int unit() const { return first_unit + column_; }
    __device__ __forceinline__ int state_at(int row) const {
        return row * tiling_.units() + column_;
    }
    __device__ __forceinline__ int bias_at(int bias) const {
        return bias * tiling_.units() + column_;
    }
    // One thread of those that have the same unit.
    __device__ __forceinline__ bool first_of_unit() const { return unit_row_ == 0; }

    // The warp's weights. weights_of(unit, output, k): those of a chunk from k on, of which a unit
    // has a row.
    template <class Weights, class WeightsOf>
    __device__ __forceinline__ void load_rows(Weights& weights, WeightsOf weights_of) {
        weights.load_rows(chunks_, [&](int unit_of_tile, int output, int chunk) {
            return weights_of(first_unit_ + unit_of_tile, output, first_k_ + chunk * chunk_size);
        });
        place_sums();
    }
    // The same where a unit has a column. weights_of(unit, k): of the unit and those after it.
    template <class Weights, class WeightsOf>
    __device__ __forceinline__ void load_columns(Weights& weights, WeightsOf weights_of) {
        weights.load_columns(chunks_, [&](int chunk) {
            return weights_of(first_unit_, first_k_ + chunk * chunk_size);
        });
        place_sums();
    }

    // Multiplies a tile of rows. The sums are complete after the next __syncthreads. That is enough
    // also before the next tile, which uses the other of two buffers.
    template <class Weights>
    __device__ __forceinline__ void multiply(const Weights& weights, const S* exchange, int width,
                                             int row0, int count, float* sums) const {
        weights.multiply(exchange + row0 * width, width, first_k_, count - row0, chunks_,
                         sums + turn(row0) * tiling_.sums(O) + warp_sums_, tiling_.sums_row(O));
    }

    // Adds to total [O] the sums of all slices, in a fixed order.
    __device__ __forceinline__ void add_sums(const float* sums, int row, float* total) const {
        constexpr int stored = stored_outputs(O);
        sums += turn(row) * tiling_.sums(O) + column_ / tile * tiling_.sums_tile(O) +
                row % tile_rows * tiling_.sums_row(O) + column_ % tile * stored;
        const int of_a_slice = tiling_.tiles * tiling_.sums_tile(O);
#pragma unroll 1
        for (int k = 0; k < tiling_.slices; ++k, sums += of_a_slice) {
            alignas(16) float some[stored];
            if constexpr (stored == 4)
                *reinterpret_cast<float4*>(some) = *reinterpret_cast<const float4*>(sums);
            else
                memcpy(some, sums, sizeof some);
#pragma unroll
            for (int output = 0; output < O; ++output) total[output] += some[output];
        }
    }

private:
    // Of the warp.
    __device__ __forceinline__ int own_tile() const { return threadIdx.x / 32 % tiling_.tiles; }
    __device__ __forceinline__ int slice() const { return threadIdx.x / 32 / tiling_.tiles; }

    // Not before the weights are there, whose loads take all registers.
    __device__ __forceinline__ void place_sums() {
        warp_sums_ = (slice() * tiling_.tiles + own_tile()) * tiling_.sums_tile(O);
    }

    static __device__ __forceinline__ int turn(int row) { return row / tile_rows % 2; }

    const Tiling& tiling_;
    int column_;  // of the thread's unit in the block
    int first_unit_, first_k_, chunks_, unit_row_, warp_sums_;

public:
    const int first_unit;  // of the block
    const int first_row;   // of the group
};

// The group's rows of the exchange buffer, [2][whole tiles of rows][width]: in shared memory where
// the group is a single block.
template <class S, class Arguments>
class Exchange {
public:
    __device__ __forceinline__ Exchange(const Arguments& a, void* shared)
        : a_(a), memory_(static_cast<S*>(shared)) {
        if (gridDim.x == 1) {
            for (int i = threadIdx.x; i < 2 * of_group(); i += blockDim.x)
                memory_[i] = narrow<S>(0);
            __syncthreads();
        } else {
            memory_ = static_cast<S*>(a.exchange) +
                      (blockIdx.z * gridDim.y + blockIdx.y) * int64_t(of_group());
        }
    }

    // What is read in a step, and written in the step before. Worked out wherever it is used: there
    // are no registers to keep it in.
    __device__ __forceinline__ S* of_step(int step) const {
        const int groups = gridDim.x == 1 ? 1 : gridDim.z * gridDim.y;
        return memory_ + (step & 1) * int64_t(groups) * of_group();
    }

private:
    __device__ __forceinline__ int of_group() const { return a_.tiling.whole_tiles() * a_.width; }

    const Arguments& a_;
    S* memory_;
};

__device__ __forceinline__ unsigned* counter_of_group(unsigned* counters) {
    return counters + (blockIdx.z * gridDim.y + blockIdx.y) * counter_stride;
}

}  // namespace fastrnn::cuda
