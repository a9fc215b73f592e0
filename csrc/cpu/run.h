// The CPU as a Device (../network.h): a layer's kernel run by as many threads as it is worth.
#pragma once
#include "../network.h"

namespace fastrnn::cpu {

void forward(const Problem& problem, const fastrnn::ForwardLayer& layer);
void backward(const Problem& problem, const fastrnn::BackwardLayer& layer);
Facts explain(const Problem& problem, const Sequence& sequence, const Dimensions& size, Pass pass);

inline constexpr Device device{forward, backward, explain, /*stores_gradients=*/false};

}  // namespace fastrnn::cpu
