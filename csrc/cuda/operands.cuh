// What the persistent kernels multiply: weights as they lie in memory, and the tensor cores' product.
#pragma once
#include <string.h>

#include "math.cuh"

namespace fastrnn::cuda {

// A unit's weights of one chunk, side by side. Those from `count` on are none, and 0.
template <class S>
struct WeightsRow {
    const S* first;
    int count;

    // 16 bytes of weights, from k on.
    __device__ __forceinline__ void read16(int k, void* to) const {
        constexpr int n = 16 / sizeof(S);
        const S* from = first + k;
        if (k + n <= count && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
            *static_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            return;
        }
        S some[n];
        for (int i = 0; i < n; ++i) some[i] = k + i < count ? from[i] : narrow<S>(0);
        memcpy(to, some, sizeof some);
    }
};

// The weights of a tile's units of one chunk, in rows `stride` apart that have the units side by
// side. Those from `count` and from unit `units` on are none, and 0.
template <class S>
struct WeightsColumns {
    const S* first;
    int stride, count, units;

    // Weight k of units [unit, unit + n).
    template <int n>
    __device__ __forceinline__ void read(int k, int unit, S* to) const {
        using Some = std::conditional_t<n * sizeof(S) == 16, uint4,
                                        std::conditional_t<n * sizeof(S) == 8, uint2, uint32_t>>;
        static_assert(sizeof(Some) == n * sizeof(S));
        const S* from = first + int64_t(k) * stride + unit;
        const int there = k < count ? units - unit : 0;
        if (there >= n && reinterpret_cast<uintptr_t>(from) % sizeof(Some) == 0) {
            const Some some = *reinterpret_cast<const Some*>(from);
            memcpy(to, &some, sizeof some);
            return;
        }
        for (int i = 0; i < n; ++i) to[i] = i < there ? from[i] : narrow<S>(0);
    }
};

// What a product multiplies: a storage type, or float32 rounded to 10 bits of fraction.
struct Tf32 {};
template <class M>
using Stored = std::conditional_t<std::is_same_v<M, Tf32>, float, M>;

__device__ __forceinline__ float round_to_tf32(float value) {
    uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
    return __uint_as_float(bits);
}

// A value as it is multiplied.
template <class M>
__device__ __forceinline__ Stored<M> operand(float value) {
    if constexpr (std::is_same_v<M, Tf32>)
        return round_to_tf32(value);
    else
        return narrow<Stored<M>>(value);
}

// Weights as mma takes them, in a lane's registers. run: P pieces of 16 bytes.
template <class M, int P, int n, int words>
__device__ __forceinline__ void keep_operands(const Stored<M> (&run)[P][n],
                                              uint32_t (&kept)[words]) {
    if constexpr (std::is_same_v<M, Tf32>) {
#pragma unroll
        for (int w = 0; w < words; ++w) kept[w] = __float_as_uint(round_to_tf32(run[w / n][w % n]));
    } else {
        memcpy(kept, run, sizeof run);
    }
    // Two of 16 bits to a register from here on: the compiler would do it once all are there.
#pragma unroll
    for (uint32_t& word : kept) asm volatile("" : "+r"(word));
}

// sum [16, 8] += a [16, k] b [k, 8]; k: 16 of 16 bits, or 8 of TF32
template <class M>
__device__ __forceinline__ void mma(float* sum, const uint4& a, const uint32_t* b) {
#define FASTRNN_MMA(shape, type)                                               \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type                \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]))
#if __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<M, __half>)
        FASTRNN_MMA("m16n8k16", "f16");
    else if constexpr (std::is_same_v<M, Tf32>)
        FASTRNN_MMA("m16n8k8", "tf32");
    else
        FASTRNN_MMA("m16n8k16", "bf16");
#else
    __trap();  // the plan does not choose these kernels there
#endif
#undef FASTRNN_MMA
}

}  // namespace fastrnn::cuda
