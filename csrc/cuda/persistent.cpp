#include "persistent.h"

#include <limits>
#include <type_traits>

#include "one_block_kernel.h"
#include "persistent_kernel.h"

namespace fastrnn::cuda {
namespace {

template <class Direction>
cudaError_t launch(const PersistentPlan& plan, const LayerSize& size, const Sequence& sequence,
                   int directions, const Direction* direction, const void* const* weight_hh,
                   void* workspace, cudaStream_t stream) {
    PersistentArguments<Direction> arguments{};
    arguments.size = size;
    arguments.sequence = sequence;
    for (int i = 0; i < directions; ++i) {
        arguments.direction[i] = direction[i];
        arguments.weight_hh[i] = weight_hh[i];
    }
    arguments.tiling = plan.tiling;
    arguments.chunks = plan.chunks;
    arguments.width = plan.exchange_width;
    // The kernels count steps with an int.
    if (sequence.steps >= std::numeric_limits<int>::max() - ahead_stages)
        return cudaErrorInvalidValue;
    void* parameters[] = {&arguments};
    const dim3 blocks(plan.unit_blocks, plan.groups, directions), threads(plan.threads);
    if (!plan.kernel)
        return cudaLaunchKernel(plan.function, blocks, threads, parameters, plan.shared_bytes,
                                stream);
    char* const memory = static_cast<char*>(workspace);
    const Workspace places(plan, size.hidden, directions);
    arguments.counters = static_cast<unsigned*>(workspace);
    arguments.exchange = memory + places.exchange;
    if constexpr (std::is_same_v<Direction, BackwardDirection>)
        for (int i = 0; i < directions; ++i) {
            BiasGradients& biases = arguments.direction[i].biases;
            if (!biases.ih && !biases.hh) continue;
            biases.done = reinterpret_cast<unsigned*>(memory + places.done) + i * plan.unit_blocks;
            biases.sums = reinterpret_cast<float*>(memory + places.sums) +
                          i * plan.groups * plan.kernel->grads * size.hidden;
        }
    if (const cudaError_t error = cudaMemsetAsync(workspace, 0, plan.cleared, stream);
        error != cudaSuccess)
        return error;
    return cudaLaunchCooperativeKernel(plan.function, blocks, threads, parameters,
                                       plan.shared_bytes, stream);
}

}  // namespace

cudaError_t launch_persistent_forward(const PersistentPlan& plan, const LayerSize& size,
                                      const Sequence& sequence, int directions,
                                      const ForwardDirection* direction,
                                      const void* const* weight_hh, void* workspace,
                                      cudaStream_t stream) {
    return launch(plan, size, sequence, directions, direction, weight_hh, workspace, stream);
}

cudaError_t launch_persistent_backward(const PersistentPlan& plan, const LayerSize& size,
                                       const Sequence& sequence, int directions,
                                       const BackwardDirection* direction,
                                       const void* const* weight_hh, void* workspace,
                                       cudaStream_t stream) {
    return launch(plan, size, sequence, directions, direction, weight_hh, workspace, stream);
}

}  // namespace fastrnn::cuda
