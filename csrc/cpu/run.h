// The CPU as a Device (../device.h): a layer's kernel, run by as many threads as it is worth.
#pragma once
#include "../device.h"

namespace fastrnn::cpu {

FASTRNN_API void forward(const ForwardLayer& layer);
FASTRNN_API void backward(const BackwardLayer& layer);
FASTRNN_API Facts explain(const Layer& layer, Pass pass);
FASTRNN_API bool has_kernel(int cell, Storage storage);
FASTRNN_API bool runs_models_in_parallel(const Models& models, int threads);

inline constexpr Device device{
    .forward = forward,
    .backward = backward,
    .has_kernels = has_kernel,
    .explain = explain,
    .runs_models_in_parallel = runs_models_in_parallel,
    .stores_gradients = false,
    .output_may_be_h_n = true,
};

}  // namespace fastrnn::cpu
