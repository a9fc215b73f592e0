// The rows of a step, for the kernels that run all steps of a layer.
#pragma once
#include "layer_arguments.h"

namespace fastrnn::cuda {

// None before the first step and after the last.
struct DeviceStepRows {
    int64_t first;
    int count;
};

// Of the step that a direction, in the order of time or against it, takes as its step-th. Steps and
// rows fit into an int: the host checks that.
__device__ __forceinline__ DeviceStepRows step_rows(const DeviceSequence& s, bool in_order,
                                                    int step) {
    const int steps = static_cast<int>(s.steps), batch = static_cast<int>(s.batch);
    if (step < 0 || step >= steps) return {};
    const int t = in_order ? step : steps - 1 - step;
    if (!s.offsets) return {int64_t(t) * batch, batch};
    const int64_t first = s.offsets[t];
    return {first, static_cast<int>(s.offsets[t + 1] - first)};
}

}  // namespace fastrnn::cuda
