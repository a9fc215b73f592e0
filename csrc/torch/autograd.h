// Differentiation of the operators: the nodes of autograd's graph, and the kernels of the Autograd
// dispatch key that attach them.
#pragma once
#include "network.h"

namespace fastrnn {

// Whether a call needs a node: some tensor requires gradients, and grad mode is on.
bool needs_gradient(const Arguments& arguments);

// Makes output, h_n and c_n (undefined for a cell without c) of `result` differentiable with
// respect to the arguments' tensors. `result` must hold what forward saves for backward. The input
// and the states may also be those of a cell, [B, W] or [W] instead of [1, B, W]; then h_n and c_n
// are of that shape too, and output is undefined.
void attach_backward(const Arguments& arguments, ForwardResult& result);

}  // namespace fastrnn
