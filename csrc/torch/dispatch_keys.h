// Which dispatch keys and modes are active: whether a call may go straight to the kernels.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastrnn {

// Whether no mode, transform or tracer would see a call of an operator; autocast apart.
bool only_default_keys_active();
bool autocast_enabled();

// Whether a tensor is dense, on a device with kernels, has values (no fake or batched tensor) and
// no tangent.
bool has_only_default_keys(const at::Tensor& tensor);

}  // namespace fastrnn
