// Launches the persistent path: all steps of a layer, both directions.
#pragma once
#include "plan.h"

namespace fastrnn::cuda {

// The plan is that of the pass of the arrays; workspace: plan.workspace bytes on the device,
// aligned to 16.
FASTRNN_API cudaError_t launch_persistent(const PersistentPlan& plan,
                                          const LayerArguments<ForwardArrays>& layer,
                                          void* workspace, cudaStream_t stream);
FASTRNN_API cudaError_t launch_persistent(const PersistentPlan& plan,
                                          const LayerArguments<BackwardArrays>& layer,
                                          void* workspace, cudaStream_t stream);

}  // namespace fastrnn::cuda
