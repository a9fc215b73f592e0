// SIMD vectors: the vector extensions of GCC and clang, and loads and stores of every storage type.
// Vectors have the native width of the instruction set this file is compiled for; with any other
// width the compiler's code is a fraction as fast.
//
// The kernels live in a namespace of their instruction set, FASTRNN_ISA, so that the linker cannot
// merge two differently compiled copies of a function.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(FASTRNN_NEON)
#include <arm_neon.h>
#endif

#include "../cells/cell.h"

#define FASTRNN_INLINE inline __attribute__((always_inline))

namespace fastrnn {
namespace FASTRNN_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int vector_registers = 32;
constexpr bool fused = true;  // multiply_add rounds once
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int vector_registers = 16;
constexpr bool fused = true;
#elif defined(FASTRNN_NEON)
constexpr int vector_bytes = 16;
constexpr int vector_registers = 32;
constexpr bool fused = true;
#else
constexpr int vector_bytes = 16;
constexpr int vector_registers = 16;
constexpr bool fused = false;
#endif
// Whether an instruction multiplies a vector by one lane of another. x86 multiplies by a value in
// memory instead, which takes no register.
#if defined(FASTRNN_NEON)
constexpr bool multiplies_by_lane = true;
#else
constexpr bool multiplies_by_lane = false;
#endif
#if defined(FASTRNN_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FASTRNN_NEON_BF16
#endif
// Whether an instruction multiplies pairs of bfloat16. The instruction sets that have it have no
// other kernels than those of bfloat16.
#if defined(__AVX512BF16__) || defined(FASTRNN_NEON_BF16)
#define FASTRNN_BFLOAT16_PAIRS
#endif

// 16-bit storage types. Arithmetic is always done in float.
struct BFloat16 {
    static constexpr bool is_bfloat16 = true;
    uint16_t bits;
};
struct Half {
    static constexpr bool is_bfloat16 = false;
    uint16_t bits;
};

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int lanes = vector_bytes / sizeof(T);

// Prefetch the line of p into the L2 cache, for reading; or into this core's, for writing. GCC
// considers a function or lambda of nothing but __builtin_prefetch to be without effects and drops
// the calls of it. The empty asm statement is an effect.
FASTRNN_INLINE void prefetch(const void* p) {
    __builtin_prefetch(p, 0, 2);
    asm volatile("");
}
FASTRNN_INLINE void prefetch_for_write(void* p) {
    __builtin_prefetch(p, 1);
    asm volatile("");
}

// GCC would load v again for each multiply-add that uses it, as its memory operand.
template <class V>
FASTRNN_INLINE void load_once([[maybe_unused]] V& v) {
#if defined(__AVX2__)
    if constexpr (sizeof(V) == vector_bytes) asm("" : "+x"(v));
#endif
}

template <class T>
FASTRNN_INLINE Vec<T> broadcast(T value) {
    return value - Vec<T>{};
}

// sum + a * b, rounded once if the instruction set can. An intrinsic, because a compiler may
// contract `sum + a * b` to one rounding in one branch and not in another.
FASTRNN_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(FASTRNN_NEON)
    return (Vec<float>)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}
FASTRNN_INLINE Vec<double> multiply_add(Vec<double> sum, Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
    return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__AVX2__)
    return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#elif defined(FASTRNN_NEON)
    return (Vec<double>)vfmaq_f64((float64x2_t)sum, (float64x2_t)a, (float64x2_t)b);
#else
    return sum + a * b;
#endif
}
#if defined(FASTRNN_NEON)
// sum + a * b[Lane], rounded once.
template <int Lane>
FASTRNN_INLINE Vec<float> multiply_add_lane(Vec<float> sum, Vec<float> a, Vec<float> b) {
    return (Vec<float>)vfmaq_laneq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b, Lane);
}
template <int Lane>
FASTRNN_INLINE Vec<double> multiply_add_lane(Vec<double> sum, Vec<double> a, Vec<double> b) {
    return (Vec<double>)vfmaq_laneq_f64((float64x2_t)sum, (float64x2_t)a, (float64x2_t)b, Lane);
}
#endif

