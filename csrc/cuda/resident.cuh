// Weights that stay in a warp's registers, and their products with rows from memory.
//
// A warp holds the weights of one tile of 8 units, O outputs each (the gates, in the forward pass),
// for up to C chunks of the contraction. It multiplies them with a tile of 16 rows and leaves
// sums[O][16 rows][8 units] in shared memory. How the rows lie in the exchange buffer, and which
// lane holds which weights, is up to the warp's type: `place` says where a value is.
#pragma once
#include <string.h>

#include "math.cuh"
#include "tiling.h"

namespace fastrnn::cuda {

// Where a unit's weights of one chunk are: `count` of them (the others of the chunk are 0),
// `stride` apart.
template <class S>
struct ChunkWeights {
    const S* first;
    int stride, count;

    // Weights [k, k + 4) of the chunk.
    __device__ __forceinline__ void read4(int k, S* to) const {
        const S* from = first + k * stride;
        if (stride == 1 && k + 4 <= count &&
            reinterpret_cast<uintptr_t>(from) % sizeof(Four) == 0) {
            const Four four = *reinterpret_cast<const Four*>(from);
            memcpy(to, &four, sizeof four);
            return;
        }
        for (int i = 0; i < 4; ++i) to[i] = k + i < count ? from[i * stride] : narrow<S>(0);
    }

private:
    using Four = std::conditional_t<sizeof(S) == 4, uint4, uint2>;
};

// 16 bytes of a row, or zeros.
__device__ __forceinline__ uint4 read16(const void* p, bool there) {
    return there ? *static_cast<const uint4*>(p) : uint4{};
}

// float16 and bfloat16 on the tensor cores, with sums in float. Of 16 values of a row, lane 4 g + t
// holds [4 t, 4 t + 4), those of rows g and g + 8 and of unit g. The rows lie as the lanes read
// them: [16 rows] by [16 values] make [32 lanes][8 values], the 4 registers of mma's operand A, 16
// bytes.
template <class S, int C, int O>
class Resident {
public:
    static __device__ __forceinline__ int place(int row, int k, int width) {
        const int lane = row % 8 * 4 + k % 16 / 4, reg = k % 4 / 2 * 2 + row % 16 / 8;
        return row / 16 * 16 * width + k / 16 * 256 + lane * 8 + reg * 2 + k % 2;
    }

    // weights_of(unit of the tile, output, chunk)
    template <class WeightsOf>
    __device__ __forceinline__ void load(int chunks, WeightsOf weights_of) {
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int o = 0; o < O; ++o) {
                S run[2][4];
                const ChunkWeights<S> from =
                    c < chunks ? weights_of(lane() / 4, o, c) : ChunkWeights<S>{};
                from.read4(lane() % 4 * 4, run[0]);
                from.read4(lane() % 4 * 4 + 16, run[1]);
                memcpy(weights_[c][o], run, sizeof run);
            }
    }

    // rows: a tile of rows of the exchange buffer, `count` of which are wanted. first: the first
    // value of the warp's slice. sums: [O][16][8], outputs output_stride apart.
    __device__ __forceinline__ void multiply(const S* rows, int width, int first, int count,
                                             int chunks, float* sums, int output_stride) const {
        const int g = lane() / 4, t = lane() % 4;
        const S* own = rows + first * 16 + lane() * 8;
        float sum[O][chains][4] = {};
#pragma unroll
        for (int c0 = 0; c0 < C; c0 += batch) {
            if (c0 >= chunks) break;
            uint4 a[batch][2];
#pragma unroll
            for (int i = 0; i < batch; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    a[i][half] =
                        read16(own + (c0 + i) * 512 + half * 256, c0 + i < chunks && g < count);
#pragma unroll
            for (int i = 0; i < batch; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int o = 0; o < O; ++o)
                        mma(sum[o][half % chains], a[i][half], &weights_[c0 + i][o][2 * half]);
        }
        float* to = sums + g * tile_units + 2 * t;
#pragma unroll
        for (int o = 0; o < O; ++o, to += output_stride) {
            float* s = sum[o][0];
            if constexpr (chains == 2)
                for (int i = 0; i < 4; ++i) s[i] += sum[o][1][i];
            *reinterpret_cast<float2*>(to) = {s[0], s[1]};
            *reinterpret_cast<float2*>(to + 8 * tile_units) = {s[2], s[3]};
        }
    }

private:
    static constexpr int batch = C < 4 ? C : 4;   // chunks whose rows are read at a time
    static constexpr int chains = O < 3 ? 2 : 1;  // of additions, so that they need not wait

    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

    // sum [16, 8] += a [16, 16] b [16, 8]
    static __device__ __forceinline__ void mma(float* sum, const uint4& a, const uint32_t* b) {
#define FASTRNN_MMA(type)                                                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]))
#if __CUDA_ARCH__ >= 800
        if constexpr (std::is_same_v<S, __half>)
            FASTRNN_MMA("f16");
        else
            FASTRNN_MMA("bf16");
#else
        __trap();  // the plan does not choose these kernels there
#endif
#undef FASTRNN_MMA
    }

    uint32_t weights_[C][O][4];
};

// float32 by multiply-adds. The lanes are [32 / K][K]: K of them share the values of the
// contraction, 4 at a time, and the others the units. K grows as the outputs get fewer, so that a
// value that was read is multiplied with O * K / 4 weights. Four rows at a time leave each lane
// with O * K sums; when they are added up over the K lanes, lane 4 g + t is left with unit g of row
// t.
template <int C, int O>
class Resident<float, C, O> {
    static constexpr int K = O >= 3 ? 8 : O == 2 ? 16 : 32;
    static constexpr int units = K / 4;  // of a lane
    static constexpr int step = 4 * K;   // values of the contraction read at a time
    static constexpr int steps = (C * chunk_size + step - 1) / step;

public:
    static __device__ __forceinline__ int place(int row, int k, int width) {
        return row * width + k;
    }

    template <class WeightsOf>
    __device__ __forceinline__ void load(int chunks, WeightsOf weights_of) {
#pragma unroll
        for (int s = 0; s < steps; ++s) {
            const int k = s * step + lane() % K * 4, c = k / chunk_size;
#pragma unroll
            for (int o = 0; o < O; ++o)
#pragma unroll
                for (int u = 0; u < units; ++u) {
                    const ChunkWeights<float> from = c < chunks
                                                         ? weights_of(lane() / K * units + u, o, c)
                                                         : ChunkWeights<float>{};
                    from.read4(k % chunk_size, weights_[s][o][u]);
                }
        }
    }

    __device__ __forceinline__ void multiply(const float* rows, int width, int first, int count,
                                             int chunks, float* sums, int output_stride) const {
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
            float* to = sums + (row + lane() % 4) * tile_units + lane() / 4;
#pragma unroll
            for (int o = 0; o < O; ++o) to[o * output_stride] = add_up<K / 2>(sum[o]);
        }
    }

private:
    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

    // Each of 2 * half lanes has as many values; returns the sum of value i on the i-th of them. In
    // every round a lane gives away the half of its values that the other lane will answer for.
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
