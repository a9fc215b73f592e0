#include "path.h"

#include "product.h"
#include "run.h"

#include <c10/cuda/CUDAException.h>

#include <cstdlib>
#include <string_view>

namespace fastrnn::cuda {
namespace {

// A group's tiles of rows take their turns, where a product of all rows does not. On an H100
// (bench/results/gpu.json) groups of up to 4 tiles were faster than a product and a launch a step.
// Beyond (B = 256, H = 1024) they took 1.2 to 2.4 times as long, but for an LSTM's training step in
// float16: 0.97.
constexpr int most_group_rows = 4 * tile_rows;

}  // namespace

PersistentPlan choose_path(Pass pass, const Problem& p) {
    const char* variable = std::getenv("FASTRNN_CUDA_PATH");
    const std::string_view asked = variable ? variable : "";
    TORCH_CHECK_VALUE(
        asked.empty() || asked == "stepwise" || asked == "persistent" || asked == "one_block",
        "FASTRNN_CUDA_PATH is '", asked, "', expected stepwise, persistent or one_block");
    if (asked == "stepwise") return {};
    const auto planned = [&](decltype(plan_persistent)& by) {
        return by(pass, p.cell_index, p.storage, p.hidden, p.batch, static_cast<int>(p.directions),
                  p.projected, tf32_allowed(p), p.device.index());
    };
    if (asked != "persistent") {
        const PersistentPlan plan = planned(plan_one_block);
        if (plan.fits) return plan;
        TORCH_CHECK_NOT_IMPLEMENTED(
            asked.empty(),
            "FASTRNN_CUDA_PATH is one_block, but this layer can not be: ", plan.reason);
    }
    PersistentPlan plan = planned(plan_persistent);
    TORCH_CHECK_NOT_IMPLEMENTED(
        plan.fits || asked.empty(),
        "FASTRNN_CUDA_PATH is persistent, but this layer can not be: ", plan.reason);
    if (plan.fits && asked.empty() && plan.tiling.group_rows > most_group_rows) {
        plan.fits = false;
        plan.reason = "faster for so many rows";
    }
    return plan;
}

Facts explain(const Problem& p, const fastrnn::Sequence& sequence, const Dimensions&, Pass pass) {
    const PersistentPlan plan = choose_path(pass, p);
    if (!plan.fits) {
        const int64_t products = sequence.steps * p.directions * (p.projected ? 2 : 1);
        return {{"path", "stepwise"},
                {"why", plan.reason ? plan.reason : "FASTRNN_CUDA_PATH"},
                {"launches", std::to_string(sequence.steps) + " and " + std::to_string(products) +
                                 " products"}};
    }
    const int64_t blocks = int64_t(plan.unit_blocks) * plan.groups * p.directions;
    const bool one_block = !plan.kernel;
    return {{"path", one_block ? "one_block" : "persistent"},
            {"why", one_block ? "the weights fit into the registers of a block"
                              : "all of its blocks are resident at once"},
            {"product", plan.product},
            {"blocks", std::to_string(blocks) + ": " + std::to_string(p.directions) + " x " +
                           std::to_string(plan.groups) + " parts of the rows x " +
                           std::to_string(plan.unit_blocks) + " parts of the units"},
            {"barriers a step", plan.unit_blocks > 1 ? "1" : "0"},
            {"threads a block", std::to_string(plan.threads)},
            {"registers a thread", std::to_string(plan.registers)},
            {"shared memory a block", std::to_string(plan.shared_bytes) + " bytes"},
            {"workspace", std::to_string(plan.workspace) + " bytes"}};
}

PersistentMemory::PersistentMemory(const PersistentPlan& plan, const Problem& p,
                                   const fastrnn::Sequence& steps, cudaStream_t stream)
    : sequence{nullptr, steps.steps, steps.batch} {
    const auto options = at::TensorOptions(p.device);
    workspace = at::empty({static_cast<int64_t>(plan.workspace)}, options.dtype(at::kByte));
    if (steps.rows() == steps.steps * steps.batch) return;
    offsets = at::empty({steps.steps + 1}, options.dtype(at::kLong));
    sequence.offsets = offsets.const_data_ptr<int64_t>();
    C10_CUDA_CHECK(launch_store_offsets(steps.offsets, steps.steps,
                                        offsets.mutable_data_ptr<int64_t>(), stream));
}

}  // namespace fastrnn::cuda
