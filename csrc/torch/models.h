// E models of equal sizes and options in one call of an operator: every tensor except batch_sizes
// has an additional first dimension E. vmap over stacked weights makes such calls. Each model's
// results have the same bits as a call for this model alone.
#pragma once
#include "network.h"

namespace fastrnn {

// Whether these are the weights of several models: [E, G * H, I] and so on.
bool are_of_models(at::TensorList weights);

// Check all arguments, then compute forward and backward of network.h for every model.
ForwardResult forward_models(const Arguments& arguments, bool train, Keep keep);
BackwardResult backward_models(const Arguments& arguments, const Kept& kept,
                               const OutputGradients& gradients, const std::vector<bool>& wanted);

}  // namespace fastrnn
