// What is at a layer's pointers: as matrices for products, as tensors for what is left to ATen; and
// the steps of a sequence in the order in which a direction takes them.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

#include "../torch/network.h"
#include "product.h"

namespace fastrnn::cuda {

using at::Tensor;

class Matrices {
public:
    explicit Matrices(const Problem& p)
        : stored_(at::TensorOptions(p.device).dtype(p.dtype)),
          arithmetic_(p.arithmetic),
          element_(static_cast<int64_t>(c10::elementSize(p.dtype))) {}

    // [rows, columns] of the storage type at `data`, which stays its owner's.
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
    // New ones, of the storage type, and of the arithmetic type.
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

// For a few microseconds less of the host than copy_.
inline void copy(const Matrix& to, const Matrix& from, cudaStream_t stream) {
    const int64_t width = from.columns * from.element;
    C10_CUDA_CHECK(to.stride == from.columns && from.stride == from.columns
                       ? cudaMemcpyAsync(to.data, from.data, from.rows * width,
                                         cudaMemcpyDeviceToDevice, stream)
                       : cudaMemcpy2DAsync(to.data, to.stride * to.element, from.data,
                                           from.stride * from.element, width, from.rows,
                                           cudaMemcpyDeviceToDevice, stream));
}

// The rows of one step, of which there are none before the first and after the last.
struct StepRows {
    int64_t row = 0;   // the first
    int64_t rows = 0;  // how many
};

// Of the i-th step that direction 0 (in time) or 1 (against it) takes in the forward pass.
inline StepRows step_rows(const fastrnn::Sequence& s, int direction, int64_t i) {
    if (i < 0 || i >= s.steps) return {};
    const int64_t t = direction == 0 ? i : s.steps - 1 - i;
    return {s.offsets[t], s.batch_sizes[t]};
}

}  // namespace fastrnn::cuda
