#include "plan.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>

#include "../cells/registry.h"
#include "one_block_kernel.h"
#include "persistent_kernel.h"

namespace fastrnn::cuda {

extern const PersistentKernel persistent_float32[cell_count][2];
extern const PersistentKernel persistent_tf32[cell_count][2];
extern const PersistentKernel persistent_float16[cell_count][2];
extern const PersistentKernel persistent_bfloat16[cell_count][2];
extern const OneBlockKernel one_block_tf32[cell_count][2];
extern const OneBlockKernel one_block_float16[cell_count][2];
extern const OneBlockKernel one_block_bfloat16[cell_count][2];

namespace {

struct Device {
    int major = 0, cooperative = 0, multiprocessors = 0, shared = 0;

    explicit Device(int index) {
        const auto get = [&](int& value, cudaDeviceAttr attribute) {
            if (cudaDeviceGetAttribute(&value, attribute, index) != cudaSuccess) {
                value = 0;
                cudaGetLastError();
            }
        };
        get(major, cudaDevAttrComputeCapabilityMajor);
        get(cooperative, cudaDevAttrCooperativeLaunch);
        get(multiprocessors, cudaDevAttrMultiProcessorCount);
        get(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    }
};

const PersistentKernel* kernel_of(Pass pass, int cell, Storage storage, bool tf32) {
    const int index = static_cast<int>(pass);
    switch (storage) {
        case Storage::float32: return &(tf32 ? persistent_tf32 : persistent_float32)[cell][index];
        case Storage::float16: return &persistent_float16[cell][index];
        case Storage::bfloat16: return &persistent_bfloat16[cell][index];
        default: return nullptr;
    }
}

const OneBlockKernel* one_block_kernel_of(Pass pass, int cell, Storage storage, bool tf32) {
    const int index = static_cast<int>(pass);
    switch (storage) {
        case Storage::float32: return tf32 ? &one_block_tf32[cell][index] : nullptr;
        case Storage::float16: return &one_block_float16[cell][index];
        case Storage::bfloat16: return &one_block_bfloat16[cell][index];
        default: return nullptr;
    }
}

int value_bytes(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

// Values of a group in one of its two exchange buffers.
int64_t exchanged(const PersistentPlan& plan) {
    const Tiling& t = plan.tiling;
    const int64_t rows =
        plan.kernel->grads ? int64_t(plan.unit_blocks) * t.slices * t.group_rows : t.whole_tiles();
    return rows * plan.exchange_width;
}

int divide_up(int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); }

class Planner {
public:
    Planner(const PersistentKernel& kernel, const Device& device, Storage storage, bool tf32,
            int64_t hidden, int64_t batch, int directions)
        : kernel_(kernel),
          device_(device),
          batch_(batch),
          directions_(directions),
          // What is multiplied at a time by multiply-adds; on the tensor cores it is a whole tile
          // however few rows there are.
          row_multiple_(storage == Storage::float32 && !tf32 ? 4 : 1),
          bytes_(value_bytes(storage)),
          hidden_(hidden),
          tiles_(divide_up(hidden, kernel.tile)),
          chunks_(divide_up(hidden, chunk_size) * kernel.inputs),
          sector_tiles_(divide_up(storage == Storage::float32 ? 8 : 16, kernel.tile)),
          // What lanes that have no values would multiply as well.
          step_chunks_(storage == Storage::float32 && !tf32
                           ? float32_lanes(kernel.outputs) * 4 / chunk_size
                           : 1),
          least_slices_(kernel.tile / 8),  // for most_elements
          warps_(kernel.most_threads / 32) {}

