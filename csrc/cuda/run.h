// A GPU as a Device (../network.h): the products of a layer by cuBLAS, the rest by the kernels of
// this folder. Nothing waits for the GPU or copies a value back from it. All of it runs on the
// caller's stream, in memory of torch's allocator, and can be captured in a CUDA graph.
#pragma once
#include "../torch/network.h"

namespace fastrnn::cuda {

void forward(const Problem& problem, const ForwardLayer& layer);
void backward(const Problem& problem, const BackwardLayer& layer);
Facts explain(const Problem& problem, const Sequence& sequence, const Dimensions& size, Pass pass);

inline constexpr Device device{forward, backward, explain, /*stores_gradients=*/true};

}  // namespace fastrnn::cuda
