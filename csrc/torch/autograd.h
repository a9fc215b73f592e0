// What autograd is told: the nodes of torch's graph, and the operators' kernels that leave them
// behind.
#pragma once
#include "network.h"

namespace fastrnn {

// Whether gradients are asked for: whether there is to be a node.
bool needs_gradient(const Arguments& arguments);

// Makes output, h_n and c_n (undefined for a cell without c) of `result` differentiable with
// respect to the arguments' tensors. `result` was computed with something kept.
void attach_backward(const Arguments& arguments, ForwardResult& result);

}  // namespace fastrnn
