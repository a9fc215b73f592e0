#include "plan.h"

#include <algorithm>

#include "../../cells/registry.h"
#include "../own_cell.h"

namespace fastrnn::cuda {

extern const OneBlockKernel one_block_tf32[cell_count][2];
extern const OneBlockKernel one_block_float16[cell_count][2];
extern const OneBlockKernel one_block_bfloat16[cell_count][2];

namespace {

const OneBlockKernel* find_kernel(const PlanRequest& r) {
    const int pass = static_cast<int>(r.pass);
    if (r.cell >= cell_count) {
        const OneBlockKernel* own = own_kernels(r.cell, r.storage)->one_block[r.tf32];
        return own ? own + pass : nullptr;
    }
    switch (r.storage) {
        case Storage::float32: return r.tf32 ? &one_block_tf32[r.cell][pass] : nullptr;
        case Storage::float16: return &one_block_float16[r.cell][pass];
        case Storage::bfloat16: return &one_block_bfloat16[r.cell][pass];
        default: return nullptr;
    }
}

PlanOrUnfit<OneBlockPlan> make_plan(const PlanRequest& r) {
    if (r.projected) return Unfit{"a projection"};
    const OneBlockKernel* kernel = find_kernel(r);
    if (!kernel) return Unfit{r.storage == Storage::float32 ? "float32 without TF32" : "float64"};
    if (r.batch == 0) return Unfit{"an empty batch"};
    const DeviceLimits limits(r.device);
    if (limits.major < 8) return Unfit{"compute capability below 8.0"};
    if (r.hidden > kernel->most_units)
        return Unfit{"its weights do not fit into the registers of a block"};
    // The second dimension of a grid has 65535 blocks at most.
    if (r.batch > one_block_rows * 65535) return Unfit{"a batch of more than 65535 blocks"};
    const int bytes = value_bytes(r.storage);
    const int rows = std::clamp(
        divide_up(r.batch * r.directions, std::max(limits.multiprocessors, 1)), 1, one_block_rows);
    const int chunks = divide_up(r.hidden, chunk_size) * kernel->inputs;
    const int width = chunks * chunk_size;
    const int64_t shared_bytes = 2 * rows * one_block_stride(width, bytes) * bytes +
                                 one_block_private_bytes(threads_of_units(kernel->most_units),
                                                         kernel->biases, kernel->kinds, bytes);
    if (shared_bytes > limits.shared_per_block) return Unfit{"too little shared memory"};
    allow_shared_memory(kernel->function, limits);  // registers_of fails where this does
    const std::optional<int> registers = registers_of(kernel->function);
    if (!registers) return Unfit{"no kernel for this device in this build"};
    return OneBlockPlan{.kernel = kernel,
                        .product = product_name(r.storage, r.tf32),
                        .group_rows = rows,
                        .groups = divide_up(r.batch, rows),
                        .directions = r.directions,
                        .threads = threads_of_units(static_cast<int>(r.hidden)),
                        .registers = *registers,
                        .shared_bytes = static_cast<size_t>(shared_bytes),
                        .chunks = chunks,
                        .width = width};
}

}  // namespace

PlanOrUnfit<OneBlockPlan> plan_one_block(const PlanRequest& request) {
    return cached_plan(make_plan, request);
}

}  // namespace fastrnn::cuda
