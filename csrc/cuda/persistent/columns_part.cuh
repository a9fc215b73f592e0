// The part of the work that a block, a warp and a thread has where partial sums are exchanged, and
// what they keep in memory (columns_backward.cuh).
#pragma once
#include "../common/bias_gradients.cuh"
#include "kernel.h"
#include "register_columns.cuh"

namespace fastrnn::cuda {

// A block has units and a group of rows; a warp of it a slice of the contraction and some tiles of
// 16 columns; a thread has a unit, and one row in every rows_at_once.
class ColumnsPart {
public:
    template <class Arguments>
    __device__ __forceinline__ explicit ColumnsPart(const Arguments& a)
        : tiling_(a.tiling),
          all_chunks_(a.chunks),
          all_tiles_((a.size.hidden + 15) / 16),
          first_unit(blockIdx.x * units()),
          first_row(blockIdx.y * tiling_.group_rows) {
        const int column = threadIdx.x % units(), row = threadIdx.x / units(),
                  warp = threadIdx.x / 32;
        // A thread without a unit has no rows either.
        const bool has = first_unit + column < a.size.hidden && row < rows_at_once();
        own_ = (has ? row : column_rows) << 16 | column;
        product_ = warp % tiling_.slices << 16 | warp / tiling_.slices * tiling_.column_tiles;
    }

    // As Part::rematerialize.
    __device__ __forceinline__ void rematerialize() {
        asm volatile("" : "+r"(own_), "+r"(product_));
    }

    __device__ __forceinline__ int rows_among(int n) const {
        return max(0, min(n - first_row, tiling_.group_rows));
    }
    // Whether the thread's element in the tile of rows from row0 on exists, that is, is in one of
    // the group's first `count` rows. row: its row in the group.
    __device__ __forceinline__ bool element(int row0, int count, int& row) const {
        const int row_of_tile = own_ >> 16;
        row = row0 + row_of_tile;
        return row_of_tile < column_rows && row < count;
    }

    // The warp's slice of the contraction, the start of the slice, and the warp's tiles of columns.
    __device__ __forceinline__ int slice() const { return product_ >> 16; }
    __device__ __forceinline__ int first_k() const { return slice() * tiling_.slice * chunk_size; }
    __device__ __forceinline__ int chunks() const {
        return min(tiling_.slice, all_chunks_ - slice() * tiling_.slice);
    }
    __device__ __forceinline__ int first_tile() const { return product_ & 0xffff; }
    __device__ __forceinline__ int tiles() const {
        return min(tiling_.column_tiles, all_tiles_ - first_tile());
    }

    // The thread's unit in the block, and in the layer.
    __device__ __forceinline__ int column() const { return own_ & 0xffff; }
    __device__ __forceinline__ int unit() const { return first_unit + column(); }
    __device__ __forceinline__ int state_at(int row) const { return row * units() + column(); }
    __device__ __forceinline__ int units() const { return tiling_.units(); }
    // Rows of a tile, that is, threads with the same unit; and whether this is the first of them.
    __device__ __forceinline__ int rows_at_once() const { return tiling_.rows_at_once; }
    __device__ __forceinline__ bool first_of_unit() const { return own_ >> 16 == 0; }

private:
    const Tiling& tiling_;
    const int& all_chunks_;
    const int all_tiles_;
    int own_;      // the thread's first row of a tile, and its unit in the block; in one register
    int product_;  // the warp's slice, and its first tile of columns

public:
    const int first_unit;  // of the block
    const int first_row;   // of the group
};

// The exchange buffer of a group, [2][sources][rows][width]; a source is one slice of the
// contraction of one block. In shared memory if the group is a single block.
template <class Arguments>
class PartialSums {
public:
    __device__ __forceinline__ PartialSums(const Arguments& a, void* shared)
        : a_(a),
          memory_(gridDim.x == 1 ? static_cast<float*>(shared)
                                 : static_cast<float*>(a.exchange) +
                                       (blockIdx.z * gridDim.y + blockIdx.y) *
                                           int64_t(2 * sources() * of_source())) {}

