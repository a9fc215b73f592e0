// Functions of SIMD vectors, most of them to about one unit in the last place of float and double.
#pragma once
#include <limits>

#include "simd.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// The constants of exp for a type. The polynomials are (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2,
// the highest power first: for float a Chebyshev fit with an error of 2.5e-8 r, for double
// Taylor's.
template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
    typedef int32_t Int __attribute__((vector_size(vector_bytes)));
    static constexpr int fraction_bits = 23;
    static constexpr int32_t one = 0x3f800000, magnitude = 0x7fffffff;
    static constexpr float round = 0x1.8p23f;  // adding it rounds, with the integer in the low bits
    // With fused multiply-adds one float is enough: its error is 2e-9, and |n| <= 127.
    static constexpr float ln2_high = fused ? 0.693147182f : 0.693359375f;
    static constexpr float ln2_low = fused ? 0 : -2.12194440e-4f;
    static constexpr float ln2_rest = fused ? -1.90465430e-9f : 0;  // what that leaves out
    static constexpr float most = 88;  // exp(most) and exp(-most) are normal numbers
    static constexpr float infinite = 89, zero = -104;  // what exp is at them
    // Whether 1 / exp(most), a subnormal number, is zero because subnormals.h makes those zeros.
#ifdef FASTRNN_X86
    static constexpr bool vanishes = true;
#else
    static constexpr bool vanishes = false;
#endif
    static constexpr float saturated = 20;  // tanh(saturated / 2) rounds to 1
    static constexpr float polynomial[] = {1.39336691e-3f, 8.36323900e-3f, 4.16664612e-2f,
                                           1.66665772e-1f, 0.5f};
};

template <>
struct ExpConstants<double> {
    typedef int64_t Int __attribute__((vector_size(vector_bytes)));
    static constexpr int fraction_bits = 52;
    static constexpr int64_t one = 0x3ff0000000000000, magnitude = 0x7fffffffffffffff;
    static constexpr double round = 0x1.8p52;
    static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
    static constexpr double ln2_rest = 0;
    static constexpr double most = 708;
    static constexpr double infinite = 710, zero = -746;
    static constexpr bool vanishes = false;
    static constexpr double saturated = 40;
    static constexpr double polynomial[] = {
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
        1.0 / 5040,       1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5};
};

// exp(x) = 2^n (1 + rest), n = round(x / ln 2); shifted = n + ExpConstants::round. NaN gives NaN.
template <class T, bool exact = false>
FASTRNN_INLINE void reduce_exponential(Vec<T> x, Vec<T>& shifted, Vec<T>& rest) {
    using C = ExpConstants<T>;
    shifted = x * T(1.4426950408889634073599) + C::round;
    const Vec<T> n = shifted - C::round;
    Vec<T> r = x - n * C::ln2_high;
    if constexpr (C::ln2_low != 0) r = r - n * C::ln2_low;
    if constexpr (exact && C::ln2_rest != 0) r = r - n * C::ln2_rest;
    // Two coefficients at a time, which has half the latency of Horner's rule.
    constexpr int count = sizeof C::polynomial / sizeof(T), first = count % 2;
    const Vec<T> r2 = r * r;
    Vec<T> p = first ? broadcast(C::polynomial[0]) : Vec<T>{};
#pragma GCC unroll 16
    for (int i = first; i < count; i += 2) {
        const Vec<T> pair = r * C::polynomial[i] + C::polynomial[i + 1];
        p = i == 0 ? pair : p * r2 + pair;
    }
    rest = p * r2 + r;
}

// 2^n, a normal number; shifted = n + ExpConstants::round.
template <class T>
FASTRNN_INLINE Vec<T> power_of_two(Vec<T> shifted) {
    using C = ExpConstants<T>;
    using Int = typename C::Int;
    return (Vec<T>)(((Int)shifted << C::fraction_bits) + C::one);
}

// exp(x) = scale (1 + rest) with scale = 2^n, n = round(x / ln 2), for |x| <= ExpConstants::most.
// NaN gives NaN.
template <class T>
FASTRNN_INLINE void split_exponential(Vec<T> x, Vec<T>& scale, Vec<T>& rest) {
    Vec<T> shifted;
    reduce_exponential<T>(x, shifted, rest);
    scale = power_of_two<T>(shifted);
}

// The constants of log for a type. The polynomials are Chebyshev fits to
// (log((1 + s) / (1 - s)) - 2 s) / s^3 in s^2, for (1 + s) / (1 - s) between sqrt(1/2) and sqrt(2).
template <class T>
struct LogConstants;

template <>
struct LogConstants<float> {
    typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));
    static constexpr uint32_t fraction = 0x007fffff, root_half = 0x3f3504f3;
    static constexpr int bias = 127;
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // n high is exact
    static constexpr float polynomial[] = {0.233310408f, 0.285507997f, 0.400001220f, 0.666666666f};
};

template <>
struct LogConstants<double> {
    typedef uint64_t Bits __attribute__((vector_size(vector_bytes)));
    static constexpr uint64_t fraction = 0x000fffffffffffff, root_half = 0x3fe6a09e667f3bcd;
    static constexpr int bias = 1023;
    static constexpr double ln2_high = 6.93147180369123816490e-1;
    static constexpr double ln2_low = 1.90821492927058770002e-10;
    static constexpr double polynomial[] = {
        0.146171283998072999, 0.153316666765971743, 0.181828907780261303, 0.222222111121049474,
        0.285714286261145183, 0.399999999998991979, 0.66666666666666697};
};