// The smaller and the larger of x and a limit. A NaN in x is returned.
FASTRNN_INLINE Vec<float> at_most(Vec<float> x, Vec<float> limit) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_min_ps((__m512)limit, (__m512)x);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_min_ps((__m256)limit, (__m256)x);
#elif defined(FASTRNN_NEON)
    return (Vec<float>)vminq_f32((float32x4_t)x, (float32x4_t)limit);
#else
    return limit < x ? limit : x;
#endif
}
FASTRNN_INLINE Vec<float> at_least(Vec<float> x, Vec<float> limit) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_max_ps((__m512)limit, (__m512)x);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_max_ps((__m256)limit, (__m256)x);
#elif defined(FASTRNN_NEON)
    return (Vec<float>)vmaxq_f32((float32x4_t)x, (float32x4_t)limit);
#else
    return limit > x ? limit : x;
#endif
}
FASTRNN_INLINE Vec<double> at_most(Vec<double> x, Vec<double> limit) {
    return limit < x ? limit : x;
}
FASTRNN_INLINE Vec<double> at_least(Vec<double> x, Vec<double> limit) {
    return limit > x ? limit : x;
}

// 1 / x to one unit in the last place, for 1 <= |x| < 2^126; and a / x, which is at most 1 for a <=
// x.
FASTRNN_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
    // A division takes as long as ten multiplications. 14 bits and one step of Newton's method give
    // all 24.
    const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)x);
    return r + r * (1.0f - x * r);
#else
    return 1.0f / x;
#endif
}
FASTRNN_INLINE Vec<float> quotient(Vec<float> a, Vec<float> x) {
#if defined(__AVX512F__)
    const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)x), q = a * r;
    return q + r * (a - q * x);  // approaches from below
#else
    return a / x;
#endif
}
FASTRNN_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }
FASTRNN_INLINE Vec<double> quotient(Vec<double> a, Vec<double> x) { return a / x; }

// load<T>(p, n): the first n <= lanes<T> values at p, and zeros. store<T>(p, v, n) stores the first
// n. T is the arithmetic type, the pointer's type the storage type. n is nearly always lanes<T>:
// that branch costs nothing, and the other is slower.
//
//     p:  | a | b | c | ...        load<T>(p, 3):  | a | b | c | 0 | 0 | 0 | 0 | 0 |

