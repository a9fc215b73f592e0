// The part of the work that a block, a warp and a thread has, and the buffer in which blocks
// exchange values.
#pragma once
#include "../common/register_weights.cuh"
#include "../common/step_rows.cuh"
#include "kernel.h"

namespace fastrnn::cuda {

// As step_rows, but computed again wherever it is used: there are no registers to keep it in.
__device__ __forceinline__ DeviceStepRows rows_at(const DeviceSequence& s, bool in_order,
                                                  int step) {
    asm volatile("" : "+r"(step));
    return step_rows(s, in_order, step);
}

// A block has units and a group of rows; a warp of it a tile of the units and a slice of the
// contraction; a thread elements, each a unit of a row. O: outputs of a unit; tile: units of a
// tile. Everything that is counted here fits into an int: the planner checks that.
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

    // Makes the compiler compute again what depends on the thread's unit and rows. Without this it
    // keeps addresses of the whole loop in registers that the product needs.
    __device__ __forceinline__ void rematerialize() {
        asm volatile("" : "+r"(column_), "+r"(unit_row_));
    }

    // Rows of the group among the first n of the batch.
    __device__ __forceinline__ int rows_among(int n) const {
        return max(0, min(n - first_row, tiling_.group_rows));
    }

    // Whether the thread's i-th element in the tile of rows from row0 on exists, that is, is in one
    // of the group's first `count` rows. row: its row in the group.
    __device__ __forceinline__ bool element(int row0, int i, int count, int& row) const {
        const int row_of_tile = unit_row_ + i * (32 / tile) * tiling_.slices;
        row = row0 + row_of_tile;
        return row_of_tile < tile_rows && row < count;
    }

    // Calls f(row) for each of the thread's elements in the group's first `count` rows.
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
    // Whether this is the first of the threads that have the same unit.
    __device__ __forceinline__ bool first_of_unit() const { return unit_row_ == 0; }

    // Loads the warp's weights, where a unit has a row of W_hh. weights_of(unit, output, k): a
    // WeightsRow that starts with the k-th weight.
    template <class Weights, class WeightsOf>
    __device__ __forceinline__ void load_rows(Weights& weights, WeightsOf weights_of) {
        weights.load_rows(chunks_, [&](int unit_of_tile, int output, int chunk) {
            return weights_of(first_unit_ + unit_of_tile, output, first_k_ + chunk * chunk_size);
        });
        place_sums();
    }
    // The same where a unit has a column. weights_of(unit, k): a WeightsColumns that starts with
    // this unit and the k-th weight.
    template <class Weights, class WeightsOf>
    __device__ __forceinline__ void load_columns(Weights& weights, WeightsOf weights_of) {
        weights.load_columns(chunks_, [&](int chunk) {
            return weights_of(first_unit_, first_k_ + chunk * chunk_size);
        });
        place_sums();
    }

    // Multiplies a tile of rows. The sums are complete after the next __syncthreads. The next tile
    // uses the other of two buffers, so that it needs no further barrier.
    template <class Weights>
    __device__ __forceinline__ void multiply(const Weights& weights, const S* exchange, int width,
                                             int row0, int count, float* sums) const {
        weights.multiply(exchange + row0 * width, width, first_k_, count - row0, chunks_,
                         sums + buffer_of(row0) * tiling_.sums(O) + warp_sums_,
                         tiling_.sums_row(O));
    }

    // Adds the sums of all slices to total [O], in the order of the slices.
    __device__ __forceinline__ void add_sums(const float* sums, int row, float* total) const {
        constexpr int stored = stored_outputs(O);
        sums += buffer_of(row) * tiling_.sums(O) + column_ / tile * tiling_.sums_tile(O) +
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
    // The warp's.
    __device__ __forceinline__ int own_tile() const { return threadIdx.x / 32 % tiling_.tiles; }
    __device__ __forceinline__ int slice() const { return threadIdx.x / 32 / tiling_.tiles; }

    // Called after the weights are loaded: loading them takes all registers.
    __device__ __forceinline__ void place_sums() {
        warp_sums_ = (slice() * tiling_.tiles + own_tile()) * tiling_.sums_tile(O);
    }

    static __device__ __forceinline__ int buffer_of(int row) { return row / tile_rows % 2; }

    const Tiling& tiling_;
    int column_;  // the thread's unit in the block
    int first_unit_, first_k_, chunks_, unit_row_, warp_sums_;

public:
    const int first_unit;  // of the block
    const int first_row;   // of the group
};

// The exchange buffer of a group, [2][whole tiles of rows][width]: in shared memory if the group is
// a single block.
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

    // The buffer that a step reads and the step before writes. Computed again wherever it is used:
    // there are no registers to keep it in.
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
