#include "legacy_vmap.h"

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/ops/_add_batch_dim.h>
#include <ATen/ops/_remove_batch_dim.h>

#include <algorithm>

namespace fastrnn {
namespace {

at::BatchDimsRef dims_of(const at::Tensor& t) {
    const auto* impl = t.defined() ? at::maybeGetBatchedImpl(t) : nullptr;
    return impl ? impl->bdims() : at::BatchDimsRef();
}

}  // namespace

LegacyLevel::LegacyLevel(const std::vector<at::Tensor>& all) {
    for (const at::Tensor& t : all)
        for (const at::BatchDim& dim : dims_of(t)) level_ = std::max(level_, dim.level());
    TORCH_CHECK(level_ >= 0, "fastrnn: no tensor here has a dimension of a vmap");
}

Batched LegacyLevel::unwrapped(const at::Tensor& t) const {
    for (const at::BatchDim& dim : dims_of(t))
        if (dim.level() == level_)
            return {at::_remove_batch_dim(t, level_, /*batch_size=*/0, /*out_dim=*/0), 0};
    return {t};
}

at::Tensor LegacyLevel::wrapped(const Batched& b) const {
    return b.dim ? at::_add_batch_dim(b.tensor, *b.dim, level_) : b.tensor;
}

}  // namespace fastrnn
