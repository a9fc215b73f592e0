#include "plan.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>

#include "../../cells/registry.h"
#include "../own_cell.h"

namespace fastrnn::cuda {

extern const PersistentKernel persistent_float32[cell_count][2];
extern const PersistentKernel persistent_tf32[cell_count][2];
extern const PersistentKernel persistent_float16[cell_count][2];
extern const PersistentKernel persistent_bfloat16[cell_count][2];

namespace {

const PersistentKernel* find_kernel(const PlanRequest& r) {
    const int pass = static_cast<int>(r.pass);
    if (r.cell >= cell_count) {
        const PersistentKernel* own = own_kernels(r.cell, r.storage)->persistent[r.tf32];
        return own ? own + pass : nullptr;
    }
    switch (r.storage) {
        case Storage::float32:
            return &(r.tf32 ? persistent_tf32 : persistent_float32)[r.cell][pass];
        case Storage::float16: return &persistent_float16[r.cell][pass];
        case Storage::bfloat16: return &persistent_bfloat16[r.cell][pass];
        default: return nullptr;
    }
}

int64_t exchange_size(const PersistentPlan& plan) {
    const Tiling& t = plan.tiling;
    const int64_t rows =
        plan.kernel->grads ? int64_t(plan.unit_blocks) * t.slices * t.group_rows : t.whole_tiles();
    return rows * plan.exchange_width;
}

// Of a block. A group that is a single block has its exchange buffers there.
int64_t shared_bytes(const PersistentPlan& plan, int value_bytes) {
    const PersistentKernel& kernel = *plan.kernel;
    const Tiling& t = plan.tiling;
    const int64_t exchange = plan.unit_blocks == 1 ? 2 * plan.exchange_size : 0;
    if (kernel.grads)
        return 4 *
               (int64_t(column_rows) * t.operands_row(kernel.inputs) +
                int64_t(kernel.states) * t.state() +
                int64_t(gradient_slots) * kernel.grads * plan.threads +
                2 * kernel.kinds * std::min(t.group_rows, t.rows_at_once) * t.units() + exchange);
    const int64_t floats = 2 * int64_t(t.sums(kernel.outputs)) +
                           int64_t(kernel.states) * t.state() + int64_t(kernel.biases) * t.units();
    return floats * 4 + (t.inputs(kernel.kinds) + exchange) * value_bytes;
}

class Planner {
public:
    Planner(const PersistentKernel& kernel, const DeviceLimits& limits, const PlanRequest& request)
        : kernel_(kernel),
          limits_(limits),
          request_(request),
          // Multiply-adds take 4 rows at a time; the tensor cores a whole tile, however few rows
          // there are.
          row_multiple_(is_fma() ? 4 : 1),
          tiles_(divide_up(request.hidden, kernel.tile)),
          chunks_(divide_up(request.hidden, chunk_size) * kernel.inputs),
          sector_tiles_(divide_up(request.storage == Storage::float32 ? 8 : 16, kernel.tile)),
          // A slice is a multiple of what a warp multiplies at a time: the rest would be zeros.
          step_chunks_(is_fma() ? float32_lanes(kernel.outputs) * 4 / chunk_size : 1),
          least_slices_(kernel.tile / 8),  // for most_elements
          most_warps_(kernel.most_threads / 32) {}

    // A plan of the kernel with all sizes, but for the registers; empty if the layer does not fit.
    std::optional<PersistentPlan> plan() const {
        PersistentPlan plan{.kernel = &kernel_,
                            .product = product_name(request_.storage, request_.tf32),
                            .directions = request_.directions};
        if (!(kernel_.grads ? choose_column_tiles(plan) : choose_tiles(plan))) return std::nullopt;
        return plan;
    }

private:
    bool is_fma() const { return request_.storage == Storage::float32 && !request_.tf32; }

    bool choose_tiles(PersistentPlan& plan) const {
        const int least_slices =
            std::max(divide_up(chunks_, most_chunks(kernel_.outputs, kernel_.inputs, kernel_.tile)),
                     least_slices_);
        if (least_slices > most_warps_) return false;
        if (tiles_ * least_slices <= most_warps_ && divide(plan, tiles_, least_slices)) return true;
        for (int tiles = sector_tiles_; tiles * least_slices <= most_warps_; ++tiles)
            if (divide(plan, tiles, least_slices)) return true;
        return false;
    }
    // Divides the work among blocks of so many tiles of units.
    bool divide(PersistentPlan& plan, int tiles, int least_slices) const {
        Tiling& t = plan.tiling;
        t.tile = kernel_.tile;
        t.tiles = tiles;
        // 8 lanes write at a time: sums of two rows, or with multiply-adds of four.
        t.sums_pad = is_fma() ? 8 : 4;
        // A multiprocessor has four schedulers: fewer warps leave some idle, more share them.
        t.slices = std::max(least_slices, std::min(divide_up(4, tiles), chunks_));
        t.slice = static_cast<int>(round_up(divide_up(chunks_, t.slices), step_chunks_));
        t.slices = std::max(divide_up(chunks_, t.slice), least_slices_);
        plan.unit_blocks = divide_up(tiles_, tiles);
        plan.threads = t.threads();
        plan.chunks = chunks_;
        plan.exchange_width = chunks_ * chunk_size;
        // So few rows that a thread has one element of a step, but no more than a tile.
        return divide_rows(plan,
                           round_up(std::min(plan.threads / t.units(), tile_rows), row_multiple_));
    }

