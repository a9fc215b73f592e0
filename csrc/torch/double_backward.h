// Derivatives on the CPU by kernels of dual numbers: double backward, the first derivative of the
// operator `backward`, and forward mode.
#pragma once
#include <vector>

#include "network.h"

namespace fastrnn {

// Whether the kernels know the cell, and all options that the network has.
bool has_dual_kernels(const Options& options);

// Gradients of the arguments of `backward`, where they are `needed` and defined: of grad_output,
// grad_h_n and grad_c_n, and then of input, h0, c0 and the weights. `directions`: the gradients of
// the results of `backward`, undefined where there is none. dropout_mask: as forward kept it.
std::vector<at::Tensor> double_backward(const Arguments& arguments, const Problem& problem,
                                        const at::Tensor& dropout_mask,
                                        const OutputGradients& gradients,
                                        const std::vector<at::Tensor>& directions,
                                        const std::vector<bool>& needed);

// Tangents of output, h_n and c_n (or undefined), in the directions of the tangents of input, h0,
// c0 and the weights. `results`: of forward.
std::vector<at::Tensor> tangents(const Arguments& arguments, const Problem& problem,
                                 const ForwardResult& results,
                                 const std::vector<at::Tensor>& directions);

}  // namespace fastrnn
