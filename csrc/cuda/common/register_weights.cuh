// W_hh in registers: what the three classes that hold it there have in common.
//
// Every step multiplies with the same W_hh. So a warp reads its part of it once, before the first
// step, and keeps it in registers. The contraction is cut into chunks of 32 values.
//
//   class            used by                  a warp holds                    mma's operands
//   RegisterTile     persistent forward, and  8 or 16 units for a slice of    rows x weights,
//                    backward in 16 bits      the contraction                 16 rows at a time
//   RegisterColumns  persistent backward in   tiles of 16 columns of W_hh     weights x rows,
//                    float32 and TF32         for a slice of the contraction  8 rows at a time
//   RegisterUnits    one block, both passes   16 units for all of the         weights x rows,
//                                             contraction                     8 rows at a time
//
// In all three, lane 4 g + t (g = 0..7, t = 0..3) holds quarter t of every piece of the weights of
// "its" units or columns, which follow from g. A quarter is 16 bytes:
//
//            chunk of 32 values, 16 bits             chunk of 32 values, float32
//            piece 0                                 piece 0           piece 1
//          | t=0 8 | t=1 8 | t=2 8 | t=3 8 |       | 4 | 4 | 4 | 4 | 4 | 4 | 4 | 4 |
//
// mma itself assigns other positions of the contraction to a lane. Which ones is free as long as
// both operands agree: so the rows are read in the same quarters, 16 bytes at a time.
#pragma once
#include <string.h>

#include "math.cuh"

namespace fastrnn::cuda {

// The weights of a unit for one chunk, contiguous. Those from `count` on do not exist and read as
// 0.
template <class S>
struct WeightsRow {
    const S* first;
    int count;

    // 16 bytes of weights, starting with the k-th.
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

// The weights of a tile's units for one chunk, transposed: in rows `stride` apart, each with the
// weights of neighbouring units. Rows from `count` on and units from `units` on do not exist and
// read as 0.
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

// The type M that a product multiplies: a storage type, or float32 rounded to 10 bits of fraction.
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

// A value as an operand of a product.
template <class M>
__device__ __forceinline__ Stored<M> operand(float value) {
    if constexpr (std::is_same_v<M, Tf32>)
        return round_to_tf32(value);
    else
        return narrow<Stored<M>>(value);
}

// A lane's quarters of P pieces as operands of mma, in registers.
template <class M, int P, int n, int words>
__device__ __forceinline__ void pack_operands(const Stored<M> (&quarters)[P][n],
                                              uint32_t (&operands)[words]) {
    if constexpr (std::is_same_v<M, Tf32>) {
#pragma unroll
        for (int w = 0; w < words; ++w)
            operands[w] = __float_as_uint(round_to_tf32(quarters[w / n][w % n]));
    } else {
        memcpy(operands, quarters, sizeof quarters);
    }
    // Packs two values of 16 bits into a register here. The compiler would do so only after it has
    // loaded all weights.
#pragma unroll
    for (uint32_t& word : operands) asm volatile("" : "+r"(word));
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
    __trap();  // never launched there
#endif
#undef FASTRNN_MMA
}

}  // namespace fastrnn::cuda
