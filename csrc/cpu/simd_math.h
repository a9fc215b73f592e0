// sigmoid and tanh of SIMD vectors, to about one unit in the last place of float and double.
#pragma once
#include "simd.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class V>
FASTRNN_INLINE V at_most(V x, V limit) {
    return x > limit ? limit : x;  // in this order NaN passes through
}
template <class V>
FASTRNN_INLINE V at_least(V x, V limit) {
    return x < limit ? limit : x;
}

// exp(x) = 2^n exp(r) with n = round(x / ln 2). Above the largest finite result it is infinite, so
// that sigmoid reaches 0 where torch's does; below, 2^n is kept a normal number, which no sigmoid or
// tanh can tell from 0. The polynomials are Taylor's: on |r| <= ln(2) / 2 the remainder is far below
// the rounding of the sum.
FASTRNN_INLINE Vec<float> exponential(Vec<float> x) {
    typedef int32_t Int __attribute__((vector_size(vector_bytes)));
    constexpr float most = 88.7228f;
    const Vec<float> t = at_least(at_most(x, broadcast(most)), broadcast(-86.5f));
    // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the sum.
    const Vec<float> shifted = t * 1.44269504088896341f + 0x1.8p23f;
    const Vec<float> n = shifted - 0x1.8p23f;
    Vec<float> r = t - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec<float> p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    const Int exponent = (Int)shifted << 23;  // the constant's own bits leave at the top
    const Vec<float> result = (Vec<float>)((Int)p + exponent);
    return x > most ? broadcast(__builtin_inff()) : result;
}

FASTRNN_INLINE Vec<double> exponential(Vec<double> x) {
    typedef int64_t Int __attribute__((vector_size(vector_bytes)));
    constexpr double most = 709.7827;
    const Vec<double> t = at_least(at_most(x, broadcast(most)), broadcast(-707.0));
    const Vec<double> shifted = t * 1.4426950408889634073599 + 0x1.8p52;
    const Vec<double> n = shifted - 0x1.8p52;
    Vec<double> r = t - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    Vec<double> p = r * (1.0 / 6227020800) + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    const Vec<double> result = (Vec<double>)((Int)p + ((Int)shifted << 52));
    return x > most ? broadcast(__builtin_inf()) : result;
}

// tanh of |x| < 0.625, where 1 - 2 / (exp(2x) + 1) would cancel: Cephes' tanhf and tanh (Moshier).
FASTRNN_INLINE Vec<float> tanh_near_zero(Vec<float> x) {
    const Vec<float> z = x * x;
    Vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return p * z * x + x;
}

FASTRNN_INLINE Vec<double> tanh_near_zero(Vec<double> x) {
    const Vec<double> z = x * x;
    Vec<double> p = z * -9.64399179425052238628e-1 - 9.92877231001918586564e1;
    p = p * z - 1.61468768441708447952e3;
    Vec<double> q = z + 1.12811678491632931402e2;
    q = q * z + 2.23548839060100448583e3;
    q = q * z + 4.84406305325125486048e3;
    return x + x * z * (p / q);
}

template <class T>
struct SimdMath {
    using V = Vec<T>;

    static FASTRNN_INLINE V sigmoid(V x) { return T(1) / (T(1) + exponential(-x)); }

    static FASTRNN_INLINE V tanh(V x) {
        const V magnitude = x < T(0) ? -x : x;
        const V large = T(1) - T(2) / (exponential(magnitude + magnitude) + T(1));
        return magnitude < T(0.625) ? tanh_near_zero(x) : (x < T(0) ? -large : large);
    }
};

}  // namespace FASTRNN_ISA

template <>
struct Math<FASTRNN_ISA::Vec<float>> : FASTRNN_ISA::SimdMath<float> {};
template <>
struct Math<FASTRNN_ISA::Vec<double>> : FASTRNN_ISA::SimdMath<double> {};

}  // namespace fastrnn
