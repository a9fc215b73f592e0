// A GPU as a Device (../../device.h): the products of a layer by cuBLAS, the rest by the kernels of
// this folder. Nothing waits for the GPU or copies a value back from it. All of it runs on the
// caller's stream, in memory of torch's allocator, and can be captured in a CUDA graph.
#pragma once
#include "../../cells/registry.h"
#include "../../device.h"

namespace fastrnn::cuda {

void forward(const ForwardLayer& layer);
void backward(const BackwardLayer& layer);
Facts explain(const Layer& layer, Pass pass);

// The user's own cells have none yet.
inline bool has_kernels(int cell, Storage) { return cell < cell_count; }

inline constexpr Device device{.forward = forward,
                               .backward = backward,
                               .has_kernels = has_kernels,
                               .explain = explain,
                               .runs_models_in_parallel = nullptr,
                               .stores_gradients = true,
                               .output_may_be_h_n = false};

}  // namespace fastrnn::cuda
