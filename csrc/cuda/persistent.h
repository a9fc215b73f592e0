// The persistent path: one launch for all steps of a layer, both directions. For float32, float16
// and bfloat16, without a projection, where the weights fit into the registers of the device.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "layer.h"
#include "plan.h"

namespace fastrnn::cuda {

struct Sequence {
    const int64_t* offsets;  // [T + 1] on the device: the first row of every step, and N; null if
                             // every step has B rows
    int64_t steps;           // T >= 1
    int64_t batch;           // B
};

// Both take the plan of their pass and a workspace on the device, of plan.workspace bytes, aligned
// to 16. weight_hh: [G * H, H] for each direction.
cudaError_t launch_persistent_forward(const PersistentPlan& plan, const LayerSize& size,
                                      const Sequence& sequence, int directions,
                                      const ForwardDirection* direction,
                                      const void* const* weight_hh, void* workspace,
                                      cudaStream_t stream);

cudaError_t launch_persistent_backward(const PersistentPlan& plan, const LayerSize& size,
                                       const Sequence& sequence, int directions,
                                       const BackwardDirection* direction,
                                       const void* const* weight_hh, void* workspace,
                                       cudaStream_t stream);

// Stores offsets [T + 1], of the host, at `to`, on the device. They travel as arguments of kernels:
// nothing is read from the host's memory after the call, and a CUDA graph may hold it.
cudaError_t launch_store_offsets(const int64_t* offsets, int64_t steps, int64_t* to,
                                 cudaStream_t stream);

}  // namespace fastrnn::cuda
