// Differentiation of the operators: the nodes of autograd's graph, and the kernels of the Autograd
// dispatch key that attach them.
#pragma once
#include "network.h"

namespace fastrnn {

// Whether a call needs a node: some tensor requires gradients, and grad mode is on.
bool needs_gradient(const Arguments& arguments);

// Makes output, h_n and c_n (undefined for a cell without c) of `result` differentiable with
// respect to the arguments' tensors. `result` must hold what forward saves for backward.
void attach_backward(const Arguments& arguments, ForwardResult& result);

}  // namespace fastrnn
