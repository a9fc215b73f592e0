// What is at a layer's pointers as tensors, for ATen's products; and the steps of a sequence in the
// order in which a direction takes them.
#pragma once
#include <ATen/ATen.h>

#include "../network.h"

namespace fastrnn::cuda {

using at::Tensor;

class Matrices {
public:
    explicit Matrices(const Problem& p)
        : stored_(at::TensorOptions(p.device).dtype(p.dtype)), arithmetic_(p.arithmetic) {}

    // [rows, columns] of the storage type at `data`, which stays its owner's.
    Tensor at(const void* data, int64_t rows, int64_t columns, int64_t stride) const {
        return at::for_blob(const_cast<void*>(data), {rows, columns})
            .strides({stride, 1})
            .options(stored_)
            .target_device(stored_.device())
            .make_tensor();
    }
    Tensor at(const void* data, int64_t rows, int64_t columns) const {
        return at(data, rows, columns, columns);
    }
    // The same for a vector.
    Tensor at(const void* data, int64_t count) const { return at(data, 1, count).squeeze(0); }
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
};

// Rows [first, first + count) of a matrix. Most often all of them, and then without a new tensor.
inline Tensor rows_of(const Tensor& matrix, int64_t first, int64_t count) {
    return first == 0 && count == matrix.size(0) ? matrix : matrix.narrow(0, first, count);
}

// out = a b. Not a.mm(b), which autocast would look at.
inline void multiply(Tensor out, const Tensor& a, const Tensor& b) { at::mm_out(out, a, b); }

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
