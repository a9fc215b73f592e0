// Calls of the layers and cells straight from Python to the kernels.
#pragma once
#include <pybind11/pybind11.h>

namespace fastrnn {

// Adds the functions `layer` and `cell` to the module fastrnn._C.
void bind_direct(pybind11::module_& module);

}  // namespace fastrnn
