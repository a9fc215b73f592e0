#include "persistent.h"

#include <limits>

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
    arguments.chunks = static_cast<int>(plan.exchange_width / chunk_size);
    arguments.width = plan.exchange_width;
    // The kernels count steps with an int.
    if (sequence.steps >= std::numeric_limits<int>::max() - ahead_stages)
        return cudaErrorInvalidValue;
    void* parameters[] = {&arguments};
    const dim3 blocks(plan.unit_blocks, plan.groups, directions), threads(plan.threads);
    if (!plan.kernel)
        return cudaLaunchKernel(plan.function, blocks, threads, parameters, plan.shared_bytes,
                                stream);
    arguments.counters = static_cast<unsigned*>(workspace);
    arguments.exchange = arguments.counters + counter_stride * directions * plan.groups;
    // Counters from 0, and zeros as padding.
    if (const cudaError_t error = cudaMemsetAsync(workspace, 0, plan.workspace, stream);
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
