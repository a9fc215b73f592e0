// The weights of a tile of units in a warp's registers (../common/register_weights.cuh), and their
// product with rows from the exchange buffer.
//
// A warp holds the weights of one tile of units, O outputs of each (forward the gates, backward 1),
// for up to C chunks of the contraction. It multiplies them with a tile of 16 rows and stores
// sums [16 rows][tile][O] to shared memory (Tiling::sums_row). The layout of the exchange buffer
// suits the type: `index` is where a value is.
#pragma once
#include <string.h>

#include "../common/register_weights.cuh"
#include "tiling.h"

namespace fastrnn::cuda {

// 16 bytes of a row, or zeros if they are not there.
__device__ __forceinline__ uint4 read16(const void* p, bool there) {
    return there ? *static_cast<const uint4*>(p) : uint4{};
}

// One store, to an address aligned to its size. From an assignment to a float2 or float4 the
// compiler makes several stores here.
__device__ __forceinline__ void store_shared(float* to, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_shared(to)), "f"(a),
                 "f"(b)
                 : "memory");
}
__device__ __forceinline__ void store_shared(float* to, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_shared(to)),
                 "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}

// On the tensor cores the rows are mma's first operand and the weights the second:
//
//                      quarter t of every piece                  units 2 t, 2 t + 1
//   row g        lane 4 g + t reads 16 bytes      x weights =    sum[0]  sum[1]
//   row g + 8    lane 4 g + t reads 16 bytes      of unit g      sum[2]  sum[3]
//
// In a tile of 16 units, g and t count pairs of units, and N = 2 products share the rows: one of
// the even units and one of the odd ones.
//
// The exchange buffer is [row / 16][chunk][row / 8 % 2][piece][row % 8][value of the piece]: a
// piece of 8 rows is contiguous, so that a warp reads 512 bytes in a row, and the values that a
// block stores for a row, of one or two tiles, fill whole sectors.
template <class M, int C, int O, int tile>
class RegisterTile {
    using S = Stored<M>;
    static_assert(tile == 8 || (tile == 16 && O == 1));
    static constexpr int P = sizeof(S) / 2;
    static constexpr int piece = chunk_size / P, quarter = piece / 4;  // values
    static constexpr int words = 4 * P;                                // of a lane, for a chunk
    // Products of 8 columns: one for each output, or for the even and the odd units of a tile.
    static constexpr int N = O * tile / 8;

public:
    static __device__ __forceinline__ int index(int row, int k, int width) {
        return row / 16 * 16 * width + k / 32 * 512 + row % 16 / 8 * 256 +
               k % 32 / piece * 8 * piece + row % 8 * piece + k % piece;
    }

    // Where a unit has a row of W_hh. weights_of(unit of the tile, output, chunk): a WeightsRow.
    template <class WeightsOf>
    __device__ __forceinline__ void load_rows(int chunks, WeightsOf weights_of) {
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int o = 0; o < O; ++o) {
                const WeightsRow<S> from =
                    c < chunks ? weights_of(lane() / 4, o, c) : WeightsRow<S>{};
                alignas(16) S quarters[P][quarter];
#pragma unroll
                for (int p = 0; p < P; ++p)
                    from.read16(p * piece + lane() % 4 * quarter, quarters[p]);
                pack_operands<M>(quarters, weights_[c][o]);
            }
    }

    // Where a unit has a column. weights_of(chunk): a WeightsColumns.
    template <class WeightsOf>
    __device__ __forceinline__ void load_columns(int chunks, WeightsOf weights_of) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
            alignas(16) S quarters[N][P][quarter];
            const WeightsColumns<S> from = c < chunks ? weights_of(c) : WeightsColumns<S>{};
#pragma unroll
            for (int p = 0; p < P; ++p)
#pragma unroll
                for (int i = 0; i < quarter; ++i) {
                    S units[N];
                    from.template read<N>(p * piece + lane() % 4 * quarter + i, lane() / 4 * N,
                                          units);
                    for (int n = 0; n < N; ++n) quarters[n][p][i] = units[n];
                }
#pragma unroll
            for (int n = 0; n < N; ++n) pack_operands<M>(quarters[n], weights_[c][n]);
        }
    }

    // rows: a tile of rows in the exchange buffer. Only the sums of the first `count` are read
    // later. first: the first value of the warp's slice.
    __device__ __forceinline__ void multiply(const S* rows, int width, int first, int count,
                                             int chunks, float* sums, int sums_row) const {
        const S* own = rows + first * 16 + lane() * quarter;
        float sum[N][chains][4] = {};
        // With all chunks in use the loop needs no branches.
        if (chunks < C)
            add<false>(own, chunks, count > 8, sum);
        else
            add<true>(own, chunks, count > 8, sum);
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int k = 1; k < chains; ++k)
                for (int i = 0; i < 4; ++i) sum[n][0][i] += sum[n][k][i];
        const int g = lane() / 4, t = lane() % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* row = sums + (g + 8 * half) * sums_row;
            const auto of = [&](int n, int i) { return sum[n][0][2 * half + i]; };
            if constexpr (N == 2) {  // a tile of 16 units, or a cell of two outputs
                store_shared(row + 4 * t, of(0, 0), of(N - 1, 0), of(0, 1), of(N - 1, 1));
            } else if constexpr (O == 1) {
                store_shared(row + 2 * t, of(0, 0), of(0, 1));
            } else {
                static_assert(O == 3 || O == 4);
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    store_shared(row + (2 * t + i) * 4, of(0, i), of(1, i), of(2, i), of(O - 1, i));
            }
        }
    }

