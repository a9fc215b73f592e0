#include "launch.h"

#include <limits>

namespace fastrnn::cuda {
namespace {

template <class Arrays>
cudaError_t launch(const OneBlockPlan& plan, const LayerArguments<Arrays>& layer,
                   cudaStream_t stream) {
    // The kernels count steps with an int, up to those that they prefetch.
    if (layer.sequence.steps >= std::numeric_limits<int>::max() - prefetch_stages)
        return cudaErrorInvalidValue;
    OneBlockArguments<Arrays> arguments{layer, plan.chunks, plan.width, plan.group_rows};
    void* parameters[] = {&arguments};
    return cudaLaunchKernel(plan.kernel->function, dim3(1, plan.groups, plan.directions),
                            dim3(plan.threads), parameters, plan.shared_bytes, stream);
}

}  // namespace

cudaError_t launch_one_block(const OneBlockPlan& plan, const LayerArguments<ForwardArrays>& layer,
                             cudaStream_t stream) {
    return launch(plan, layer, stream);
}

cudaError_t launch_one_block(const OneBlockPlan& plan, const LayerArguments<BackwardArrays>& layer,
                             cudaStream_t stream) {
    return launch(plan, layer, stream);
}

}  // namespace fastrnn::cuda
