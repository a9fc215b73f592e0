// A layer's pointers as matrices for products, and as tensors for ATen.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

#include "../problem.h"
#include "product.h"

namespace fastrnn::cuda {

using at::Tensor;

class Matrices {
public:
    explicit Matrices(const Problem& p)
        : stored_(at::TensorOptions(p.device).dtype(p.dtype)),
          arithmetic_(p.arithmetic),
          element_(static_cast<int64_t>(c10::elementSize(p.dtype))) {}

    // A view of the [rows, columns] values of the storage type at `data`.
    Matrix at(const void* data, int64_t rows, int64_t columns, int64_t stride) const {
        return {static_cast<char*>(const_cast<void*>(data)), rows, columns, stride, element_};
    }
    Matrix at(const void* data, int64_t rows, int64_t columns) const {
        return at(data, rows, columns, columns);
    }
    Matrix of(const Tensor& t) const { return at(t.const_data_ptr(), t.size(0), t.size(1)); }
    Tensor tensor(const void* data, at::IntArrayRef sizes) const {
        return at::for_blob(const_cast<void*>(data), sizes)
            .options(stored_)
            .target_device(stored_.device())
            .make_tensor();
    }
    // New tensors, of the storage type, and of the arithmetic type.
    Tensor stored(int64_t rows, int64_t columns) const {
        return at::empty({rows, columns}, stored_);
    }
    Tensor arithmetic(int64_t rows, int64_t columns) const {
        return at::empty({rows, columns}, stored_.dtype(arithmetic_));
    }

private:
    at::TensorOptions stored_;
    at::ScalarType arithmetic_;
    int64_t element_;
};

// Takes the host a few microseconds less than copy_.
inline void copy(const Matrix& to, const Matrix& from, cudaStream_t stream) {
    const int64_t width = from.columns * from.element;
    C10_CUDA_CHECK(to.stride == from.columns && from.stride == from.columns
                       ? cudaMemcpyAsync(to.data, from.data, from.rows * width,
                                         cudaMemcpyDeviceToDevice, stream)
                       : cudaMemcpy2DAsync(to.data, to.stride * to.element, from.data,
                                           from.stride * from.element, width, from.rows,
                                           cudaMemcpyDeviceToDevice, stream));
}

}  // namespace fastrnn::cuda
