// The persistent backward pass in float32. As in persistent.cuh a launch runs all steps, and a block
// has some units of some rows; but what blocks exchange is not the gradients of the gates, of which each
// would need all: it is what a block's own add to dL/dh of every unit. A block holds the rows of W_hh
// that belong to its gates, all columns of them. Each step:
//   1. at the barrier, what all blocks add is in the exchange buffer;
//   2. a thread adds that up for its elements, one unit of one row each, and applies the cell; the
//      gradients of the gates go to shared memory;
//   3. each warp multiplies them with its columns, for a slice of the contraction, and puts the sums
//      into the exchange buffer;
//   4. after the arrival at the next barrier the gradients go to memory.
// So a step reads and writes 4 H values a row and block, with larger blocks than those that exchange
// gradients have, where each block would read G H. 16 bits have no such gain: sums are float32.
#pragma once
#include "bias_gradients.cuh"
#include "columns.cuh"
#include "persistent.cuh"

namespace fastrnn::cuda {

// A block's part of the work, a warp's of its product, and a thread's of the rest.
class ColumnsPart {
public:
    template <class Arguments>
    __device__ __forceinline__ explicit ColumnsPart(const Arguments& a)
        : tiling_(a.tiling),
          all_chunks_(a.chunks),
          all_tiles_((a.size.hidden + 15) / 16),
          first_unit(blockIdx.x * units()),
          first_row(blockIdx.y * tiling_.group_rows) {
        const int column = threadIdx.x % units(), row = threadIdx.x / units(),
                  warp = threadIdx.x / 32;
        // A thread without a unit has no rows either.
        const bool has = first_unit + column < a.size.hidden && row < turn_rows();
        own_ = (has ? row : column_rows) << 16 | column;
        product_ = warp % tiling_.slices << 16 | warp / tiling_.slices * tiling_.columns;
    }

    // As Part::forget.
    __device__ __forceinline__ void forget() { asm volatile("" : "+r"(own_), "+r"(product_)); }

    __device__ __forceinline__ int rows_among(int n) const {
        return max(0, min(n - first_row, tiling_.group_rows));
    }
    // Whether the thread's element of the tile of rows from row0 on is one of `count` rows of the group;
    // row: which.
    __device__ __forceinline__ bool element(int row0, int count, int& row) const {
        const int of_turn = own_ >> 16;
        row = row0 + of_turn;
        return of_turn < column_rows && row < count;
    }

    // Of the warp: its slice of the contraction, where that begins, and its tiles of columns.
    __device__ __forceinline__ int slice() const { return product_ >> 16; }
    __device__ __forceinline__ int first_k() const { return slice() * tiling_.slice * chunk_size; }
    __device__ __forceinline__ int chunks() const {
        return min(tiling_.slice, all_chunks_ - slice() * tiling_.slice);
    }
    __device__ __forceinline__ int first_tile() const { return product_ & 0xffff; }
    __device__ __forceinline__ int tiles() const {
        return min(tiling_.columns, all_tiles_ - first_tile());
    }

    // Of the thread: its unit in the block, and in the layer.
    __device__ __forceinline__ int column() const { return own_ & 0xffff; }
    __device__ __forceinline__ int unit() const { return first_unit + column(); }
    __device__ __forceinline__ int state_at(int row) const { return row * units() + column(); }
    __device__ __forceinline__ int units() const { return tiling_.units(); }
    // Rows of a tile: threads that have the same unit, and whether this is the first of them.
    __device__ __forceinline__ int turn_rows() const { return tiling_.turn; }
    __device__ __forceinline__ bool first_of_unit() const { return own_ >> 16 == 0; }

private:
    const Tiling& tiling_;
    const int& all_chunks_;
    const int all_tiles_;
    int own_;      // the thread's first row of a tile, and its unit in the block; in one register
    int product_;  // the warp's slice, and its first tile of columns

public:
    const int first_unit;  // of the block
    const int first_row;   // of the group
};

// The group's exchange buffer, [2][sources][rows][width]; a source is a slice of the contraction in a
// block. In shared memory where the group is a single block.
template <class Arguments>
class PartialSums {
public:
    __device__ __forceinline__ PartialSums(const Arguments& a, void* shared)
        : a_(a),
          memory_(gridDim.x == 1 ? static_cast<float*>(shared)
                                 : static_cast<float*>(a.exchange) +
                                       (blockIdx.z * gridDim.y + blockIdx.y) *
                                           int64_t(2 * sources() * of_source())) {}