private:
    static constexpr int chunks_at_once = N == 1 ? 4 : N == 3 ? 4 : 2;  // chunks

    // Independent sums, so that fewer products wait for one another.
    static constexpr int chains = N == 1 ? words / 2 : 1;

    // Adds the products of a tile of rows with the warp's weights. all: whether all C chunks are in
    // use. both: whether the second half of the 16 rows is read too.
    template <bool all>
    __device__ __forceinline__ void add(const S* own, int chunks, bool both,
                                        float (&sum)[N][chains][4]) const {
#pragma unroll
        for (int c = 0; c < C; ++c) {
            // With `all`, the branch is never taken: it keeps the compiler from loading more chunks
            // at once than there are registers for.
            if ((!all || (c > 0 && c % chunks_at_once == 0)) && c >= chunks) break;
            uint32_t a[2][words];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int p = 0; p < P; ++p) {
                    const uint4 four =
                        read16(own + c * 512 + half * 256 + p * 8 * piece, half == 0 || both);
                    memcpy(&a[half][4 * p], &four, sizeof four);
                }
#pragma unroll
            for (int w = 0; w < words; w += 2)
#pragma unroll
                for (int n = 0; n < N; ++n)
                    mma<M>(sum[n][w / 2 % chains], {a[0][w], a[1][w], a[0][w + 1], a[1][w + 1]},
                           weights_[c][n] + w);
        }
    }

    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

    uint32_t weights_[C][N][words];
};

// float32 by multiply-adds, four rows at a time. The lanes are [32 / K][K]:
//
//                     contraction: 4 values a lane, 4 K at a time
//                     | 0 1 2 3 | 4 5 6 7 | ...  K lanes
//   K / 4 units       | lane 0  | lane 1  | ...
//   the next K / 4    | lane K  | ...
//
// So a value that a lane reads is multiplied with O * K / 4 weights. Each lane has O * K sums
// (units x 4 rows); added up over the K lanes, they leave lane 4 g + t with unit g of row t.
template <int C, int O>
class RegisterTile<float, C, O, 8> {
    static constexpr int K = float32_lanes(O);
    static constexpr int units = K / 4;  // of a lane
    static constexpr int step = 4 * K;   // values of the contraction read at a time
    static constexpr int steps = (C * chunk_size + step - 1) / step;

public:
    static __device__ __forceinline__ int index(int row, int k, int width) {
        return row * width + k;
    }

    template <class WeightsOf>
    __device__ __forceinline__ void load_rows(int chunks, WeightsOf weights_of) {
#pragma unroll
        for (int s = 0; s < steps; ++s)
#pragma unroll
            for (int o = 0; o < O; ++o)
#pragma unroll
                for (int u = 0; u < units; ++u) {
                    const int c = chunk(s);
                    const WeightsRow<float> from =
                        c < chunks ? weights_of(lane() / K * units + u, o, c) : WeightsRow<float>{};
                    uint4 four;
                    from.read16(value(), &four);
                    memcpy(weights_[s][o][u], &four, sizeof four);
                }
    }

    __device__ __forceinline__ void multiply(const float* rows, int width, int first, int count,
                                             int chunks, float* sums, int sums_row) const {
        const float* own = rows + first + lane() % K * 4;
        const int length = chunks * chunk_size - lane() % K * 4;
#pragma unroll 1
        for (int row = 0; row < tile_rows && row < count; row += 4, own += 4 * width) {
            float sum[O][K] = {};  // [units][4 rows] each
#pragma unroll
            for (int s = 0; s < steps; ++s) {
                if (s * step >= chunks * chunk_size) break;
                float a[4][4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const uint4 bits =
                        read16(own + r * width + s * step, s * step < length && row + r < count);
                    memcpy(a[r], &bits, sizeof bits);
                }
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    if (row + r >= count) break;
#pragma unroll
                    for (int o = 0; o < O; ++o)
#pragma unroll
                        for (int u = 0; u < units; ++u)
#pragma unroll
                            for (int i = 0; i < 4; ++i)
                                sum[o][u * 4 + r] =
                                    fmaf(a[r][i], weights_[s][o][u][i], sum[o][u * 4 + r]);
                }
            }
            float* to = sums + (row + lane() % 4) * sums_row + lane() / 4 * stored_outputs(O);
            float total[O];
#pragma unroll
            for (int o = 0; o < O; ++o) total[o] = add_up<K / 2>(sum[o]);
            if constexpr (O > 2)
                store_shared(to, total[0], total[1], total[2], total[O - 1]);
            else
                for (int o = 0; o < O; ++o) to[o] = total[o];
        }
    }

private:
    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

    // The chunk of the lane's 4 values, and the first of them within it.
    static __device__ __forceinline__ int chunk(int s) {
        return (s * step + lane() % K * 4) / chunk_size;
    }
    static __device__ __forceinline__ int value() { return lane() % K * 4 % chunk_size; }

    // 2 * half lanes have 2 * half values each; the i-th of them returns the sum of all values i.
    // In every round two lanes exchange halves: each keeps the one whose sums it will return.
    template <int half>
    static __device__ __forceinline__ float add_up(float (&values)[K]) {
        if constexpr (half == 0) {
            return values[0];
        } else {
            const bool upper = lane() & half;
#pragma unroll
            for (int i = 0; i < half; ++i) {
                const float mine = upper ? values[i + half] : values[i];
                const float other = upper ? values[i] : values[i + half];
                values[i] = mine + __shfl_xor_sync(~0u, other, half);
            }
            return add_up<half / 2>(values);
        }
    }

    float weights_[steps][O][units][4];
};

}  // namespace fastrnn::cuda