FASTRNN_INLINE Vec<float> square_root(Vec<float> x) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#elif defined(FASTRNN_NEON)
    return (Vec<float>)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < lanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}
FASTRNN_INLINE Vec<double> square_root(Vec<double> x) {
#if defined(__AVX512F__)
    return (Vec<double>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
    return (Vec<double>)_mm256_sqrt_pd((__m256d)x);
#elif defined(FASTRNN_NEON)
    return (Vec<double>)vsqrtq_f64((float64x2_t)x);
#else
    for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
#endif
}

// Not std::erf, an inline function that the linker could merge with another instruction set's.
FASTRNN_INLINE float error_function(float x) { return __builtin_erff(x); }
FASTRNN_INLINE double error_function(double x) { return __builtin_erf(x); }

template <class T>
struct SimdMath {
    using V = Vec<T>;
    using C = ExpConstants<T>;

    static FASTRNN_INLINE V sigmoid(V x) {
        V scale, rest;
        split_exponential<T>(-at_least(at_most(x, broadcast(C::most)), broadcast(-C::most)), scale,
                             rest);
        const V result = reciprocal(scale * rest + scale + T(1));
        // Zero where exp(-x) is infinite in torch.
        return C::vanishes ? result : x < -C::most ? V{} : result;
    }

    // u / (u + 2) with u = exp(2 |x|) - 1, computed without cancellation for small x.
    static FASTRNN_INLINE V tanh(V x) {
        using Int = typename C::Int;
        const V magnitude = (V)((Int)x & C::magnitude);
        V scale, rest;
        split_exponential<T>(at_most(magnitude + magnitude, broadcast(C::saturated)), scale, rest);
        const V u = scale * rest + (scale - T(1));
        return (V)((Int)quotient(u, u + T(2)) | ((Int)x & ~C::magnitude));
    }

    // Infinity where it overflows, zero where it underflows.
    static FASTRNN_INLINE V exp(V x) {
        V shifted, rest;
        x = at_least(at_most(x, broadcast(C::infinite)), broadcast(C::zero));
        reduce_exponential<T, true>(x, shifted, rest);
        // 2^n in two factors, because its exponent may be beyond those of normal numbers.
        const V n = shifted - C::round, half = n * T(0.5) + C::round;
        const V first = power_of_two<T>(half);
        const V second = power_of_two<T>(n - (half - C::round) + C::round);
        return (first * rest + first) * second;
    }

    // x = 2^n (1 + f), with 1 + f between sqrt(1/2) and sqrt(2). Subnormal numbers count as zeros.
    static FASTRNN_INLINE V log(V x) {
        using L = LogConstants<T>;
        using Bits = typename L::Bits;
        const Bits bits = (Bits)x + (Bits{} + C::one - L::root_half);
        const Bits exponent = (bits >> C::fraction_bits) | (Bits)broadcast(C::round);
        const V n = (V)exponent - (C::round + L::bias);
        const V f = (V)((bits & L::fraction) + L::root_half) - T(1);
        const V s = f / (f + T(2)), z = s * s;
        V p = broadcast(L::polynomial[0]);
        constexpr int count = sizeof L::polynomial / sizeof(T);
#pragma GCC unroll 16
        for (int i = 1; i < count; ++i) p = p * z + L::polynomial[i];
        // log(1 + f) = f - (f^2 / 2 - s (f^2 / 2 + z p)): f itself has no rounding error.
        const V square = f * f * T(0.5);
        V result = n * L::ln2_high - ((square - (s * (square + p * z) + n * L::ln2_low)) - f);
        using Limits = std::numeric_limits<T>;
        result = x <= Limits::max() ? result : x;  // infinity and NaN
        result = x < Limits::min() ? broadcast(-Limits::infinity()) : result;
        return x < T(0) ? broadcast(Limits::quiet_NaN()) : result;
    }

    // log(1 + x): the rounding error of u = 1 + x is corrected as Kahan does, by x / (u - 1).
    static FASTRNN_INLINE V log1p(V x) {
        const V u = x + T(1), rounded = u - T(1);
        const V result = rounded == T(0) ? x : log(u) * (x / rounded);
        return x <= std::numeric_limits<T>::max() ? result : x;
    }

    static FASTRNN_INLINE V sqrt(V x) { return square_root(x); }

    // Slow: a call of the C library for each lane.
    static FASTRNN_INLINE V erf(V x) {
        for (int i = 0; i < lanes<T>; ++i) x[i] = error_function(x[i]);
        return x;
    }

    static FASTRNN_INLINE V abs(V x) { return (V)((typename C::Int)x & C::magnitude); }

    template <class Condition>
    static FASTRNN_INLINE V choose(Condition condition, V yes, V no) {
        return condition ? yes : no;
    }

    static FASTRNN_INLINE V number(double value) { return broadcast(static_cast<T>(value)); }
};

}  // namespace FASTRNN_ISA

template <>
struct Math<FASTRNN_ISA::Vec<float>> : FASTRNN_ISA::SimdMath<float> {};
template <>
struct Math<FASTRNN_ISA::Vec<double>> : FASTRNN_ISA::SimdMath<double> {};

}  // namespace fastrnn
