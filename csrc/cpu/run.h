// The CPU as a Device (../network.h): a layer's kernel run by as many threads as it is worth.
#pragma once
#include <functional>

#include "../torch/network.h"

namespace fastrnn::cpu {

// In a forked child whose parent had threads, whoever started them, torch is told to use one: the child
// has none of them, and OpenMP would wait for them for ever, in torch's operations as in ours. Called
// when a child is born (fastrnn/__init__.py), and at each call, should it have asked for more since or
// have been forked without Python's os.fork.
void without_lost_threads();

void forward(const Problem& problem, const fastrnn::ForwardLayer& layer);
void backward(const Problem& problem, const fastrnn::BackwardLayer& layer);
// Calls run(model) for each of several models of the same sizes, on several threads where it is worth that.
void for_each_model(const Problem& problem, int64_t models,
                    const std::function<void(int64_t)>& run);
Facts explain(const Problem& problem, const Sequence& sequence, const Dimensions& size, Pass pass);

inline constexpr Device device{forward, backward, explain, /*stores_gradients=*/false};

}  // namespace fastrnn::cpu