    // Sets all but the kernel, the reason and what follows from the sizes; false if it does not
    // fit.
    bool cut(PersistentPlan& plan) const {
        if (kernel_.grads) return cut_columns(plan);
        const int least_slices =
            std::max(divide_up(chunks_, most_chunks(kernel_.outputs, kernel_.inputs, kernel_.tile)),
                     least_slices_);
        if (least_slices > warps_) return false;
        if (tiles_ * least_slices <= warps_ && cut(plan, tiles_, least_slices)) return true;
        for (int tiles = sector_tiles_; tiles * least_slices <= warps_; ++tiles)
            if (cut(plan, tiles, least_slices)) return true;
        return false;
    }

private:
    // The same for blocks of so many tiles.
    bool cut(PersistentPlan& plan, int tiles, int least_slices) const {
        Tiling& t = plan.tiling;
        t.tile = kernel_.tile;
        t.tiles = tiles;
        // 8 lanes write at a time: of two rows, or by multiply-adds of four.
        t.sums_pad = row_multiple_ == 4 ? 8 : 4;
        // A multiprocessor has four schedulers: fewer warps leave some idle, more take turns.
        t.slices = std::max(least_slices, std::min(divide_up(4, tiles), chunks_));
        t.slice = static_cast<int>(round_up(divide_up(chunks_, t.slices), step_chunks_));
        t.slices = std::max(divide_up(chunks_, t.slice), least_slices_);
        plan.unit_blocks = divide_up(tiles_, tiles);
        plan.threads = t.threads();
        plan.chunks = chunks_;
        plan.exchange_width = chunks_ * chunk_size;
        // So few rows that a thread has one element of a step, if that leaves no more than a tile.
        return share_out(plan,
                         round_up(std::min(plan.threads / t.units(), tile_rows), row_multiple_));
    }

    // The same for blocks that exchange partial sums.
    bool cut_columns(PersistentPlan& plan) const {
        const int columns = divide_up(divide_up(hidden_, 16), warps_);
        if (columns > column_chunks) return false;
        if (cut_columns(plan, columns, tiles_)) return true;
        // Of the tiles that one slice has room for, as many as fill whole chunks.
        const int gates = kernel_.inputs, most = column_chunks / columns * chunk_size / gates;
        int tiles = most / kernel_.tile;
        while (tiles > 1 && gates * tiles * kernel_.tile % chunk_size != 0) --tiles;
        if (tiles == 1) tiles = most / kernel_.tile;
        for (tiles = std::min(tiles, tiles_ - 1); tiles > 0; --tiles)
            if (cut_columns(plan, columns, tiles)) return true;
        return false;
    }
    // With tiles of columns of a warp, and of units of a block.
    bool cut_columns(PersistentPlan& plan, int columns, int tiles) const {
        Tiling& t = plan.tiling;
        t.tile = kernel_.tile, t.tiles = tiles, t.columns = columns;
        plan.unit_blocks = divide_up(tiles_, tiles);
        plan.chunks = divide_up(kernel_.inputs * t.units(), chunk_size);
        t.slices = divide_up(plan.chunks, column_chunks / columns);
        t.slice = divide_up(plan.chunks, t.slices);
        const int warps = divide_up(divide_up(hidden_, 16), columns) * t.slices;
        if (warps > warps_) return false;
        plan.threads = warps * 32;
        plan.exchange_width = static_cast<int>(round_up(hidden_, 16));
        // In shared memory: such that the four rows that are written at a time are in different banks.
        if (plan.unit_blocks == 1)
            plan.exchange_width = static_cast<int>(round_up(hidden_, 32)) + 8;
        t.turn = std::min(plan.threads / t.units(), column_rows);
        plan.adds_up_biases = true;
        return share_out(plan, std::min(t.turn, row_multiple_ == 4 ? 4 : column_rows));
    }

