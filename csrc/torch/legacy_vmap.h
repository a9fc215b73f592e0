// Batched tensors, and the legacy vmap of ATen. The vmap of torch.func is in vmap.cpp, because
// torch's headers of the two can't be included in one file.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace fastrnn {

// A tensor, undefined for None, and the index of its batch dimension, if it has one.
struct Batched {
    at::Tensor tensor;
    std::optional<int64_t> dim = std::nullopt;

    at::Tensor of_sample(int64_t v) const { return dim ? tensor.select(*dim, v) : tensor; }
    // Undefined, or a tensor that forward did not save.
    bool is_empty() const { return !tensor.defined() || tensor.dim() - dim.has_value() == 1; }
};

// The innermost vmap that any of these tensors is in, of torch.autograd.grad(is_grads_batched=True)
// or torch.autograd.functional's vectorize=True.
class LegacyLevel {
public:
    explicit LegacyLevel(const std::vector<at::Tensor>& all);
    Batched unwrapped(const at::Tensor& t) const;
    at::Tensor wrapped(const Batched& b) const;

private:
    int64_t level_ = -1;
};

}  // namespace fastrnn
