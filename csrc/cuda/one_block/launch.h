// Launches the one-block path: all steps of a layer, both directions.
#pragma once
#include "plan.h"

namespace fastrnn::cuda {

// The plan is that of the pass of the arrays.
FASTRNN_API cudaError_t launch_one_block(const OneBlockPlan& plan,
                                         const LayerArguments<ForwardArrays>& layer,
                                         cudaStream_t stream);
FASTRNN_API cudaError_t launch_one_block(const OneBlockPlan& plan,
                                         const LayerArguments<BackwardArrays>& layer,
                                         cudaStream_t stream);

}  // namespace fastrnn::cuda