    // The same for blocks that exchange partial sums.
    bool choose_column_tiles(PersistentPlan& plan) const {
        const int columns = divide_up(divide_up(request_.hidden, 16), most_warps_);
        if (columns > column_chunks) return false;
        if (divide_columns(plan, columns, tiles_)) return true;
        // Of the tiles for which one slice has room, as many as fill whole chunks.
        const int gates = kernel_.inputs, most = column_chunks / columns * chunk_size / gates;
        int tiles = most / kernel_.tile;
        while (tiles > 1 && gates * tiles * kernel_.tile % chunk_size != 0) --tiles;
        if (tiles == 1) tiles = most / kernel_.tile;
        for (tiles = std::min(tiles, tiles_ - 1); tiles > 0; --tiles)
            if (divide_columns(plan, columns, tiles)) return true;
        return false;
    }
    // columns: tiles of columns of a warp; tiles: of units of a block.
    bool divide_columns(PersistentPlan& plan, int columns, int tiles) const {
        Tiling& t = plan.tiling;
        t.tile = kernel_.tile, t.tiles = tiles, t.column_tiles = columns;
        plan.unit_blocks = divide_up(tiles_, tiles);
        plan.chunks = divide_up(kernel_.inputs * t.units(), chunk_size);
        t.slices = divide_up(plan.chunks, column_chunks / columns);
        t.slice = divide_up(plan.chunks, t.slices);
        const int warps = divide_up(divide_up(request_.hidden, 16), columns) * t.slices;
        if (warps > most_warps_) return false;
        plan.threads = warps * 32;
        plan.exchange_width = static_cast<int>(round_up(request_.hidden, 16));
        // In shared memory: the four rows that are written together are in different banks.
        if (plan.unit_blocks == 1)
            plan.exchange_width = static_cast<int>(round_up(request_.hidden, 32)) + 8;
        t.rows_at_once = std::min(plan.threads / t.units(), column_rows);
        return divide_rows(plan, std::min(t.rows_at_once, is_fma() ? 4 : column_rows));
    }

    // Divides the batch among groups of so many rows, or of more if there is no room for so many
    // blocks.
    bool divide_rows(PersistentPlan& plan, int64_t rows) const {
        Tiling& t = plan.tiling;
        const int64_t batch = request_.batch,
                      blocks = int64_t(plan.unit_blocks) * request_.directions;
        // Fewer groups have more rows and need more shared memory each: the number only falls.
        int64_t groups = (batch + rows - 1) / rows;
        while (true) {
            t.group_rows = static_cast<int>(round_up((batch + groups - 1) / groups, row_multiple_));
            groups = (batch + t.group_rows - 1) / t.group_rows;
            plan.groups = static_cast<int>(groups);
            set_memory(plan, request_.hidden, value_bytes(request_.storage));
            // The kernels index a group's exchange buffers with an int.
            const bool possible = int64_t(plan.shared_bytes) <= limits_.shared_per_block &&
                                  2 * plan.exchange_size <= std::numeric_limits<int>::max();
            const int64_t room = possible ? resident_blocks(plan) / blocks : 0;
            if (room == 0) return false;
            if (groups <= room) return true;
            groups = room;
        }
    }

    int64_t resident_blocks(const PersistentPlan& plan) const {
        int blocks = 0;
        if (!allow_shared_memory(kernel_.function, limits_)) return 0;
        if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_.function, plan.threads,
                                                          plan.shared_bytes) != cudaSuccess) {
            cudaGetLastError();
            return 0;
        }
        return int64_t(blocks) * limits_.multiprocessors;
    }

    const PersistentKernel& kernel_;
    const DeviceLimits& limits_;
    const PlanRequest& request_;
    const int row_multiple_, tiles_, chunks_, sector_tiles_, step_chunks_, least_slices_,
        most_warps_;
};

PlanOrUnfit<PersistentPlan> make_plan(const PlanRequest& r) {
    if (r.projected) return Unfit{"a projection"};
    const PersistentKernel* kernel = find_kernel(r);
    if (!kernel) return Unfit{"float64"};
    if (r.batch == 0) return Unfit{"an empty batch"};
    const DeviceLimits limits(r.device);
    if (limits.major < 8) return Unfit{"compute capability below 8.0"};
    if (!limits.cooperative) return Unfit{"no cooperative launches"};
    // Before any product of sizes that could overflow.
    if (r.hidden > 16384) return Unfit{"its blocks do not fit onto the device at once"};
    if (r.batch > std::numeric_limits<int>::max() / 2) return Unfit{"a batch beyond an int"};
    std::optional<PersistentPlan> plan = Planner(*kernel, limits, r).plan();
    if (!plan) return Unfit{"its blocks do not fit onto the device at once"};
    const std::optional<int> registers = registers_of(kernel->function);
    if (!registers) return Unfit{"no kernel for this device in this build"};
    plan->registers = *registers;
    return *plan;
}

}  // namespace

void set_memory(PersistentPlan& plan, int64_t hidden, int value_bytes) {
    const int64_t grads = plan.kernel->grads, D = plan.directions,
                  buffers = plan.unit_blocks > 1 ? 2 * D * plan.groups : 0;
    plan.exchange_size = exchange_size(plan);
    plan.shared_bytes = shared_bytes(plan, value_bytes);
    plan.done_offset = sizeof(unsigned) * counter_stride * D * plan.groups;
    plan.sums_offset = plan.done_offset + (grads > 0 ? round_up(4 * D * plan.unit_blocks, 16) : 0);
    plan.exchange_offset = plan.sums_offset + round_up(4 * D * plan.groups * grads * hidden, 16);
    plan.workspace = plan.exchange_offset + buffers * plan.exchange_size * value_bytes;
    // Partial sums are read only where they were written; a row of values with its padding.
    plan.cleared = plan.adds_up_biases() ? plan.sums_offset : plan.workspace;
}

PlanOrUnfit<PersistentPlan> plan_persistent(const PlanRequest& request) {
    return cached_plan(make_plan, request);
}

}  // namespace fastrnn::cuda
