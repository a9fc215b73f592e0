// The whole network on the CPU: every layer and direction, the dropout between layers, and what is
// kept for backward.
#pragma once
#include <tuple>
#include <vector>

#include "../problem.h"

namespace fastrnn::cpu {

// c_n is undefined for a cell without c. The last four are Kept of problem.h, all of them defined, if
// `keep`.
struct ForwardResult {
    at::Tensor output, h_n, c_n, hidden, saved, c, noise;
};
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

ForwardResult forward(const Arguments& arguments, const Problem& problem, bool train, bool keep);

// Gradients of input, h0, c0 and the weights; `wanted` says which, in this order, the others are
// empty.
BackwardResult backward(const Arguments& arguments, const Problem& problem, const Kept& kept,
                        const OutputGradients& gradients, const std::vector<bool>& wanted);

}  // namespace fastrnn::cpu
