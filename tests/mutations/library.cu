// The persistent kernels for check.py, which calls them by ctypes: a layer of two directions on
// plain pointers. Every function returns null, or what went wrong.
#include <cstdint>
#include <numeric>
#include <vector>

#include "cells/registry.h"
#include "cuda/one_block_kernel.h"
#include "cuda/persistent.h"
#include "cuda/persistent_kernel.h"

using namespace fastrnn;

// The kernels that no check here runs, which plan.cpp knows of.
namespace fastrnn::cuda {
extern const PersistentKernel persistent_bfloat16[cell_count][2];
const PersistentKernel persistent_bfloat16[cell_count][2] = {};
extern const OneBlockKernel one_block_tf32[cell_count][2], one_block_bfloat16[cell_count][2];
const OneBlockKernel one_block_tf32[cell_count][2] = {}, one_block_bfloat16[cell_count][2] = {};
}  // namespace fastrnn::cuda

namespace {

constexpr int directions = 2;
// How a layer is cut: as the plan has it, with all rows of the batch in one group, or for one
// block.
enum Way { planned, one_group, one_block };
// What is multiplied: 16 bits, float32, or that rounded to TF32.
enum Type { float16, float32, tf32 };

// The device's memory that a launch needs beside the tensors, and the sequence in it.
struct Memory {
    void* workspace = nullptr;
    int64_t* offsets = nullptr;
    cuda::Sequence sequence;

    Memory(const cuda::PersistentPlan& plan, int64_t steps, const int64_t* sizes) {
        cudaMalloc(&workspace, plan.workspace);
        cudaMalloc(reinterpret_cast<void**>(&offsets), (steps + 1) * sizeof(int64_t));
        std::vector<int64_t> list(steps + 1);
        std::partial_sum(sizes, sizes + steps, list.begin() + 1);
        cuda::launch_store_offsets(list.data(), steps, offsets, nullptr);
        sequence = {offsets, steps, sizes[0]};
    }
    ~Memory() {
        cudaFree(workspace);
        cudaFree(offsets);
    }
};

// All rows of the batch in one group, whose blocks then go through several tiles of them: a device
// with room for more blocks would not have it so.
void put_in_one_group(cuda::PersistentPlan& plan, int64_t batch, int value_bytes) {
    cuda::Tiling& tiling = plan.tiling;
    plan.workspace *= plan.groups;  // whole tiles, which `groups` times the room surely holds
    plan.cleared *= plan.groups;
    tiling.group_rows = static_cast<int>(cuda::round_up(batch, cuda::tile_rows));
    plan.groups = 1;
    plan.shared_bytes = cuda::shared_bytes(plan, value_bytes);
}

template <class Direction, class Launch>
const char* run(Pass pass, int cell, int type, int64_t hidden, int64_t steps, const int64_t* sizes,
                const Direction* direction, void* const* weight_hh, int way, Launch launch) {
    auto& plan_by = way == one_block ? cuda::plan_one_block : cuda::plan_persistent;
    cuda::PersistentPlan plan =
        plan_by(pass, cell, type == float16 ? Storage::float16 : Storage::float32, hidden, sizes[0],
                directions, /*projected=*/false, type == tf32, /*device=*/0);
    if (!plan.fits) return plan.reason;
    if (way != one_block && plan.unit_blocks < 2)
        return "there is no grid barrier to break: too few units";
    if (way == one_group) put_in_one_group(plan, sizes[0], type == float16 ? 2 : 4);
    const Memory memory(plan, steps, sizes);
    const cuda::LayerSize size{hidden, hidden, hidden, hidden};
    cudaError_t error = launch(plan, size, memory.sequence, directions, direction, weight_hh,
                               memory.workspace, nullptr);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

extern "C" {

// direction: two of what layer.h says; weight_hh: [G * H, H] of each.
const char* forward(int cell, int type, int64_t hidden, int64_t steps, const int64_t* sizes,
                    const cuda::ForwardDirection* direction, void* const* weight_hh, int way) {
    return run(Pass::forward, cell, type, hidden, steps, sizes, direction, weight_hh, way,
               cuda::launch_persistent_forward);
}

const char* backward(int cell, int type, int64_t hidden, int64_t steps, const int64_t* sizes,
                     const cuda::BackwardDirection* direction, void* const* weight_hh, int way) {
    return run(Pass::backward, cell, type, hidden, steps, sizes, direction, weight_hh, way,
               cuda::launch_persistent_backward);
}
}