    // Shares out the batch among groups of so many rows, or of more where there is no room.
    bool share_out(PersistentPlan& plan, int64_t rows) const {
        Tiling& t = plan.tiling;
        const int64_t blocks = int64_t(plan.unit_blocks) * directions_;
        // More groups need less shared memory each, so that the number can only go down from here.
        int64_t groups = (batch_ + rows - 1) / rows;
        while (true) {
            t.group_rows =
                static_cast<int>(round_up((batch_ + groups - 1) / groups, row_multiple_));
            groups = (batch_ + t.group_rows - 1) / t.group_rows;
            const int64_t bytes = shared_bytes(plan, bytes_);
            // The kernels count in a group's part of the exchange buffer with an int.
            const bool possible =
                bytes <= device_.shared && 2 * exchanged(plan) <= std::numeric_limits<int>::max();
            const int64_t room = possible ? resident(plan.threads, bytes) / blocks : 0;
            if (room == 0) return false;
            plan.groups = static_cast<int>(groups);
            plan.shared_bytes = bytes;
            if (groups <= room) return true;
            groups = room;
        }
    }

    // Blocks that the device holds at a time.
    int64_t resident(int threads, int64_t bytes) const {
        int blocks = 0;
        if (cudaFuncSetAttribute(kernel_.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device_.shared) != cudaSuccess ||
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_.function, threads,
                                                          bytes) != cudaSuccess) {
            cudaGetLastError();
            return 0;
        }
        return int64_t(blocks) * device_.multiprocessors;
    }

    const PersistentKernel& kernel_;
    const Device& device_;
    const int64_t batch_, hidden_;
    const int directions_, row_multiple_, bytes_, tiles_, chunks_, sector_tiles_, step_chunks_,
        least_slices_, warps_;
};

const char* product_of(Storage storage, bool tf32) {
    return storage != Storage::float32 ? "tensor cores"
           : tf32                      ? "tensor cores, in TF32"
                                       : "multiply-adds of float32";
}

// Sets the registers of the plan's kernel; false if this build has none for the device.
bool ask_registers(PersistentPlan& plan) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, plan.function) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    plan.registers = attributes.numRegs;
    return true;
}

PersistentPlan make_plan(Pass pass, int cell, Storage storage, bool tf32, int64_t hidden,
                         int64_t batch, int directions, int device_index) {
    PersistentPlan plan{};
    const auto no = [&](const char* reason) {
        plan.reason = reason;
        return plan;
    };
    plan.kernel = kernel_of(pass, cell, storage, tf32);
    if (!plan.kernel) return no("float64");
    if (batch == 0) return no("an empty batch");
    const Device device(device_index);
    if (device.major < 8) return no("compute capability below 8.0");
    if (!device.cooperative) return no("no cooperative launches");
    // Before any product of sizes that could overflow.
    if (hidden > 16384) return no("its blocks do not fit onto the device at once");
    if (batch > std::numeric_limits<int>::max() / 2) return no("a batch beyond an int");
    if (!Planner(*plan.kernel, device, storage, tf32, hidden, batch, directions).cut(plan))
        return no("its blocks do not fit onto the device at once");
    plan.function = plan.kernel->function;
    if (!ask_registers(plan)) return no("no kernel for this device in this build");
    const int64_t value = value_bytes(storage);
    const Workspace places(plan, hidden, directions);
    plan.workspace = places.exchange + (plan.unit_blocks > 1) * 2 * directions * plan.groups *
                                           value * exchanged(plan);
    // Partial sums are read only where they were written; a row of values is read with its padding.
    plan.cleared = plan.adds_up_biases ? places.sums : plan.workspace;
    plan.product = product_of(storage, tf32);
    plan.fits = true;
    plan.reason = "fits";
    return plan;
}

