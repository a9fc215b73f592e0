// Which rows of the data a step has, for the kernels that run all steps of a layer.
#pragma once
#include "persistent.h"

namespace fastrnn::cuda {

// The rows of a step in the data, of which there are none before the first step and after the last.
struct StepRows {
    int64_t first;
    int rows;
};

// Of the step that a direction, in the order of time or against it, handles as its step-th. The host
// sees to it that steps and rows fit into an int.
__device__ __forceinline__ StepRows rows_of(const Sequence& s, bool in_order, int step) {
    const int steps = static_cast<int>(s.steps), batch = static_cast<int>(s.batch);
    if (step < 0 || step >= steps) return {};
    const int t = in_order ? step : steps - 1 - step;
    if (!s.offsets) return {int64_t(t) * batch, batch};
    const int64_t first = s.offsets[t];
    return {first, static_cast<int>(s.offsets[t + 1] - first)};
}

}  // namespace fastrnn::cuda
