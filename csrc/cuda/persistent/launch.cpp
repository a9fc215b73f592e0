#include "launch.h"

#include <limits>
#include <type_traits>

namespace fastrnn::cuda {
namespace {

template <class Arrays>
cudaError_t launch(const PersistentPlan& plan, const LayerArguments<Arrays>& layer, void* workspace,
                   cudaStream_t stream) {
    // The kernels count steps with an int, up to the one that they prefetch.
    if (layer.sequence.steps >= std::numeric_limits<int>::max() - 2) return cudaErrorInvalidValue;
    char* const memory = static_cast<char*>(workspace);
    PersistentArguments<Arrays> arguments{.size = layer.size,
                                          .sequence = layer.sequence,
                                          .direction = {layer.direction[0], layer.direction[1]},
                                          .weight_hh = {layer.weight_hh[0], layer.weight_hh[1]},
                                          .tiling = plan.tiling,
                                          .chunks = plan.chunks,
                                          .width = plan.exchange_width,
                                          .exchange = memory + plan.exchange_offset,
                                          .counters = static_cast<unsigned*>(workspace)};
    if constexpr (std::is_same_v<Arrays, BackwardArrays>)
        for (int i = 0; i < plan.directions; ++i) {
            BiasGradients& biases = arguments.direction[i].biases;
            if (!biases.ih && !biases.hh) continue;
            biases.done =
                reinterpret_cast<unsigned*>(memory + plan.done_offset) + i * plan.unit_blocks;
            biases.sums = reinterpret_cast<float*>(memory + plan.sums_offset) +
                          i * plan.groups * plan.kernel->grads * layer.size.hidden;
        }
    if (const cudaError_t error = cudaMemsetAsync(workspace, 0, plan.cleared, stream);
        error != cudaSuccess)
        return error;
    void* parameters[] = {&arguments};
    return cudaLaunchCooperativeKernel(plan.kernel->function,
                                       dim3(plan.unit_blocks, plan.groups, plan.directions),
                                       dim3(plan.threads), parameters, plan.shared_bytes, stream);
}

}  // namespace

cudaError_t launch_persistent(const PersistentPlan& plan,
                              const LayerArguments<ForwardArrays>& layer, void* workspace,
                              cudaStream_t stream) {
    return launch(plan, layer, workspace, stream);
}

cudaError_t launch_persistent(const PersistentPlan& plan,
                              const LayerArguments<BackwardArrays>& layer, void* workspace,
                              cudaStream_t stream) {
    return launch(plan, layer, workspace, stream);
}

}  // namespace fastrnn::cuda
