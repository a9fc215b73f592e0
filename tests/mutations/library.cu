// The kernels that run all steps in one launch, for check.py, which calls them by ctypes: a layer
// of two directions on plain pointers. Every function returns null, or what went wrong.
#include <cstdint>
#include <numeric>
#include <variant>
#include <vector>

#include "cells/registry.h"
#include "cuda/one_block/launch.h"
#include "cuda/persistent/launch.h"

using namespace fastrnn;

// The planners refer to these kernels too, which no check here runs.
namespace fastrnn::cuda {
extern const PersistentKernel persistent_bfloat16[cell_count][2];
const PersistentKernel persistent_bfloat16[cell_count][2] = {};
extern const OneBlockKernel one_block_tf32[cell_count][2], one_block_bfloat16[cell_count][2];
const OneBlockKernel one_block_tf32[cell_count][2] = {}, one_block_bfloat16[cell_count][2] = {};
}  // namespace fastrnn::cuda

namespace {

constexpr int directions = 2;
// How a layer is run: by the persistent path's plan, by that with all rows of the batch in one
// group, or by one block.
enum Way { planned, one_group, one_block };
// What is multiplied: 16 bits, float32, or that rounded to TF32.
enum Type { float16, float32, tf32 };

// The sequence on the device.
struct SequenceOnDevice {
    int64_t* offsets = nullptr;
    cuda::DeviceSequence sequence;

    SequenceOnDevice(int64_t steps, const int64_t* sizes) {
        cudaMalloc(reinterpret_cast<void**>(&offsets), (steps + 1) * sizeof(int64_t));
        std::vector<int64_t> list(steps + 1);
        std::partial_sum(sizes, sizes + steps, list.begin() + 1);
        cuda::launch_store_offsets(list.data(), steps, offsets, nullptr);
        sequence = {.offsets = offsets, .steps = steps, .batch = sizes[0]};
    }
    ~SequenceOnDevice() { cudaFree(offsets); }
};

// Puts all rows of the batch in one group, whose blocks then handle several tiles of them: with
// room for more blocks no plan does that.
void put_in_one_group(cuda::PersistentPlan& plan, const cuda::PlanRequest& request) {
    plan.tiling.group_rows = static_cast<int>(cuda::round_up(request.batch, cuda::tile_rows));
    plan.groups = 1;
    cuda::set_memory(plan, request.hidden, cuda::value_bytes(request.storage));
}

const char* message(cudaError_t error) {
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Arrays>
const char* run(Pass pass, int cell, int type, int64_t hidden, int64_t steps, const int64_t* sizes,
                const Arrays* direction, void* const* weight_hh, int way) {
    const cuda::PlanRequest request{
        .pass = pass,
        .cell = cell,
        .storage = type == float16 ? Storage::float16 : Storage::float32,
        .tf32 = type == tf32,
        .hidden = hidden,
        .batch = sizes[0],
        .directions = directions,
        .projected = false,
        .device = 0};
    const SequenceOnDevice on_device(steps, sizes);
    cuda::LayerArguments<Arrays> layer{.size = {.hidden = hidden,
                                                .recurrent = hidden,
                                                .output_stride = hidden,
                                                .c_stride = hidden,
                                                .grad_output_stride = hidden},
                                       .sequence = on_device.sequence};
    for (int d = 0; d < directions; ++d) {
        layer.direction[d] = direction[d];
        layer.weight_hh[d] = weight_hh[d];
    }
    if (way == one_block) {
        const auto planned = cuda::plan_one_block(request);
        if (const auto* unfit = std::get_if<cuda::Unfit>(&planned)) return unfit->reason;
        return message(
            cuda::launch_one_block(std::get<cuda::OneBlockPlan>(planned), layer, nullptr));
    }
    const auto planned = cuda::plan_persistent(request);
    if (const auto* unfit = std::get_if<cuda::Unfit>(&planned)) return unfit->reason;
    auto plan = std::get<cuda::PersistentPlan>(planned);
    if (plan.unit_blocks < 2) return "there is no grid barrier to break: too few units";
    if (way == one_group) put_in_one_group(plan, request);
    void* workspace = nullptr;
    cudaMalloc(&workspace, plan.workspace);
    const char* wrong = message(cuda::launch_persistent(plan, layer, workspace, nullptr));
    cudaFree(workspace);
    return wrong;
}

}  // namespace

extern "C" {

// direction: two of what cuda/common/layer_arguments.h defines; weight_hh: [G * H, H] of each.
const char* forward(int cell, int type, int64_t hidden, int64_t steps, const int64_t* sizes,
                    const cuda::ForwardArrays* direction, void* const* weight_hh, int way) {
    return run(Pass::forward, cell, type, hidden, steps, sizes, direction, weight_hh, way);
}

const char* backward(int cell, int type, int64_t hidden, int64_t steps, const int64_t* sizes,
                     const cuda::BackwardArrays* direction, void* const* weight_hh, int way) {
    return run(Pass::backward, cell, type, hidden, steps, sizes, direction, weight_hh, way);
}
}
