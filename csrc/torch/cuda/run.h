// A GPU as a Device (../../device.h): the products of a layer by cuBLAS, the rest by the kernels of
// this folder. Nothing waits for the GPU or copies a value back from it. All of it runs on the
// caller's stream, in memory of torch's allocator, and can be captured in a CUDA graph.
#pragma once
#include "../../cells/registry.h"
#include "../../cuda/own_cell.h"
#include "../../device.h"

namespace fastrnn::cuda {

void forward(const ForwardLayer& layer);
void backward(const BackwardLayer& layer);
Facts explain(const Layer& layer, Pass pass);

inline bool has_kernels(int cell, Storage storage) {
    return cell < cell_count || own_kernels(cell, storage);
}

inline constexpr Device device{.forward = forward,
                               .backward = backward,
                               .has_kernels = has_kernels,
                               .explain = explain,
                               .runs_models_in_parallel = nullptr,
                               .stores_gradients = true,
                               .output_may_be_h_n = false};

}  // namespace fastrnn::cuda
