// The CPU as a Device (../network.h): a layer's kernel run by as many threads as it is worth.
#pragma once
#include "../network.h"

namespace fastrnn::cpu {

void forward(const Problem& problem, const fastrnn::ForwardLayer& layer);
void backward(const Problem& problem, const fastrnn::BackwardLayer& layer);

inline constexpr Device device{forward, backward, /*stores_gradients=*/false};

}  // namespace fastrnn::cpu
