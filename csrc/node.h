// The node of torch's graph that a direct call (direct.h) leaves behind where gradients are asked for.
#pragma once
#include "network.h"

namespace fastrnn {

// Makes output, h_n and c_n of `result` differentiable with respect to the arguments' tensors.
// `result` was computed with something kept.
void attach_backward(const Arguments& arguments, bool train, ForwardResult& result);

}  // namespace fastrnn
