// How a product (panels.h) reads its two operands: what type a row has, what type a packed matrix has,
// and how they are multiplied. T is the type of the sums; `step` values of k are taken at once.
#pragma once
#include "choices.h"
#include "simd.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class T_>
struct Plain {
    using T = T_;
    using Row = T;
    using Packed = T;
    static constexpr int step = 1;
    static constexpr int64_t sum_length = cpu::forward_sum;
    static constexpr const char* name = "packed weights";

    static FASTRNN_INLINE Vec<T> weights(const T* p) { return load<T>(p, lanes<T>); }
    static FASTRNN_INLINE Vec<T> value(const T* p) { return broadcast(*p); }
    static FASTRNN_INLINE Vec<T> add(Vec<T> sum, Vec<T> value, Vec<T> weights) {
        return sum + value * weights;
    }
    // What `weights` is to read, of `step` vectors.
    static FASTRNN_INLINE void pack(T* p, const Vec<T>* v) { store<T>(p, v[0], lanes<T>); }
};

// 16-bit weights stay so, and half as many bytes are read: faster where a step does little more than
// to read them, slower where many rows would share one conversion beforehand. The same bits as Plain.
template <class T_, class S>
struct Compact : Plain<T_> {
    using T = T_;
    using Packed = S;
    static constexpr const char* name = "packed weights of 16 bits";

    static FASTRNN_INLINE Vec<T> weights(const S* p) { return load<T>(p, lanes<T>); }
    static FASTRNN_INLINE void pack(S* p, const Vec<T>* v) { store<T>(p, v[0], lanes<T>); }
};

#if defined(__AVX512F__)
// Pairs of bfloat16 by the instruction that multiplies and adds two at once: exact products, sums in
// float. It takes subnormal numbers for zeros.
struct BFloat16Pairs {
    using T = float;
    using Row = BFloat16;
    using Packed = BFloat16;
    static constexpr int step = 2;
    static constexpr int64_t sum_length = cpu::bfloat16_sum;
    static constexpr const char* name = "packed pairs of bfloat16";

    static bool supported() { return __builtin_cpu_supports("avx512bf16"); }

    static FASTRNN_INLINE Vec<float> weights(const BFloat16* p) {
        Vec<float> v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static FASTRNN_INLINE Vec<float> value(const BFloat16* p) {
        float pair;
        memcpy(&pair, p, sizeof pair);
        return (Vec<float>)_mm512_set1_ps(pair);
    }
    static FASTRNN_INLINE Vec<float> add(Vec<float> sum, Vec<float> value, Vec<float> weights) {
        // Written out: this file is compiled for CPUs that may lack it.
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(value), "v"(weights));
        return sum;
    }
    static FASTRNN_INLINE void pack(BFloat16* p, const Vec<float>* v) {
        const UInt32Vec pair = ((UInt32Vec)v[0] >> 16) | ((UInt32Vec)v[1] & 0xffff0000);
        memcpy(p, &pair, sizeof pair);
    }
};
#endif

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
