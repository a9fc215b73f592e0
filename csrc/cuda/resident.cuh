// Weights that stay in a warp's registers, and their products with rows from memory.
//
// A warp holds the weights of one tile of 8 units, O outputs each (the gates, in the forward pass), for
// up to C chunks of the contraction. It multiplies them with a tile of 16 rows and leaves
// sums[O][16 rows][8 units] in shared memory. Which lane holds which values of a chunk is free, as
// long as the rows are read alike: each lane reads 16 bytes at a time, and those that read the same
// row read whole sectors.
#pragma once
#include <string.h>

#include "math.cuh"
#include "tiling.h"

namespace fastrnn::cuda {

// Where a unit's weights of one chunk are: `count` of them (the others of the chunk are 0), `stride`
// apart.
template <class S>
struct ChunkWeights {
    const S* first;
    int64_t stride, count;

    // Weights [k, k + n) of the chunk.
    template <int n>
    __device__ __forceinline__ void read(int k, S* to) const {
        const S* from = first + k * stride;
        if (stride == 1 && k + n <= count && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
            for (int i = 0; i < n; i += 16 / sizeof(S)) {
                const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
                memcpy(to + i, &bits, sizeof bits);
            }
            return;
        }
        for (int i = 0; i < n; ++i) to[i] = k + i < count ? from[i * stride] : narrow<S>(0);
    }
};

// 16 bytes of a row, or zeros.
__device__ __forceinline__ uint4 read16(const void* p, bool there) {
    return there ? *static_cast<const uint4*>(p) : uint4{};
}

// float16 and bfloat16 on the tensor cores, with sums in float. Lane 4 g + t holds values
// [8 t, 8 t + 8) of each chunk for unit g, and reads those of rows g and g + 8.
template <class S, int C, int O>
class Resident {
public:
    // weights_of(output, unit of the tile, chunk)
    template <class WeightsOf>
    __device__ __forceinline__ void load(int chunks, WeightsOf weights_of) {
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int o = 0; o < O; ++o) {
                S run[8];
                const ChunkWeights<S> from =
                    c < chunks ? weights_of(o, lane() / 4, c) : ChunkWeights<S>{};
                from.template read<8>(lane() % 4 * 8, run);
                memcpy(weights_[c][o], run, sizeof run);
            }
    }

    // rows: [16 and more, row_stride], at this warp's slice; only the first `count` are read, and
    // none if that is negative. sums: [O][16][8], outputs output_stride apart.
    __device__ __forceinline__ void multiply(const S* rows, int row_stride, int count, int chunks,
                                             float* sums, int output_stride) const {
        const int g = lane() / 4, t = lane() % 4;
        const S* low = rows + g * row_stride + t * 8;
        const S* high = low + 8 * row_stride;
        float sum[O][4] = {};
#pragma unroll
        for (int first = 0; first < C; first += batch) {
            if (first >= chunks) break;
            uint4 a[batch][2];
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                const bool there = first + i < chunks;
                a[i][0] = read16(low + (first + i) * chunk_size, there && g < count);
                a[i][1] = read16(high + (first + i) * chunk_size, there && g + 8 < count);
            }
#pragma unroll
            for (int i = 0; i < batch; ++i)
#pragma unroll
                for (int o = 0; o < O; ++o) {
                    const uint32_t* w = weights_[first + i][o];
                    const uint4 &l = a[i][0], &h = a[i][1];
                    mma(sum[o], l.x, h.x, l.y, h.y, w[0], w[1]);
                    mma(sum[o], l.z, h.z, l.w, h.w, w[2], w[3]);
                }
        }
        float* to = sums + g * tile_units + 2 * t;
#pragma unroll
        for (int o = 0; o < O; ++o, to += output_stride) {
            *reinterpret_cast<float2*>(to) = {sum[o][0], sum[o][1]};
            *reinterpret_cast<float2*>(to + 8 * tile_units) = {sum[o][2], sum[o][3]};
        }
    }

private:
    static constexpr int batch = C < 4 ? C : 4;  // chunks whose rows are read at a time

    static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

    // sum [16, 8] += a [16, 16] b [16, 8]
    static __device__ __forceinline__ void mma(float* sum, uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint32_t b0, uint32_t b1) {
#define FASTRNN_MMA(type)                                                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
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

// float32 by multiply-adds, exactly rounded. The lanes are [32 / K][K]: K of them share the values
// of the contraction, 4 at a time, and the others the units. K grows as the outputs get fewer, so
// that a value that was read is multiplied with O * K / 4 weights. Four rows at a time leave each
// lane with O * K sums; when they are added up over the K lanes, lane 4 g + t is left with unit g of row
// t.
template <int C, int O>
class Resident<float, C, O> {
    static constexpr int K = O >= 3 ? 8 : O == 2 ? 16 : 32;
    static constexpr int units = K / 4;  // of a lane
    static constexpr int step = 4 * K;   // values of the contraction read at a time
    static constexpr int steps = (C * chunk_size + step - 1) / step;

public:
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
                                                         ? weights_of(o, lane() / K * units + u, c)
                                                         : ChunkWeights<float>{};
                    from.template read<4>(k % chunk_size, weights_[s][o][u]);
                }
        }
    }

    __device__ __forceinline__ void multiply(const float* rows, int row_stride, int count,
                                             int chunks, float* sums, int output_stride) const {
        const float* own = rows + lane() % K * 4;
        const int length = chunks * chunk_size - lane() % K * 4;
#pragma unroll 1
        for (int row = 0; row < tile_rows && row < count; row += 4, own += 4 * row_stride) {
            float sum[O][K] = {};  // [units][4 rows] each
#pragma unroll
            for (int s = 0; s < steps; ++s) {
                if (s * step >= chunks * chunk_size) break;
                float a[4][4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const uint4 bits = read16(own + r * row_stride + s * step,
                                              s * step < length && row + r < count);
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
