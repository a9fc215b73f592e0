#include "path.h"

#include <c10/cuda/CUDAException.h>

#include <cstdlib>
#include <string_view>

namespace fastrnn::cuda {

PersistentPlan choose_path(Pass pass, const Problem& p) {
    const char* variable = std::getenv("FASTRNN_CUDA_PATH");
    const std::string_view asked = variable ? variable : "";
    TORCH_CHECK_VALUE(asked.empty() || asked == "stepwise" || asked == "persistent",
                      "FASTRNN_CUDA_PATH is '", asked, "', expected stepwise or persistent");
    if (asked == "stepwise") return {};
    const PersistentPlan plan =
        plan_persistent(pass, p.cell_index, p.storage, p.hidden, p.batch,
                        static_cast<int>(p.directions), p.projected, p.device.index());
    TORCH_CHECK_NOT_IMPLEMENTED(
        plan.fits || asked.empty(),
        "FASTRNN_CUDA_PATH is persistent, but this layer can not be: ", plan.reason);
    return plan;
}

PersistentMemory::PersistentMemory(const PersistentPlan& plan, const Problem& p,
                                   const fastrnn::Sequence& steps, cudaStream_t stream)
    : sequence{nullptr, steps.steps, steps.batch, steps.rows()} {
    const auto options = at::TensorOptions(p.device);
    workspace = at::empty({static_cast<int64_t>(plan.workspace)}, options.dtype(at::kByte));
    if (steps.rows() == steps.steps * steps.batch) return;
    batch_sizes = at::empty({steps.steps}, options.dtype(at::kInt));
    sequence.batch_sizes = batch_sizes.const_data_ptr<int>();
    C10_CUDA_CHECK(launch_store_batch_sizes(steps.batch_sizes, steps.steps,
                                            batch_sizes.mutable_data_ptr<int>(), stream));
}

}  // namespace fastrnn::cuda
