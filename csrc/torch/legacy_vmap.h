// The dimension of samples that vmap gives tensors, and the older of its two kinds (vmap.cpp has
// the other: torch's headers of both do not go into one file).
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace fastrnn {

// A tensor, undefined for None, and where it has the dimension of samples, if it has it.
struct Batched {
    at::Tensor tensor;
    std::optional<int64_t> dim = std::nullopt;

    at::Tensor of_sample(int64_t v) const { return dim ? tensor.select(*dim, v) : tensor; }
    // What there is none of: an undefined tensor, and what was not kept.
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