template <class T>
FASTRNN_INLINE Vec<T> load(const T* p, int n) {
    Vec<T> v{};
    if (n == lanes<T>) {
        memcpy(&v, p, sizeof v);
        return v;
    }
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
    else
        return (Vec<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#else
    T lane[lanes<T>] = {};
    for (int i = 0; i < n; ++i) lane[i] = p[i];
    memcpy(&v, lane, sizeof v);
    return v;
#endif
}

template <class T>
FASTRNN_INLINE void store(T* p, Vec<T> v, int n) {
    if (n == lanes<T>) {
        memcpy(p, &v, sizeof v);
        return;
    }
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
    else
        _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#else
    for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

constexpr int float_lanes = lanes<float>;
typedef uint32_t UInt32Vec __attribute__((vector_size(vector_bytes)));
typedef uint16_t UInt16Vec __attribute__((vector_size(vector_bytes / 2)));

// GCC 12 compiles __builtin_convertvector to five instructions instead of this one.
FASTRNN_INLINE UInt32Vec widened(UInt16Vec v) {
#if defined(__AVX512F__)
    return (UInt32Vec)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (UInt32Vec)_mm256_cvtepu16_epi32((__m128i)v);
#elif defined(FASTRNN_NEON)
    return (UInt32Vec)vmovl_u16((uint16x4_t)v);
#else
    return __builtin_convertvector(v, UInt32Vec);
#endif
}

// The lower 16 bits of each lane.
FASTRNN_INLINE UInt16Vec narrowed(UInt32Vec v) {
#if defined(__AVX512F__)
    return (UInt16Vec)_mm512_cvtepi32_epi16((__m512i)v);
#else
    return __builtin_convertvector(v, UInt16Vec);
#endif
}

FASTRNN_INLINE UInt16Vec load_bits(const void* p, int n) {
    UInt16Vec bits{};
    if (n == float_lanes)
        memcpy(&bits, p, sizeof bits);
    else
        for (int i = 0; i < n; ++i) bits[i] = static_cast<const uint16_t*>(p)[i];
    return bits;
}

FASTRNN_INLINE void store_bits(void* p, UInt16Vec bits, int n) {
    if (n == float_lanes)
        memcpy(p, &bits, sizeof bits);
    else
        for (int i = 0; i < n; ++i) static_cast<uint16_t*>(p)[i] = bits[i];
}

template <class T>
FASTRNN_INLINE Vec<float> load(const BFloat16* p, int n) {
    return (Vec<float>)(widened(load_bits(p, n)) << 16);
}

template <class T>
FASTRNN_INLINE void store(BFloat16* p, Vec<float> v, int n) {
#if defined(FASTRNN_NEON_BF16)
    store_bits(p, (UInt16Vec)vcvt_bf16_f32((float32x4_t)v), n);
#else
    const UInt32Vec bits = (UInt32Vec)v;
    // Round to nearest, ties to even; a NaN stays a (quiet) NaN.
    const UInt32Vec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const UInt32Vec result = v == v ? rounded : (bits >> 16) | 0x40;
    store_bits(p, narrowed(result), n);
#endif
}

#if !defined(__AVX2__) && !defined(FASTRNN_NEON)
// float <-> half without instructions for it, where subnormal floats may be treated as zeros.
FASTRNN_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    uint32_t bits;
    if (magnitude >= 0x7c00) {
        bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
    } else if (magnitude < 0x400) {
        const float f = magnitude * 0x1p-24f;
        memcpy(&bits, &f, 4);
    } else {
        bits = (magnitude << 13) + 0x38000000;
    }
    bits |= sign;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

FASTRNN_INLINE uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint16_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65520 or more
    if (bits < 0x38800000) {                       // a subnormal half: an addition rounds it
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;  // one unit of 0.5f's last place is the smallest half
        memcpy(&bits, &magnitude, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    return sign | (uint16_t)((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
}
#endif

template <class T>
FASTRNN_INLINE Vec<float> load(const Half* p, int n) {
    const UInt16Vec bits = load_bits(p, n);
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#elif defined(FASTRNN_NEON)
    return (Vec<float>)vcvt_f32_f16((float16x4_t)bits);
#else
    Vec<float> v;
    for (int i = 0; i < float_lanes; ++i) v[i] = half_to_float(bits[i]);
    return v;
#endif
}

template <class T>
FASTRNN_INLINE void store(Half* p, Vec<float> v, int n) {
#if defined(__AVX512F__)
    store_bits(p, (UInt16Vec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT), n);
#elif defined(__AVX2__)
    store_bits(p, (UInt16Vec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT), n);
#elif defined(FASTRNN_NEON)
    store_bits(p, (UInt16Vec)vcvt_f16_f32((float32x4_t)v), n);
#else
    UInt16Vec bits;
    for (int i = 0; i < float_lanes; ++i) bits[i] = float_to_half(v[i]);
    store_bits(p, bits, n);
#endif
}

// v, stored as S and loaded.
template <class T, class S>
FASTRNN_INLINE Vec<T> rounded_to(Vec<T> v) {
    if constexpr (sizeof(T) == sizeof(S)) {
        return v;
    } else {
        S stored[lanes<T>];
        store<T>(stored, v, lanes<T>);
        return load<T>(stored, lanes<T>);
    }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
