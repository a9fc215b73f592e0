// A network on any device: the loop over layers and directions, dropout between layers, and what is
// saved for backward.
#pragma once
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../device.h"
#include "problem.h"

namespace fastrnn {

// What forward saves for backward: nothing; the outputs of the layers, from which backward
// recomputes the gates and c; or the gates and c as well.
enum class Keep { nothing, outputs, gates };

// c_n is undefined for a cell without c. The last four are Kept of problem.h: all are defined if
// anything is saved.
struct ForwardResult {
    at::Tensor output, h_n, c_n, hidden, saved, c, dropout_mask;
};
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

ForwardResult forward(const Arguments& arguments, const Problem& problem, bool train, Keep keep);

// Forward of a single layer, direction and step that saves nothing: only h_n and c_n.
ForwardResult forward_step(const Arguments& arguments, const Problem& problem);

// Gradients of input, h0, c0 and the weights. `wanted` has a flag for each in this order; a
// gradient that is not wanted is undefined.
BackwardResult backward(const Arguments& arguments, const Problem& problem, const Kept& kept,
                        const OutputGradients& gradients, const std::vector<bool>& wanted);

// The two halves of forward and backward, which models.cpp calls for several models.

// Allocate the results of forward, and draw the dropout masks. `models`: additional first
// dimensions. Allocate the results of backward, in the gradient type and the shapes of the
// arguments.
ForwardResult results_of(const Arguments& arguments, const Problem& problem, bool train, Keep keep,
                         at::IntArrayRef models = {});
BackwardResult gradients_of(const Arguments& arguments, const Problem& problem,
                            const std::vector<bool>& wanted);

// Compute them.
void forward(const Arguments& arguments, const Problem& problem, Keep keep,
             const ForwardResult& result);
void backward(const Arguments& arguments, const Problem& problem, const Kept& kept,
              const OutputGradients& gradients, const BackwardResult& result);

// The gradients in the dtype of the arguments.
BackwardResult in_their_dtype(const Problem& problem, BackwardResult result);

// Those of a layer's forward pass and of its backward pass. Nothing is computed.
std::pair<Facts, Facts> explain(const Arguments& arguments, const Problem& problem, int64_t layer);

// The sequence of a call, and the memory of its arrays.
struct Rows {
    std::vector<int64_t> batch_sizes, offsets;
    at::Tensor events, zeros;
    Sequence sequence;

    Rows(const Arguments& arguments, const Problem& problem);
    Rows(const Rows&) = delete;
};

// The dropout mask of the outputs of layer - 1; undefined without dropout.
at::Tensor mask_of(const at::Tensor& masks, int64_t layer);

// Dropout of a layer's output, scaled by 1 / (1 - dropout) to keep its mean.
at::Tensor dropped(const at::Tensor& rows, const at::Tensor& mask, double dropout);

// The device that computes a problem. Throws c10::NotImplementedError if it has no kernels for it.
const Device& device_for(const Problem& problem);
// Whether there are kernels of the cell for its dtype: there may be none of a cell of one's own.
bool has_kernels(const Problem& problem);

// How many CPU threads a call may use: as many as torch's operators would.
int cpu_threads();

// In a forked child that has lost its parent's threads, torch.set_num_threads(1) (cpu/fork.h).
// Called when a child is born (fastrnn/__init__.py), and by each operator, because the number may
// have been set since, or the process been forked without Python's os.fork.
void without_lost_threads();

}  // namespace fastrnn
