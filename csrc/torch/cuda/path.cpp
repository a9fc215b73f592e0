#include "path.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

#include "../../cuda/one_block/launch.h"
#include "../../cuda/persistent/launch.h"
#include "problem.h"
#include "product.h"
#include "run.h"

namespace fastrnn::cuda {
namespace {

constexpr std::array<std::string_view, 3> path_names = {"stepwise", "persistent", "one_block"};

std::string name_of(Path path) { return std::string(path_names[static_cast<int>(path)]); }

// On the persistent path a group's tiles of rows run one after the other, where a product of all
// rows does not. On an H100 (bench/results/gpu.json) groups of up to 4 tiles were faster than a
// product and a launch a step. Larger groups (B = 256, H = 1024) took 1.2 to 2.4 times as long,
// except for an LSTM's training step in float16: 0.97.
constexpr int most_group_rows = 4 * tile_rows;

std::optional<Path> forced_path() {
    const char* variable = std::getenv("FASTRNN_CUDA_PATH");
    const std::string_view name = variable ? variable : "";
    if (name.empty()) return std::nullopt;
    for (size_t i = 0; i < path_names.size(); ++i)
        if (name == path_names[i]) return static_cast<Path>(i);
    TORCH_CHECK_VALUE(false, "FASTRNN_CUDA_PATH is '", name,
                      "', expected stepwise, persistent or one_block");
}

void check_not_forced(std::optional<Path> forced, Path path, const Unfit& unfit) {
    TORCH_CHECK_NOT_IMPLEMENTED(forced != path, "FASTRNN_CUDA_PATH is ", name_of(path),
                                ", but this layer can not be: ", unfit.reason);
}

// The sequence on the device, with the memory of its offsets: packed data has some.
struct SequenceOnDevice {
    at::Tensor offsets;  // [T + 1] int64
    DeviceSequence sequence;

    SequenceOnDevice(const Sequence& host, at::Device device, cudaStream_t stream)
        : sequence{.offsets = nullptr, .steps = host.steps, .batch = host.batch} {
        if (host.rows() == host.steps * host.batch) return;
        offsets = at::empty({host.steps + 1}, at::TensorOptions(device).dtype(at::kLong));
        sequence.offsets = offsets.const_data_ptr<int64_t>();
        C10_CUDA_CHECK(launch_store_offsets(host.offsets, host.steps,
                                            offsets.mutable_data_ptr<int64_t>(), stream));
    }
};

template <class Arrays>
void launch(const Plan& plan, const Problem& p, const Sequence& sequence,
            LayerArguments<Arrays>& layer, cudaStream_t stream) {
    if (const auto* one_block = std::get_if<OneBlockPlan>(&plan)) {
        const SequenceOnDevice on_device(sequence, p.device, stream);
        layer.sequence = on_device.sequence;
        C10_CUDA_CHECK(launch_one_block(*one_block, layer, stream));
        return;
    }
    const auto& persistent = std::get<PersistentPlan>(plan);
    const at::Tensor workspace = at::empty({static_cast<int64_t>(persistent.workspace)},
                                           at::TensorOptions(p.device).dtype(at::kByte));
    const SequenceOnDevice on_device(sequence, p.device, stream);
    layer.sequence = on_device.sequence;
    C10_CUDA_CHECK(launch_persistent(persistent, layer, workspace.data_ptr(), stream));
}

Facts facts_of(const StepwisePlan& plan, const Problem& p, const Sequence& sequence) {
    const int64_t products = sequence.steps * p.directions * (p.projected ? 2 : 1);
    return {{"path", name_of(Path::stepwise)},
            {"why", plan.reason},
            {"launches",
             std::to_string(sequence.steps) + " and " + std::to_string(products) + " products"}};
}

// Those of a plan of one launch.
template <class OneLaunchPlan>
Facts facts_of(const OneLaunchPlan& plan, Path path, const char* why, int unit_blocks,
               size_t workspace) {
    const int64_t blocks = int64_t(unit_blocks) * plan.groups * plan.directions;
    return {{"path", name_of(path)},
            {"why", why},
            {"product", plan.product},
            {"blocks", std::to_string(blocks) + ": " + std::to_string(plan.directions) + " x " +
                           std::to_string(plan.groups) + " parts of the rows x " +
                           std::to_string(unit_blocks) + " parts of the units"},
            {"barriers a step", unit_blocks > 1 ? "1" : "0"},
            {"threads a block", std::to_string(plan.threads)},
            {"registers a thread", std::to_string(plan.registers)},
            {"shared memory a block", std::to_string(plan.shared_bytes) + " bytes"},
            {"workspace", std::to_string(workspace) + " bytes"}};
}

}  // namespace

Plan choose_path(Pass pass, const Problem& p, const Sequence& sequence) {
    if (sequence.events) return StepwisePlan{.reason = "the rows have events"};
    const std::optional<Path> forced = forced_path();
    if (forced == Path::stepwise) return StepwisePlan{.reason = "FASTRNN_CUDA_PATH"};
    const PlanRequest request{.pass = pass,
                              .cell = p.cell_index,
                              .storage = p.storage,
                              .tf32 = tf32_allowed(p),
                              .hidden = p.hidden,
                              .batch = p.batch,
                              .directions = static_cast<int>(p.directions),
                              .projected = p.projected,
                              .device = p.device.index()};
    if (forced != Path::persistent) {
        const auto planned = plan_one_block(request);
        if (const auto* plan = std::get_if<OneBlockPlan>(&planned)) return *plan;
        check_not_forced(forced, Path::one_block, std::get<Unfit>(planned));
    }
    const auto planned = plan_persistent(request);
    if (const auto* unfit = std::get_if<Unfit>(&planned)) {
        check_not_forced(forced, Path::persistent, *unfit);
        return StepwisePlan{.reason = unfit->reason};
    }
    const auto& plan = std::get<PersistentPlan>(planned);
    if (!forced && plan.tiling.group_rows > most_group_rows)
        return StepwisePlan{.reason = "faster for so many rows"};
    return plan;
}

void run_in_one_launch(const Plan& plan, const Problem& problem, const Sequence& sequence,
                       LayerArguments<ForwardArrays>& layer, cudaStream_t stream) {
    launch(plan, problem, sequence, layer, stream);
}

void run_in_one_launch(const Plan& plan, const Problem& problem, const Sequence& sequence,
                       LayerArguments<BackwardArrays>& layer, cudaStream_t stream) {
    launch(plan, problem, sequence, layer, stream);
}

Facts explain(const Layer& layer, Pass pass) {
    const Problem p = problem_of(layer);
    const Plan plan = choose_path(pass, p, layer.sequence);
    if (const auto* stepwise = std::get_if<StepwisePlan>(&plan))
        return facts_of(*stepwise, p, layer.sequence);
    if (const auto* one_block = std::get_if<OneBlockPlan>(&plan))
        return facts_of(*one_block, Path::one_block,
                        "the weights fit into the registers of a block", 1, 0);
    const auto& persistent = std::get<PersistentPlan>(plan);
    return facts_of(persistent, Path::persistent, "all of its blocks are resident at once",
                    persistent.unit_blocks, persistent.workspace);
}

}  // namespace fastrnn::cuda
