// Which path a layer takes: all steps in one launch, of blocks that do not wait for one another
// (one_block/) or of blocks that do (persistent/), or a launch for every step (stepwise/).
#pragma once
#include <variant>

#include "../../cuda/one_block/plan.h"
#include "../../cuda/persistent/plan.h"
#include "../problem.h"

namespace fastrnn::cuda {

enum class Path { stepwise, persistent, one_block };

struct StepwisePlan {
    const char* reason;  // why not in one launch
};

// The alternatives are in the order of Path.
using Plan = std::variant<StepwisePlan, PersistentPlan, OneBlockPlan>;

// The environment variable FASTRNN_CUDA_PATH, read at every call, can force a path by its name: if
// it cannot run the layer, that is an error.
Plan choose_path(Pass pass, const Problem& problem, const Sequence& sequence);

// Runs all steps of both directions of a layer by a plan that is not stepwise. The sequence in
// `layer` is set from the host's.
void run_in_one_launch(const Plan& plan, const Problem& problem, const Sequence& sequence,
                       LayerArguments<ForwardArrays>& layer, cudaStream_t stream);
void run_in_one_launch(const Plan& plan, const Problem& problem, const Sequence& sequence,
                       LayerArguments<BackwardArrays>& layer, cudaStream_t stream);

}  // namespace fastrnn::cuda
