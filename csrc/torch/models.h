// E models of the same kind, sizes and options in one call of an operator: every tensor but
// batch_sizes has a dimension E more in front. What vmap makes of stacked weights. Each model's
// results have the bits of a call for it alone.
#pragma once
#include "network.h"

namespace fastrnn {

// Whether these are the weights of several models: [E, G * H, I] and so on.
bool are_of_models(at::TensorList weights);

// Check everything, and compute what forward and backward of network.h do.
ForwardResult forward_models(const Arguments& arguments, bool train, Keep keep);
BackwardResult backward_models(const Arguments& arguments, const Kept& kept,
                               const OutputGradients& gradients, const std::vector<bool>& wanted);

}  // namespace fastrnn