PersistentPlan make_one_block_plan(Pass pass, int cell, Storage storage, bool tf32, int64_t hidden,
                                   int64_t batch, int directions, int device_index) {
    PersistentPlan plan{};
    const auto no = [&](const char* reason) {
        plan.reason = reason;
        return plan;
    };
    const OneBlockKernel* kernel = one_block_kernel_of(pass, cell, storage, tf32);
    if (!kernel) return no(storage == Storage::float32 ? "float32 without TF32" : "float64");
    if (batch == 0) return no("an empty batch");
    const Device device(device_index);
    if (device.major < 8) return no("compute capability below 8.0");
    if (hidden > kernel->most_units)
        return no("its weights do not fit into the registers of a block");
    // As many blocks as the second dimension of a grid can have.
    if (batch > one_block_rows * 65535) return no("a batch of more than 65535 blocks");
    plan.function = kernel->function;
    const int rows = std::clamp(divide_up(batch * directions, std::max(device.multiprocessors, 1)),
                                1, one_block_rows);
    plan.tiling.group_rows = rows;
    plan.unit_blocks = 1;
    plan.groups = divide_up(batch, rows);
    plan.threads = threads_of_units(static_cast<int>(hidden));
    plan.chunks = divide_up(hidden, chunk_size) * kernel->inputs;
    plan.exchange_width = plan.chunks * chunk_size;
    const int bytes = value_bytes(storage);
    plan.shared_bytes = 2 * rows * one_block_stride(plan.exchange_width, bytes) * bytes +
                        one_block_own_bytes(threads_of_units(kernel->most_units), kernel->biases,
                                            kernel->kinds, bytes);
    if (int64_t(plan.shared_bytes) > device.shared) return no("too little shared memory");
    if (cudaFuncSetAttribute(plan.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device.shared) != cudaSuccess)
        cudaGetLastError();  // as below
    if (!ask_registers(plan)) return no("no kernel for this device in this build");
    plan.product = product_of(storage, tf32);
    plan.fits = true;
    plan.reason = "fits";
    return plan;
}

// Asking the runtime takes longer than a launch, and its answers do not change.
PersistentPlan plan(decltype(make_plan)& make, Pass pass, int cell, Storage storage, int64_t hidden,
                    int64_t batch, int directions, bool projected, bool tf32, int device) {
    if (projected) {
        PersistentPlan plan{};
        plan.reason = "a projection";
        return plan;
    }
    using Question = std::array<int64_t, 9>;
    static thread_local std::map<Question, PersistentPlan> known;
    const Question question = {&make == make_plan,
                               static_cast<int>(pass),
                               cell,
                               static_cast<int>(storage),
                               hidden,
                               batch,
                               directions,
                               tf32,
                               device};
    const auto found = known.find(question);
    if (found != known.end()) return found->second;
    if (known.size() >= 1000) known.clear();
    return known[question] = make(pass, cell, storage, tf32, hidden, batch, directions, device);
}

}  // namespace

int64_t shared_bytes(const PersistentPlan& plan, int value_bytes) {
    const PersistentKernel& kernel = *plan.kernel;
    const Tiling& t = plan.tiling;
    const int64_t exchange = (plan.unit_blocks == 1) * 2 * exchanged(plan);
    if (kernel.grads)
        return 4 * (int64_t(column_rows) * t.operands_row(kernel.inputs) +
                    int64_t(kernel.states) * t.state() +
                    int64_t(own_gradients) * kernel.grads * plan.threads +
                    2 * kernel.kinds * std::min(t.group_rows, t.turn) * t.units() + exchange);
    const int64_t floats = 2 * int64_t(t.sums(kernel.outputs)) +
                           int64_t(kernel.states) * t.state() + int64_t(kernel.biases) * t.units();
    return floats * 4 + (t.inputs(kernel.kinds) + exchange) * value_bytes;
}

PersistentPlan plan_persistent(Pass pass, int cell, Storage storage, int64_t hidden, int64_t batch,
                               int directions, bool projected, bool tf32, int device) {
    return plan(make_plan, pass, cell, storage, hidden, batch, directions, projected, tf32, device);
}

PersistentPlan plan_one_block(Pass pass, int cell, Storage storage, int64_t hidden, int64_t batch,
                              int directions, bool projected, bool tf32, int device) {
    return plan(make_one_block_plan, pass, cell, storage, hidden, batch, directions, projected,
                tf32, device);
}

}  // namespace fastrnn::cuda
