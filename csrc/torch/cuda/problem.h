// A layer as a Problem (../problem.h) of a network of that layer alone, which the code that
// allocates tensors and calls cuBLAS is written for.
#pragma once
#include "../problem.h"

namespace fastrnn::cuda {

inline Problem problem_of(const Layer& layer) {
    constexpr at::ScalarType dtypes[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
    const at::ScalarType dtype = dtypes[static_cast<int>(layer.storage)];
    const CellInfo& cell = cells[layer.cell];
    return {
        .cell_index = layer.cell,
        .cell = cell,
        .steps = layer.sequence.steps,
        .batch = layer.sequence.batch,
        .rows = layer.sequence.rows(),
        .input = layer.size.input,
        .hidden = layer.size.hidden,
        .recurrent = layer.size.recurrent,
        .layers = 1,
        .directions = layer.size.directions,
        .projected = layer.size.projected,
        .dtype = dtype,
        .arithmetic = dtype == at::kDouble ? at::kDouble : at::kFloat,
        .storage = layer.storage,
        .device = at::Device(at::kCUDA, static_cast<at::DeviceIndex>(layer.device_index)),
    };
}

}  // namespace fastrnn::cuda
