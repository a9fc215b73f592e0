// Double backward on the CPU: the first derivative of the operator `backward`, by kernels.
#pragma once
#include <vector>

#include "network.h"

namespace fastrnn {

// Whether double_backward knows all options that the network has.
bool has_double_backward(const Options& options);

// Gradients of the arguments of `backward`, where they are `needed` and defined: of grad_output,
// grad_h_n and grad_c_n, and then of input, h0, c0 and the weights. `directions`: the gradients of
// the results of `backward`, undefined where there is none. dropout_mask: as forward kept it.
std::vector<at::Tensor> double_backward(const Arguments& arguments, const Problem& problem,
                                        const at::Tensor& dropout_mask,
                                        const OutputGradients& gradients,
                                        const std::vector<at::Tensor>& directions,
                                        const std::vector<bool>& needed);

}  // namespace fastrnn
