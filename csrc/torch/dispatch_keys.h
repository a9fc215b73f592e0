// Which dispatch keys and modes are active: whether a call may go straight to the kernels.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastrnn {

// Whether no mode, transform or tracer would see a call of an operator; autocast apart.
bool only_default_keys_active();
bool autocast_enabled();

// Whether a tensor is dense, on a device with kernels, has values (no fake or batched tensor) and,
// unless that is allowed, no tangent.
bool has_only_default_keys(const at::Tensor& tensor, bool tangent_allowed = false);

// A tensor of a cell, [B, W] or [W], in the shape of a network of one step, [1, B, W]: without the
// dispatcher, for a tensor with only default keys. Only to be read: neither autograd nor the
// version counter of `tensor` knows the result.
at::Tensor as_step(const at::Tensor& tensor);

}  // namespace fastrnn
