// A GPU as a Device (../network.h): a layer's products by cuBLAS, the rest by the kernels of this
// folder. Nothing here waits for the GPU or brings a value back from it; all of it runs on the
// caller's stream, in memory of torch's allocator, and can be captured in a CUDA graph.
#pragma once
#include "../torch/network.h"

namespace fastrnn::cuda {

void forward(const Problem& problem, const fastrnn::ForwardLayer& layer);
void backward(const Problem& problem, const fastrnn::BackwardLayer& layer);
Facts explain(const Problem& problem, const fastrnn::Sequence& sequence, const Dimensions& size,
              Pass pass);

inline constexpr Device device{forward, backward, explain, /*stores_gradients=*/true};

}  // namespace fastrnn::cuda
