// The stepwise path on the host: for every step a product W_hh h of each direction, and one launch
// (step.h) for all directions.
#pragma once
#include <vector>

#include "../../cuda/common/layer_arguments.h"
#include "backward_tensors.h"
#include "product.h"

namespace fastrnn::cuda {

// direction: as many as the layer has. Sets `c` of each.
void forward_step_by_step(const Problem& problem, const ForwardLayer& layer,
                          const Products& products, const LayerSize& size, ForwardArrays* direction,
                          cudaStream_t stream);

// Adds up the gradients of the biases too. Sets `biases` of each direction.
void backward_step_by_step(const Problem& problem, const BackwardLayer& layer,
                           const Products& products, const LayerSize& size,
                           const std::vector<BackwardTensors>& tensors, BackwardArrays* direction,
                           cudaStream_t stream);

}  // namespace fastrnn::cuda
