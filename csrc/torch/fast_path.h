// Calls of the layers and cells straight from Python to the kernels.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "options.h"

namespace fastrnn {

// The options of a network from their values in the operators' order.
Options options_of(const std::string& cell, const pybind11::tuple& values);

// Adds the functions `layer`, `cell`, `network`, `step` and `autocast_to` to the module fastrnn._C.
void bind_fast_path(pybind11::module_& module);

}  // namespace fastrnn
