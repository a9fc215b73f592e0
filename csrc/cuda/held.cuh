// Weights of 16 units that one warp holds whole, and their product with up to 8 rows from shared
// memory.
#pragma once
#include <string.h>

#include "operands.cuh"
#include "tiling.h"

namespace fastrnn::cuda {

// N outputs of each unit (the gates, in the forward pass), for up to C chunks of the contraction.
// On the tensor cores the weights are mma's first operand: lane 4 g + t holds those of units 2 g and
// 2 g + 1 that belong to the t-th quarter of each piece of 16 bytes of a row, and is left with the sums
// of these units, all outputs of them, for rows t and t + 4. So the cell needs no other lane's sums.
template <class M, int C, int N>
class Held {
    using S = Stored<M>;
    static constexpr int P = sizeof(S) / 2;                            // pieces of a chunk
    static constexpr int piece = chunk_size / P, quarter = piece / 4;  // values
    static constexpr int words = 4 * P;                                // of a lane and a chunk

public:
    // weights_of(unit, output, chunk); unit: 0 or 1, of the lane.
    template <class WeightsOf>
    __device__ __forceinline__ void load_rows(int chunks, WeightsOf weights_of) {
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    const WeightsRow<S> from = c < chunks ? weights_of(u, n, c) : WeightsRow<S>{};
                    alignas(16) S run[P][quarter];
#pragma unroll
                    for (int p = 0; p < P; ++p)
                        from.read16(p * piece + lane() % 4 * quarter, run[p]);
                    keep_operands<M>(run, weights_[c][n][u]);
                }
    }

    // The same where a unit has a column: weights_of(chunk), from the lane's first unit on.
    template <class WeightsOf>
    __device__ __forceinline__ void load_columns(int chunks, WeightsOf weights_of) {
        static_assert(N == 1);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            alignas(16) S runs[2][P][quarter];
            const WeightsColumns<S> from = c < chunks ? weights_of(c) : WeightsColumns<S>{};
#pragma unroll
            for (int p = 0; p < P; ++p)
#pragma unroll
                for (int i = 0; i < quarter; ++i) {
                    alignas(2 * sizeof(S)) S units[2];
                    from.template read<2>(p * piece + lane() % 4 * quarter + i, 0, units);
                    for (int u = 0; u < 2; ++u) runs[u][p][i] = units[u];
                }
#pragma unroll
            for (int u = 0; u < 2; ++u) keep_operands<M>(runs[u], weights_[c][0][u]);
        }
    }

    // sum [N][unit of the lane][t, t + 4] += the products with rows `stride` values apart, of which
    // there are `count`.
    __device__ __forceinline__ void multiply(const S* rows, int stride, int count, int chunks,
                                             float (&sum)[N][2][2]) const {
        // mma's column g is row g / 2, or that + 4. Whose row is not there reads the first.
        const int column = lane() / 4, row = column / 2 + column % 2 * 4;
        const S* own = rows + (row < count ? row * stride : 0) + lane() % 4 * quarter;
        float part[N][chains][4] = {};
        alignas(16) uint32_t next[words];
        read(own, next);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            if (c >= chunks) break;
            uint32_t b[words];
            memcpy(b, next, sizeof b);
            if (c + 1 < C) read(own + min(c + 1, chunks - 1) * chunk_size, next);
#pragma unroll
            for (int w = 0; w < words; w += 2)
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const auto& held = weights_[c][n];
                    mma<M>(part[n][(c * words + w) / 2 % chains],
                           {held[0][w], held[1][w], held[0][w + 1], held[1][w + 1]}, b + w);
                }
        }
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int k = 1; k < chains; ++k) part[n][0][i] += part[n][k][i];
                sum[n][i / 2][i % 2] += part[n][0][i];
            }
    }

private:
    // Sums that are added up apart, so that fewer products wait for one another.
    static constexpr int chains = N == 1 ? 4 : 1;

    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

    static __device__ __forceinline__ void read(const S* from, uint32_t (&to)[words]) {
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const uint4 four = *reinterpret_cast<const uint4*>(from + p * piece);
            memcpy(to + 4 * p, &four, sizeof four);
        }
    }

    uint32_t weights_[C][N][2][words];
};

}  // namespace fastrnn::cuda
