// sigmoid and tanh of SIMD vectors, to about one unit in the last place of float and double.
#pragma once
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
    static constexpr float most = 88;  // exp(most) and exp(-most) are normal numbers
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
    static constexpr double most = 708;
    static constexpr bool vanishes = false;
    static constexpr double saturated = 40;
    static constexpr double polynomial[] = {
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
        1.0 / 5040,       1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5};
};

// exp(x) = scale (1 + rest) with scale = 2^n, n = round(x / ln 2), for |x| <= ExpConstants::most.
// NaN gives NaN.
template <class T>
FASTRNN_INLINE void split_exponential(Vec<T> x, Vec<T>& scale, Vec<T>& rest) {
    using C = ExpConstants<T>;
    const Vec<T> shifted = x * T(1.4426950408889634073599) + C::round;
    const Vec<T> n = shifted - C::round;
    Vec<T> r = x - n * C::ln2_high;
    if constexpr (C::ln2_low != 0) r = r - n * C::ln2_low;
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
    using Int = typename C::Int;
    scale = (Vec<T>)(((Int)shifted << C::fraction_bits) + C::one);
}

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

    template <class Condition>
    static FASTRNN_INLINE V choose(Condition condition, V yes, V no) {
        return condition ? yes : no;
    }
};

}  // namespace FASTRNN_ISA

template <>
struct Math<FASTRNN_ISA::Vec<float>> : FASTRNN_ISA::SimdMath<float> {};
template <>
struct Math<FASTRNN_ISA::Vec<double>> : FASTRNN_ISA::SimdMath<double> {};

}  // namespace fastrnn
