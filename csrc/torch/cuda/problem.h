// A layer as a Problem (../problem.h) of a network of that layer alone, which the code that
// allocates tensors and calls cuBLAS is written for.
#pragma once
#include "../problem.h"

namespace fastrnn::cuda {

inline Problem problem_of(const Layer& layer) {
    constexpr at::ScalarType dtypes[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
    const at::ScalarType dtype = dtypes[static_cast<int>(layer.storage)];
    const CellInfo& cell = info_of(layer.cell);
    Problem p{};
    p.cell_index = layer.cell;
    p.cell = cell;
    p.steps = layer.sequence.steps;
    p.batch = layer.sequence.batch;
    p.rows = layer.sequence.rows();
    p.input = layer.size.input;
    p.hidden = layer.size.hidden;
    p.recurrent = layer.size.recurrent;
    p.layers = 1;
    p.directions = layer.size.directions;
    p.projected = layer.size.projected;
    p.dtype = dtype;
    p.arithmetic = dtype == at::kDouble ? at::kDouble : at::kFloat;
    p.storage = layer.storage;
    p.device = at::Device(at::kCUDA, static_cast<at::DeviceIndex>(layer.device_index));
    return p;
}

}  // namespace fastrnn::cuda
