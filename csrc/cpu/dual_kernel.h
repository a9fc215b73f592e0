// The interface of the kernels of double backward (dual.h), which torch/double_backward.cpp calls.
//
// They compute with dual numbers: a value and its tangent, the derivative in one direction. An
// array of rows of them is [rows, 2, width]: the values of a row, then its tangents. So its values
// alone, or its tangents, are rows that are 2 * width apart.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../api.h"

namespace fastrnn::cpu {

template <class T>
struct DualRows {
    T* first;
    int64_t width;

    T* values(int64_t row) const { return first + 2 * row * width; }
    T* tangents(int64_t row) const { return values(row) + width; }
    DualRows from(int64_t row) const { return {values(row), width}; }
};

// A cell's step for some rows, without its products. What the cell has not is not read.
template <class T>
struct DualStep {
    int64_t rows, hidden;
    DualRows<T> h_prev, c_prev, h, c;  // [H]
    DualRows<T> saved;                 // [saved * H]
    // Of forward.
    DualRows<T> x, r;            // [G * H]: the products, without biases
    DualRows<T> bias_x, bias_r;  // one row of [G * H]
    // Of backward. dc is that of c_t, and then that of c_{t-1}.
    DualRows<T> dh, dc;   // [H]
    DualRows<T> dx, dr;   // [G * H], in the order of the gates; may be the same
    DualRows<T> dh_prev;  // [H], or null: not through W_hh
};

template <class T>
struct DualKernel {
    void (*forward)(const DualStep<T>&);
    void (*backward)(const DualStep<T>&);
    bool same_gradients;  // whether dx and dr are equal

    // A matrix w [depth, columns], packed: of rows `stride` apart, or transposed, of contiguous
    // rows of `depth` values.
    size_t (*packed_size)(int64_t depth, int64_t columns);
    void (*pack)(const T* w, int64_t stride, bool transposed, int64_t depth, int64_t columns,
                 T* packed);
    // out (+)= a w, for rows of a and out that are so far apart.
    void (*multiply)(const T* packed, int64_t depth, int64_t columns, const T* a, int64_t a_stride,
                     int64_t rows, T* out, int64_t out_stride, bool add);

    // The sum over `rows` rows of a' b, for the columns [first, last) of a: out[i] (+)= sum over n
    // of a[n][i] * b[n]. scratch: outer_scratch(columns) values.
    size_t (*outer_scratch)(int64_t columns);
    void (*add_outer)(const T* a, int64_t a_stride, int64_t first, int64_t last, const T* b,
                      int64_t b_stride, int64_t columns, int64_t rows, T* out, bool add,
                      T* scratch);

    // out[i] = the sum of rows[n][i] over n, for the columns [first, last).
    void (*sum_rows)(const T* rows, int64_t stride, int64_t count, int64_t first, int64_t last,
                     T* out);
};

// Those of the cell with index `cell` in the registry, for the instruction set in use.
template <class T>
const DualKernel<T>& dual_kernel(int cell);
template <>
FASTRNN_API const DualKernel<float>& dual_kernel(int cell);
template <>
FASTRNN_API const DualKernel<double>& dual_kernel(int cell);

}  // namespace fastrnn::cpu
