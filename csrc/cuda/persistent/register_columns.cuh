// Columns of W_hh in a warp's registers (../common/register_weights.cuh), and their product with up
// to 8 rows from shared memory.
#pragma once
#include <string.h>

#include "../common/register_weights.cuh"
#include "tiling.h"

namespace fastrnn::cuda {

// The thread's index, computed again wherever it is used, with everything that depends on it: there
// are no registers to keep these values in.
__device__ __forceinline__ int rematerialized_thread() {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    return thread;
}

// Up to column_chunks pairs of a tile of 16 columns and a chunk of the contraction, in float32. M:
// float, for multiply-adds, or Tf32, for the tensor cores.
//
//                            lane 4 g + t holds                       and gets the sums of
//                            columns 2 g, 2 g + 1                     columns 2 g, 2 g + 1
//   values 4 t .. 4 t + 3 of
//   every piece of 16        2 x 4 weights     x rows from    =  row t       2 sums
//                                              shared memory     row t + 4   2 sums
template <class M>
class RegisterColumns {
    static_assert(std::is_same_v<Stored<M>, float>);
    static constexpr int pieces = chunk_size / 16;
    static constexpr int words = 4 * pieces;  // of a lane, of a column and chunk

public:
    // weights_of(tile, k): the WeightsColumns of the tile's columns, from the k-th value of the
    // contraction on. Each value of the contraction is a row of W_hh.
    template <class WeightsOf>
    __device__ __forceinline__ RegisterColumns(int tiles, int chunks, WeightsOf weights_of) {
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
            // Without this the compiler loads all weights at once, with an address for each.
            asm volatile("" ::: "memory");
            next(tile, chunk, chunks);
        }
    }

    // rows: `count` rows, `stride` apart, from the warp's first chunk on. Calls put(tile, i, two)
    // with the sums of the tile's columns 2 g and 2 g + 1 for row t + 4 i, also if there is no such
    // row.
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
    static __device__ __forceinline__ int lane() { return rematerialized_thread() % 32; }
    static __device__ __forceinline__ void next(int& tile, int& chunk, int chunks) {
        if (++chunk == chunks) chunk = 0, ++tile;
    }

    // The lane's sums on the tensor cores, [column][row]; several independent ones, so that fewer
    // products wait for one another.
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
    // The weights are mma's first operand. Its rows are columns of W_hh; its column g is row g / 2
    // + g % 2 * 4, so that a lane gets rows t and t + 4. A lane whose row does not exist reads the
    // row 4 before it, as its neighbour does, or the first.
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

    // The lane's sums with multiply-adds, [row][column], over its quarters of the contraction
    // alone.
    struct FmaSums {
        static constexpr int rows = 4;
        float of[rows][2] = {};

        // Adds up over the four lanes of g. In each of two rounds two lanes exchange rows: each
        // keeps those whose sums it will return.
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
