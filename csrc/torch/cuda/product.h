// Products of matrices by calls of cuBLAS. at::mm would take the host longer than a step takes the
// device, and float32 would follow another of torch's settings than in torch's layer.
#pragma once
#include <cublas_v2.h>

#include "../problem.h"

namespace fastrnn::cuda {

// A view of rows of the storage type, to be read in memory order or transposed.
struct Matrix {
    char* data;
    int64_t rows, columns;  // in memory
    int64_t stride;         // between rows, in elements; at least `columns`
    int64_t element;        // bytes of one
    bool transposed = false;

    Matrix t() const { return {data, rows, columns, stride, element, !transposed}; }
    // Rows, or columns, [first, first + count) of a matrix that is not transposed.
    Matrix some_rows(int64_t first, int64_t count) const {
        return {data + first * stride * element, count, columns, stride, element};
    }
    Matrix some_columns(int64_t first, int64_t count) const {
        return {data + first * element, rows, count, stride, element};
    }
};

// Whether products of float32 may round their operands to TF32, by the setting that torch's own
// layer follows: that of cuDNN, torch.backends.cudnn.allow_tf32 or its finer successors. For a
// single step by that of torch's cells: torch.backends.cuda.matmul.
bool tf32_allowed(const Problem& problem);

// The products of one call of a layer, on the current device and stream. Sums are of float (or
// double for float64) for every type. None waits for the device, and all can be captured in a
// graph: the handle and the workspace are torch's.
class Products {
public:
    explicit Products(const Problem& problem);
    ~Products();
    Products(const Products&) = delete;
    Products& operator=(const Products&) = delete;

    // out = a b, or out += a b; `out` is not transposed.
    void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool add = false) const;

private:
    cublasHandle_t handle_;
    cublasMath_t math_mode_;  // of the handle as it was found
    cudaStream_t stream_;
    cudaDataType type_;
    cublasComputeType_t compute_;
};

}  // namespace fastrnn::cuda
