// The whole network on any device: every layer and direction, the dropout between layers, and what is
// kept for backward.
#pragma once
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../layer.h"
#include "problem.h"

namespace fastrnn {

// What forward leaves for backward beside the results: nothing; the outputs of the layers, of which
// backward computes a layer's gates and c again; or those too.
enum class Keep { nothing, outputs, gates };

// c_n is undefined for a cell without c. The last four are Kept of problem.h, all of them defined, but
// if nothing is kept.
struct ForwardResult {
    at::Tensor output, h_n, c_n, hidden, saved, c, dropout_mask;
};
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

ForwardResult forward(const Arguments& arguments, const Problem& problem, bool train, Keep keep);

// The same of a single layer, direction and step, with nothing kept: h_n and c_n alone.
ForwardResult forward_step(const Arguments& arguments, const Problem& problem);

// Gradients of input, h0, c0 and the weights; `wanted` says which, in this order, the others are
// empty.
BackwardResult backward(const Arguments& arguments, const Problem& problem, const Kept& kept,
                        const OutputGradients& gradients, const std::vector<bool>& wanted);

// The parts of those two, for several models at a time (models.h).

// Memory for the results of forward, with the masks of dropout drawn; `models` are dimensions more in
// front. And for those of backward, in the gradient type and the arguments' shapes.
ForwardResult results_of(const Arguments& arguments, const Problem& problem, bool train, Keep keep,
                         at::IntArrayRef models = {});
BackwardResult gradients_of(const Arguments& arguments, const Problem& problem,
                            const std::vector<bool>& wanted);

// Computes them.
void forward(const Arguments& arguments, const Problem& problem, Keep keep,
             const ForwardResult& result);
void backward(const Arguments& arguments, const Problem& problem, const Kept& kept,
              const OutputGradients& gradients, const BackwardResult& result);

// The gradients as the operator returns them.
BackwardResult in_their_dtype(const Problem& problem, BackwardResult result);

// Names and values of what there is to know of how a pass over a layer is computed.
using Facts = std::vector<std::pair<std::string, std::string>>;

// Those of a layer's forward pass and of its backward pass. Nothing is computed.
std::pair<Facts, Facts> explain(const Arguments& arguments, const Problem& problem, int64_t layer);

// What a device does for a network: one layer at a time.
struct Device {
    void (*forward)(const Problem&, const ForwardLayer&);
    void (*backward)(const Problem&, const BackwardLayer&);
    Facts (*explain)(const Problem&, const Sequence&, const Dimensions&, Pass);
    // Whether gradients are made in the storage type, or in the arithmetic type and then rounded.
    bool stores_gradients;
};

}  // namespace fastrnn
