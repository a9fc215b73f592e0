#include "product.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/Exceptions.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>

namespace fastrnn::cuda {
namespace {

cudaDataType type_of(Storage storage) {
    switch (storage) {
        case Storage::float32: return CUDA_R_32F;
        case Storage::float64: return CUDA_R_64F;
        case Storage::bfloat16: return CUDA_R_16BF;
        default: return CUDA_R_16F;
    }
}

cublasComputeType_t compute_type(const Problem& p) {
    if (p.storage == Storage::float64) return CUBLAS_COMPUTE_64F;
    return tf32_allowed(p) ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

}  // namespace

bool tf32_allowed(const Problem& p) {
    const at::Context& context = at::globalContext();
    return p.storage == Storage::float32 &&
           (p.steps == 1 ? context.allowTF32CuBLAS() : context.allowTF32CuDNN(at::Float32Op::RNN));
}

Products::Products(const Problem& p)
    : handle_(at::cuda::getCurrentCUDABlasHandle()),
      stream_(c10::cuda::getCurrentCUDAStream()),
      type_(type_of(p.storage)),
      compute_(compute_type(p)) {
    TORCH_CUDABLAS_CHECK(cublasGetMathMode(handle_, &math_mode_));
    // Neither at::mm's setting for TF32, nor partial sums in 16 bits.
    TORCH_CUDABLAS_CHECK(cublasSetMathMode(
        handle_, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH |
                                           CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
}

Products::~Products() { cublasSetMathMode(handle_, math_mode_); }

void Products::multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool add) const {
    const int64_t rows = out.rows, columns = out.columns, inner = a.transposed ? a.rows : a.columns;
    if (rows == 0 || columns == 0) return;
    if (inner == 0) {  // cuBLAS would not write `out`
        if (!add)
            C10_CUDA_CHECK(cudaMemset2DAsync(out.data, out.stride * out.element, 0,
                                             columns * out.element, rows, stream_));
        return;
    }
    const int64_t largest = std::max({rows, columns, inner, out.stride, a.stride, b.stride});
    TORCH_CHECK(largest <= std::numeric_limits<int>::max(), "a product of [", rows, ", ", inner,
                "] and [", inner, ", ", columns, "] with rows up to ",
                std::max({out.stride, a.stride, b.stride}), " apart is too large for cuBLAS");
    const auto number = [](int64_t n) { return static_cast<int>(n); };
    const auto operation = [](const Matrix& m) { return m.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
    // alpha and beta have the type of the sums.
    const float single[] = {0, 1};
    const double twice[] = {0, 1};
    const bool wide = compute_ == CUBLAS_COMPUTE_64F;
    const void* alpha = wide ? static_cast<const void*>(twice + 1) : single + 1;
    const void* beta = wide ? static_cast<const void*>(twice + add) : single + add;
    // cuBLAS is column-major, so that it sees all of these transposed: out' = b' a'.
    TORCH_CUDABLAS_CHECK(cublasGemmEx(
        handle_, operation(b), operation(a), number(columns), number(rows), number(inner), alpha,
        b.data, type_, number(b.stride), a.data, type_, number(a.stride), beta, out.data, type_,
        number(out.stride), compute_, CUBLAS_GEMM_DEFAULT));
}

}  // namespace fastrnn::cuda
