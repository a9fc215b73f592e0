// Calls of the layers and cells straight from Python to the kernels.
#pragma once
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

namespace fastrnn {

// Whether no mode, transform or tracer would see a call of an operator; autocast apart.
bool unobserved();
bool autocast_enabled();

// Whether a tensor is on a device with kernels, with values of its own and no tangent.
bool is_plain(const at::Tensor& tensor);

// Adds the functions `layer`, `cell`, `network`, `step` and `autocast_to` to the module fastrnn._C.
void bind_direct(pybind11::module_& module);

}  // namespace fastrnn
