// The rows of a step, for the host.
#pragma once
#include "../../layer.h"

namespace fastrnn::cuda {

// None before the first step and after the last.
struct HostStepRows {
    int64_t first = 0;
    int64_t count = 0;
};

// Of the step that a direction, 0 in the order of time and 1 against it, takes as its i-th in the
// forward pass.
inline HostStepRows rows_of_step(const Sequence& s, int direction, int64_t i) {
    if (i < 0 || i >= s.steps) return {};
    const int64_t t = direction == 0 ? i : s.steps - 1 - i;
    return {.first = s.offsets[t], .count = s.batch_sizes[t]};
}

// The events [B] of that step, and those at which the direction enters it; or null.
inline const uint8_t* events_of_step(const Sequence& s, int direction, int64_t i) {
    if (!s.events || i < 0 || i >= s.steps) return nullptr;
    return s.events + rows_of_step(s, direction, i).first;
}
inline const uint8_t* entering_step(const Sequence& s, int direction, int64_t i) {
    if (i < 0 || i >= s.steps) return nullptr;
    return s.entering(direction == 0 ? i : s.steps - 1 - i, direction == 1);
}

}  // namespace fastrnn::cuda
