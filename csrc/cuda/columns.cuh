// Columns of W_hh that a warp holds in its registers, and their product with up to 8 rows from shared
// memory.
#pragma once
#include <string.h>

#include "operands.cuh"
#include "tiling.h"

namespace fastrnn::cuda {

// The thread's index, worked out wherever it is used with all that follows from it: there are no
// registers to keep that in.
__device__ __forceinline__ int thread_anew() {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    return thread;
}

// Of tiles of 16 columns the part of some chunks of the contraction, in float32. M: float, for
// multiply-adds, or Tf32. Of each piece of 16 values of the contraction lane 4 g + t holds the t-th
// quarter, for the columns 2 g and 2 g + 1 of a tile; of their sums it is left with those of the rows t
// and t + 4.
template <class M>
class Columns {
    static_assert(std::is_same_v<Stored<M>, float>);
    static constexpr int pieces = chunk_size / 16;
    static constexpr int words = 4 * pieces;  // of a lane, of a column and chunk

public:
    // weights_of(tile, k): those from the k-th of the contraction on, of columns from the tile's first
    // on. Four of the contraction lie at a distance of one row from each other.
    template <class WeightsOf>
    __device__ __forceinline__ Columns(int tiles, int chunks, WeightsOf weights_of) {
        int tile = 0, chunk = 0;
#pragma unroll
        for (int i = 0; i < column_chunks; ++i) {
#pragma unroll
            for (int p = 0; p < pieces; ++p) {
                const WeightsColumns<float> from =
                    tile < tiles ? weights_of(tile, chunk * chunk_size + p * 16 + lane() % 4 * 4)
                                 : WeightsColumns<float>{};
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    alignas(8) float two[2];
                    from.template read<2>(k, lane() / 4 * 2, two);
                    for (int column = 0; column < 2; ++column)
                        weights_[i][column][4 * p + k] = operand<M>(two[column]);
                }
            }
            // Or the compiler would ask for all weights at once, with an address each.
            asm volatile("" ::: "memory");
            next(tile, chunk, chunks);
        }
    }

    // rows: `count` of them, `stride` apart, from the first chunk on. put(tile, i, two): the sums of the
    // tile's columns 2 g and 2 g + 1 for the row t + 4 i, whether there is one or not.
    template <class Put>
    __device__ __forceinline__ void multiply(int tiles, int chunks, const float* rows, int stride,
                                             int count, Put put) const {
#pragma unroll 1
        for (int row = 0; row < column_rows && row < count; row += Sums::rows) {
            int tile = 0, chunk = 0;
            Sums sums;
#pragma unroll
            for (int i = 0; i < column_chunks; ++i) {
                if (tile >= tiles) break;
                if (chunk == 0) sums = {};
                add(rows + row * stride + chunk * chunk_size, stride, count - row, weights_[i],
                    sums);
                if (chunk == chunks - 1) sums.put(tile, row / 4, put);
                next(tile, chunk, chunks);
            }
        }
    }

private:
    static __device__ __forceinline__ int lane() { return thread_anew() % 32; }
    static __device__ __forceinline__ void next(int& tile, int& chunk, int chunks) {
        if (++chunk == chunks) chunk = 0, ++tile;
    }

    // What the tensor cores leave: [columns][rows] of the lane, of chains that are added up apart, so
    // that fewer products wait for one another.
    struct MmaSums {
        static constexpr int rows = 8, chains = 2;
        float of[chains][4] = {};

        template <class Put>
        __device__ __forceinline__ void put(int tile, int, Put put) const {
#pragma unroll
            for (int row = 0; row < 2; ++row)
                put(tile, row,
                    make_float2(of[0][row] + of[1][row], of[0][2 + row] + of[1][2 + row]));
        }
    };
    // The weights are the first operand: mma's row is a column, and its column g the row g / 2, or
    // that + 4. Whose row is not there reads the one 4 before, as its neighbour does, or the first.
    static __device__ __forceinline__ void add(const float* rows, int stride, int count,
                                               const float (&weights)[2][words], MmaSums& sums) {
        const int column = lane() / 4;
        int row = column / 2 + column % 2 * 4;
        if (row >= count) row %= 4;
        const float* own = rows + (row < count ? row * stride : 0) + lane() % 4 * 4;
#pragma unroll
        for (int p = 0; p < pieces; ++p) {
            const uint4 four = *reinterpret_cast<const uint4*>(own + p * 16);
            const uint32_t b[] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
                const auto bits = [&](int of, int word) {
                    return __float_as_uint(weights[of][4 * p + w + word]);
                };
                mma<M>(sums.of[w / 2], {bits(0, 0), bits(1, 0), bits(0, 1), bits(1, 1)}, b + w);
            }
        }
    }

    // A lane's part of the sums of all rows: its quarters of the contraction.
    struct FmaSums {
        static constexpr int rows = 4;
        float of[rows][2] = {};

        // Each round gives away the rows that the other lane will answer for.
        template <class Put>
        __device__ __forceinline__ void put(int tile, int i, Put put) const {
            const bool upper = lane() & 2, odd = lane() & 1;
            float two[2];
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                float half[2];
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const float low = of[row][column], high = of[2 + row][column];
                    half[row] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, 2);
                }
                two[column] =
                    (odd ? half[1] : half[0]) + __shfl_xor_sync(~0u, odd ? half[0] : half[1], 1);
            }
            put(tile, i, make_float2(two[0], two[1]));
        }
    };
    static __device__ __forceinline__ void add(const float* rows, int stride, int count,
                                               const float (&weights)[2][words], FmaSums& sums) {
        const float* own = rows + lane() % 4 * 4;
#pragma unroll
        for (int row = 0; row < FmaSums::rows; ++row) {
            if (row >= count) break;
#pragma unroll
            for (int p = 0; p < pieces; ++p) {
                const float4 four = *reinterpret_cast<const float4*>(own + row * stride + p * 16);
                const float values[] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int k = 0; k < 4; ++k)
#pragma unroll
                    for (int column = 0; column < 2; ++column)
                        sums.of[row][column] =
                            fmaf(values[k], weights[column][4 * p + k], sums.of[row][column]);
            }
        }
    }

    using Sums = std::conditional_t<std::is_same_v<M, Tf32>, MmaSums, FmaSums>;

    float weights_[column_chunks][2][words];
};

}  // namespace fastrnn::cuda