    // For a step: sums of two columns of a row, of a slice of this block.
    __device__ __forceinline__ void put(int step, int slice, int row, int column,
                                        float2 sums) const {
        *reinterpret_cast<float2*>(at(step, blockIdx.x * a_.tiling.slices + slice, row) + column) =
            sums;
    }
    // Of all sources, in their order.
    __device__ __forceinline__ float sum(int step, int row, int column) const {
        const float* from = at(step, 0, row) + column;
        float sum = 0;
#pragma unroll 4
        for (int i = sources(); i > 0; --i, from += of_source()) sum += *from;
        return sum;
    }

private:
    // Worked out wherever they are used: there are no registers to keep them in.
    __device__ __forceinline__ int of_source() const { return a_.tiling.group_rows * a_.width; }
    __device__ __forceinline__ int sources() const { return gridDim.x * a_.tiling.slices; }
    __device__ __forceinline__ float* at(int step, int source, int row) const {
        asm volatile("" : "+r"(step));
        return memory_ + ((step & 1) * sources() + source) * of_source() + row * a_.width;
    }

    const Arguments& a_;
    float* memory_;
};

// A thread's gradients of the gates, in shared memory: those of an element that wait for the arrival at
// the barrier, for which there are no registers; and the sums of all, the biases' gradients. Those of a
// block go to memory in the end, and the last block of its units to end adds up those of all groups of
// rows, in their order.
template <class Cell>
class OwnGradients {
    using Out = BackwardOutputs<Cell, float>;

public:
    __device__ __forceinline__ explicit OwnGradients(float* memory) : memory_(memory) {
        for (int i = 0; i < Cell::grads; ++i) sum(i) = 0;
    }
    // Of all threads.
    __device__ __forceinline__ float* end() const {
        return memory_ + own_gradients * Cell::grads * blockDim.x;
    }

    __device__ __forceinline__ void keep(const Out& out) {
        for (int i = 0; i < Cell::grads; ++i) (&sum(i))[blockDim.x] = out.dgates[i];
    }
    __device__ __forceinline__ Out kept() const {
        Out out;
        for (int i = 0; i < Cell::grads; ++i) out.dgates[i] = (&sum(i))[blockDim.x];
        return out;
    }
    __device__ __forceinline__ void add(const Out& out) {
        for (int i = 0; i < Cell::grads; ++i) sum(i) += out.dgates[i];
    }

    __device__ __forceinline__ void finish(const ColumnsPart& part, const BiasGradients& to,
                                           int64_t hidden) const {
        if (!to.sums) return;
        __syncthreads();
        float* const of_groups = static_cast<float*>(to.sums);
        const auto at = [&](int group, int grad) -> float& {
            return of_groups[(int64_t(group) * Cell::grads + grad) * hidden + part.unit()];
        };
        if (part.first_of_unit())
            for (int i = 0; i < Cell::grads; ++i) {
                float sum = 0;
                for (int row = 0; row < part.turn_rows(); ++row)
                    sum += (&this->sum(i))[row * part.units()];
                at(blockIdx.y, i) = sum;
            }
        __syncthreads();
        const bool last = gridDim.y == 1 || last_to_come(to.done + blockIdx.x, gridDim.y,
                                                         *reinterpret_cast<bool*>(memory_));
        if (last && part.first_of_unit())
            store_bias_gradients<Cell, float>(to, hidden, part.unit(), gridDim.y, 0, 1, at);
    }

private:
    __device__ __forceinline__ float& sum(int grad) const {
        return memory_[own_gradients * grad * blockDim.x + thread_anew()];
    }