    // Stores the sums of two columns of a row, of a slice of this block, for a step to read.
    __device__ __forceinline__ void put(int step, int slice, int row, int column,
                                        float2 sums) const {
        *reinterpret_cast<float2*>(at(step, blockIdx.x * a_.tiling.slices + slice, row) + column) =
            sums;
    }
    // The sum over all sources, in their order.
    __device__ __forceinline__ float sum(int step, int row, int column) const {
        const float* from = at(step, 0, row) + column;
        float sum = 0;
#pragma unroll 4
        for (int i = sources(); i > 0; --i, from += of_source()) sum += *from;
        return sum;
    }

private:
    // Computed again wherever they are used: there are no registers to keep them in.
    __device__ __forceinline__ int of_source() const { return a_.tiling.group_rows * a_.width; }
    __device__ __forceinline__ int sources() const { return gridDim.x * a_.tiling.slices; }
    __device__ __forceinline__ float* at(int step, int source, int row) const {
        asm volatile("" : "+r"(step));
        return memory_ + ((step & 1) * sources() + source) * of_source() + row * a_.width;
    }

    const Arguments& a_;
    float* memory_;
};

// A thread's gate gradients, in shared memory: those of the current element, which are stored after
// the arrival at the barrier and have no registers until then; and the sums over all elements, for
// the gradients of the biases. In the end each block stores its sums, and the last block of the
// same units to finish adds up those of all groups of rows, in their order.
template <class Cell>
class ThreadGradients {
    using Out = BackwardOutputs<Cell, float>;

public:
    __device__ __forceinline__ explicit ThreadGradients(float* memory) : memory_(memory) {
        for (int i = 0; i < Cell::grads; ++i) sum(i) = 0;
    }
    // The memory after the gradients of all threads.
    __device__ __forceinline__ float* end() const {
        return memory_ + gradient_slots * Cell::grads * blockDim.x;
    }

    __device__ __forceinline__ void set(const Out& out) {
        for (int i = 0; i < Cell::grads; ++i) (&sum(i))[blockDim.x] = out.dgates[i];
    }
    __device__ __forceinline__ Out get() const {
        Out out;
        for (int i = 0; i < Cell::grads; ++i) out.dgates[i] = (&sum(i))[blockDim.x];
        return out;
    }
    __device__ __forceinline__ void add(const Out& out) {
        for (int i = 0; i < Cell::grads; ++i) sum(i) += out.dgates[i];
    }

    __device__ __forceinline__ void finish(const ColumnsPart& part, const BiasGradients& to,
                                           int64_t hidden) const {
        if (!to.sums) return;
        __syncthreads();
        float* const of_groups = static_cast<float*>(to.sums);
        const auto at = [&](int group, int grad) -> float& {
            return of_groups[(int64_t(group) * Cell::grads + grad) * hidden + part.unit()];
        };
        if (part.first_of_unit())
            for (int i = 0; i < Cell::grads; ++i) {
                float sum = 0;
                for (int row = 0; row < part.rows_at_once(); ++row)
                    sum += (&this->sum(i))[row * part.units()];
                at(blockIdx.y, i) = sum;
            }
        __syncthreads();
        const bool last = gridDim.y == 1 || is_last_block(to.done + blockIdx.x, gridDim.y,
                                                          *reinterpret_cast<bool*>(memory_));
        if (last && part.first_of_unit())
            store_bias_gradients<Cell, float>(to, hidden, part.unit(), gridDim.y, 0, 1, at);
    }

private:
    __device__ __forceinline__ float& sum(int grad) const {
        return memory_[gradient_slots * grad * blockDim.x + rematerialized_thread()];
    }

    float* memory_;  // [grads][gradient_slots][threads]
};

}  // namespace fastrnn::cuda
