// Storage and arithmetic types on the device, and the functions that cells use.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "../../cells/cell.h"

namespace fastrnn {

template <>
struct Math<float> {
    // __fdividef is off by at most 2 units in the last place, and returns 0 if exp(-x) is infinite.
    static __device__ __forceinline__ float sigmoid(float x) {
        return __fdividef(1.0f, 1.0f + ::expf(-x));
    }
    static __device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }
    static __device__ __forceinline__ float exp(float x) { return ::expf(x); }
    static __device__ __forceinline__ float log(float x) { return ::logf(x); }
    static __device__ __forceinline__ float log1p(float x) { return ::log1pf(x); }
    static __device__ __forceinline__ float sqrt(float x) { return ::sqrtf(x); }
    static __device__ __forceinline__ float erf(float x) { return ::erff(x); }
    static __device__ __forceinline__ float abs(float x) { return ::fabsf(x); }
    static __device__ __forceinline__ float choose(bool condition, float yes, float no) {
        return condition ? yes : no;
    }
    static __device__ __forceinline__ float number(double value) {
        return static_cast<float>(value);
    }
};

template <>
struct Math<double> {
    static __device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }
    static __device__ __forceinline__ double tanh(double x) { return ::tanh(x); }
    static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
    static __device__ __forceinline__ double log(double x) { return ::log(x); }
    static __device__ __forceinline__ double log1p(double x) { return ::log1p(x); }
    static __device__ __forceinline__ double sqrt(double x) { return ::sqrt(x); }
    static __device__ __forceinline__ double erf(double x) { return ::erf(x); }
    static __device__ __forceinline__ double abs(double x) { return ::fabs(x); }
    static __device__ __forceinline__ double choose(bool condition, double yes, double no) {
        return condition ? yes : no;
    }
    static __device__ __forceinline__ double number(double value) {
        return static_cast<double>(value);
    }
};

namespace cuda {

template <class S>
struct ArithmeticOf {
    using type = float;
};
template <>
struct ArithmeticOf<double> {
    using type = double;
};
// The type that kernels compute in for values stored as S.
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class S>
__device__ __forceinline__ S narrow(Arithmetic<S> v) {
    if constexpr (sizeof(S) == sizeof(Arithmetic<S>))
        return v;
    else if constexpr (std::is_same_v<S, __half>)
        return __float2half_rn(v);
    else
        return __float2bfloat16_rn(v);
}

// Value i of an array of S; 0 if there is no array.
template <class S>
__device__ __forceinline__ S read(const void* array, int64_t i) {
    return array ? static_cast<const S*>(array)[i] : narrow<S>(0);
}

template <class S>
__device__ __forceinline__ Arithmetic<S> load(const void* array, int64_t i) {
    return widen(read<S>(array, i));
}

template <class S>
__device__ __forceinline__ void store(void* array, int64_t i, Arithmetic<S> v) {
    static_cast<S*>(array)[i] = narrow<S>(v);
}

}  // namespace cuda
}  // namespace fastrnn
