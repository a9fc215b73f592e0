// Calls of the layers and cells straight from Python to the kernels.
#pragma once
#include <pybind11/pybind11.h>

#include "options.h"

namespace fastrnn {

// A Network of fastrnn/network.py: the cell, the options in the operators' order, train and
// recompute.
struct NetworkValues {
    Options options;
    bool train, recompute;
};
NetworkValues read_network(const pybind11::tuple& network);

// Adds the functions `layer`, `cell`, `network`, `step` and `autocast_to` to the module fastrnn._C.
void bind_fast_path(pybind11::module_& module);

}  // namespace fastrnn
