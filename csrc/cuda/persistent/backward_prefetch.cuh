// What both backward kernels prefetch.
#pragma once
#include "../common/element.cuh"
#include "../common/step_rows.cuh"

namespace fastrnn::cuda {

// Prefetches the backward inputs, of the kinds of In, of the tile of rows from row0 on. now: the
// rows of the tile's step; before: those of the step before it in time, which is handled before.
template <class In, class Part, class Prefetch>
__device__ __forceinline__ void prefetch_backward(const BackwardArrays& d, const LayerSize& z,
                                                  const Part& part, const Prefetch& inputs,
                                                  int buffer, const DeviceStepRows& now,
                                                  const DeviceStepRows& before, int row0, int H) {
    inputs.prefetch(
        buffer, part.rows_among(now.count) - row0, H - part.first_unit, [&](int kind, int row) {
            const int b = part.first_row + row0 + row;
            const BackwardRow at{b, now.first + b, b < before.count ? before.first + b : -1};
            const auto* from = In::source(d, z, at, kind);
            return from ? from + part.first_unit : nullptr;
        });
}

}  // namespace fastrnn::cuda