    float* memory_;  // [grads][own_gradients][threads]
};

template <class Cell, class M>
__global__ void __launch_bounds__(column_threads)
    persistent_backward_columns(const __grid_constant__ PersistentArguments<BackwardDirection> a) {
    using In = BackwardInputs<Cell, float>;
    using Out = BackwardOutputs<Cell, float>;
    constexpr int G = Cell::gates;
    extern __shared__ float4 shared_memory[];
    const BackwardDirection& d = a.direction[blockIdx.z];
    const int H = a.size.hidden, units = a.tiling.units(), stride = a.tiling.operands_row(G);
    const bool in_order = blockIdx.z == 1;
    ColumnsPart part(a);
    const int turn_rows = a.tiling.turn;
    float* operands =
        reinterpret_cast<float*>(shared_memory);  // [column_rows][stride], those of a turn are used
    float* dh_states = operands + column_rows * stride;  // what is known of dh: [rows, units]
    float* dc_states = dh_states + a.tiling.state();     // [rows, units]
    OwnGradients<Cell> gradients(dc_states + Cell::has_c * a.tiling.state());
    const TileInputs<float, In::kinds> inputs(gradients.end(), units,
                                              min(a.tiling.group_rows, turn_rows));
    const PartialSums partial(a, inputs.end());

    const Columns<M> columns(part.tiles(), part.chunks(), [&](int tile, int k) {
        k += part.first_k();
        const int gate = k / units, row = part.first_unit + k % units,
                  column = (part.first_tile() + tile) * 16;
        return WeightsColumns<float>{static_cast<const float*>(a.weight_hh[blockIdx.z]) +
                                         (int64_t(gate) * H + row) * H + column,
                                     H, gate < G ? H - row : 0, H - column};
    });
    // What no unit has stays 0.
    for (int i = threadIdx.x; i < column_rows * stride; i += blockDim.x) operands[i] = 0;
    const int all = part.rows_among(a.sequence.batch);
    int row;
    for (int row0 = 0; part.element(row0, all, row); row0 += turn_rows) {
        const int64_t at = int64_t(part.first_row + row) * H + part.unit();
        dh_states[part.state_at(row)] = load<float>(d.dh_n, at);
        if constexpr (Cell::has_c) dc_states[part.state_at(row)] = load<float>(d.dc_n, at);
    }
    const auto ask = [&](int turn, int step, int row0) {
        ask_backward<In>(d, a.size, part, inputs, turn, rows_at(a.sequence, in_order, step),
                         rows_at(a.sequence, in_order, step + 1), row0, H);
    };
    // One step more than there are: the last takes the first step's gradients to the initial state.
    ask(0, 0, 0);
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    int linked = 0;  // rows that were alive in the step handled before
    int turn = 0;    // of `inputs`
    for (int step = 0; step <= a.sequence.steps; ++step) {
        const int rows = part.rows_among(rows_at(a.sequence, in_order, step).rows),
                  all_rows = max(rows, linked);
        barrier.wait(step);
        for (int row0 = 0; row0 == 0 || row0 < all_rows; row0 += turn_rows, turn ^= 1) {
            const bool last = row0 + turn_rows >= all_rows;
            inputs.arrived();
            __syncthreads();  // the operands have been read, too
            part.forget();
            ask(turn ^ 1, step + last, last ? 0 : row0 + turn_rows);
            if (part.element(row0, all_rows, row)) {
                float dh = dh_states[part.state_at(row)], dc{};
                if constexpr (Cell::has_c) dc = dc_states[part.state_at(row)];
                if (row < linked) dh += partial.sum(step, row, part.unit());
                if (row < rows) {
                    const In in([&](int kind) {
                        return inputs.value(turn, kind, row - row0, part.column());
                    });
                    dh += in.value[In::grad_output];
                    const Out out = backward_element<Cell, float>(in, dh, dc);
                    gradients.keep(out);
                    float* to = operands + (row - row0) * stride + part.column();
                    for (int g = 0; g < G; ++g) to[g * units] = operand<M>(out.of_h(g));
                }
                dh_states[part.state_at(row)] = dh;
                if constexpr (Cell::has_c) dc_states[part.state_at(row)] = dc;
            }
            __syncthreads();
            part.forget();
            if (row0 < rows)
                columns.multiply(part.tiles(), part.chunks(), operands + part.first_k(), stride,
                                 min(rows - row0, turn_rows), [&](int tile, int i, float2 sums) {
                                     const int row = row0 + threadIdx.x % 4 + 4 * i,
                                               column = (part.first_tile() + tile) * 16 +
                                                        threadIdx.x % 32 / 4 * 2;
                                     if (row < min(rows, row0 + turn_rows))
                                         partial.put(step + 1, part.slice(), row, column, sums);
                                 });
            if (last) barrier.arrive();
            part.forget();
            if (!part.element(row0, all_rows, row)) continue;
            const int b = part.first_row + row;
            if (row < rows) {
                const int64_t at = rows_at(a.sequence, in_order, step).first + b;
                const Out out = gradients.kept();
                out.keep(d, H, at, part.unit());
                gradients.add(out);
                if (d.prev)
                    static_cast<float*>(d.prev)[at * H + part.unit()] =
                        inputs.value(turn, In::h_prev, row - row0, part.column());
            } else {  // at its initial state
                const int64_t at = int64_t(b) * H + part.unit();
                static_cast<float*>(d.dh)[at] = dh_states[part.state_at(row)];
                if constexpr (Cell::has_c)
                    static_cast<float*>(d.dc)[at] = dc_states[part.state_at(row)];
            }
        }
        linked = rows;
    }
    gradients.finish(part, d.biases, H);
}

template <class Cell, class M>
PersistentKernel columns_backward_kernel() {
    return {reinterpret_cast<const void*>(&persistent_backward_columns<Cell, M>),
            column_threads,
            8,
            1,
            Cell::gates,
            1 + Cell::has_c,
            0,
            BackwardInputs<Cell, float>::kinds,
            Cell::grads};
}

}  // namespace fastrnn::cuda
