// All weights of 16 units in a warp's registers (../common/register_weights.cuh), and their product
// with up to 8 rows from shared memory.
#pragma once
#include <string.h>

#include "../common/chunks.h"
#include "../common/register_weights.cuh"

namespace fastrnn::cuda {

// N outputs of each unit (forward the gates, backward 1), for up to C chunks of the contraction.
// The weights are mma's first operand and the rows the second:
//
//                 lane 4 g + t holds                          and gets the sums of
//                 quarter t of every piece                    row t      row t + 4
//   unit 2 g      N weights of each value    x rows from   =  N sums     N sums
//   unit 2 g + 1  N weights of each value    shared memory    N sums     N sums
//
// So a lane has all gates of its two units and two rows, and applies the cell without other lanes.
template <class M, int C, int N>
class RegisterUnits {
    using S = Stored<M>;
    static constexpr int P = sizeof(S) / 2;                            // pieces of a chunk
    static constexpr int piece = chunk_size / P, quarter = piece / 4;  // values
    static constexpr int words = 4 * P;                                // of a lane and a chunk

public:
    // Where a unit has a row of W_hh. weights_of(unit, output, chunk): a WeightsRow; unit: 0 or 1,
    // of the lane.
    template <class WeightsOf>
    __device__ __forceinline__ void load_rows(int chunks, WeightsOf weights_of) {
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    const WeightsRow<S> from = c < chunks ? weights_of(u, n, c) : WeightsRow<S>{};
                    alignas(16) S quarters[P][quarter];
#pragma unroll
                    for (int p = 0; p < P; ++p)
                        from.read16(p * piece + lane() % 4 * quarter, quarters[p]);
                    pack_operands<M>(quarters, weights_[c][n][u]);
                }
    }

    // Where a unit has a column. weights_of(chunk): a WeightsColumns, from the lane's first unit
    // on.
    template <class WeightsOf>
    __device__ __forceinline__ void load_columns(int chunks, WeightsOf weights_of) {
        static_assert(N == 1);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            alignas(16) S quarters[2][P][quarter];
            const WeightsColumns<S> from = c < chunks ? weights_of(c) : WeightsColumns<S>{};
#pragma unroll
            for (int p = 0; p < P; ++p)
#pragma unroll
                for (int i = 0; i < quarter; ++i) {
                    alignas(2 * sizeof(S)) S units[2];
                    from.template read<2>(p * piece + lane() % 4 * quarter + i, 0, units);
                    for (int u = 0; u < 2; ++u) quarters[u][p][i] = units[u];
                }
#pragma unroll
            for (int u = 0; u < 2; ++u) pack_operands<M>(quarters[u], weights_[c][0][u]);
        }
    }

    // sum [N][unit of the lane][row t, row t + 4] += the products with `count` rows, `stride`
    // values apart.
    __device__ __forceinline__ void multiply(const S* rows, int stride, int count, int chunks,
                                             float (&sum)[N][2][2]) const {
        // mma's column g is row g / 2 + g % 2 * 4, so that a lane gets rows t and t + 4. A lane
        // whose row does not exist reads the first.
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
                    const auto& operands = weights_[c][n];
                    mma<M>(part[n][(c * words + w) / 2 % chains],
                           {operands[0][w], operands[1][w], operands[0][w + 1], operands[1][w + 1]},
                           b + w);
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
    // Independent sums, so that fewer products wait for one another.
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
