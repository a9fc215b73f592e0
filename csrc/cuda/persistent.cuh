// The persistent kernels: one launch runs all steps of both directions of a layer. Weights stay in
// registers, states in shared memory. Each block computes its units of its rows, step after step:
//   1. at the barrier, all of h_{t-1} (backward: of the gate gradients) is in the exchange buffer;
//   2. each warp multiplies its slice of it with its weights, and leaves sums in shared memory;
//   3. what the next step needs beside its product is asked for;
//   4. each thread adds up the slices for its elements, one unit of one row each, and applies the
//      cell; the results go to the exchange buffer, and to memory: those of the first element, often
//      the only one, after the arrival at the next barrier, since no other block waits for them.
// An element belongs to the same thread in every step, so that its states are that thread's own.
// Included by persistent_*.cu, one for each type that products are of.
#pragma once
#include "../cells/registry.h"
#include "element.cuh"
#include "grid_barrier.cuh"
#include "persistent_kernel.h"
#include "resident.cuh"
#include "step_rows.cuh"
#include "tile_inputs.cuh"

namespace fastrnn::cuda {

// Worked out wherever it is used: there are no registers to keep it in.
__device__ __forceinline__ StepRows rows_at(const Sequence& s, bool in_order, int step) {
    asm volatile("" : "+r"(step));
    return rows_of(s, in_order, step);
}

// A block's part of the work, and a warp's and a thread's part of that. O: outputs of a unit; tile:
// units of a tile. What is counted here fits into an int: the plan sees to it.
template <class M, int O, int tile>
class Part {
    using S = Stored<M>;

public:
    template <class Arguments>
    __device__ __forceinline__ explicit Part(const Arguments& a)
        : tiling_(a.tiling),
          column_(threadIdx.x % a.tiling.units()),
          first_unit(blockIdx.x * a.tiling.units()),
          first_row(blockIdx.y * a.tiling.group_rows) {
        const int first = slice() * a.tiling.slice;
        first_unit_ = first_unit + own_tile() * tile;
        first_k_ = first * chunk_size;
        chunks_ = min(a.tiling.slice, a.chunks - first);
        // A thread without a unit has no rows either.
        unit_row_ = unit() < a.size.hidden ? threadIdx.x / a.tiling.units() : tile_rows;
    }

    // Has the compiler work out anew what follows from the thread's place: else it keeps addresses of
    // the whole loop in registers that the product needs.
    __device__ __forceinline__ void forget() { asm volatile("" : "+r"(column_), "+r"(unit_row_)); }

    // Rows of the group among the first n of the batch.
    __device__ __forceinline__ int rows_among(int n) const {
        return max(0, min(n - first_row, tiling_.group_rows));
    }

    // Whether the thread's i-th element of the tile of rows from row0 on is one of `count` rows of
    // the group; row: which.
    __device__ __forceinline__ bool element(int row0, int i, int count, int& row) const {
        const int row_of_tile = unit_row_ + i * (32 / tile) * tiling_.slices;
        row = row0 + row_of_tile;
        return row_of_tile < tile_rows && row < count;
    }

    // Calls f(row) for each of the thread's elements in `count` rows of the group.
    template <class F>
    __device__ __forceinline__ void for_each_element(int count, F f) const {
        int row;
        for (int row0 = 0; row0 < count; row0 += tile_rows)
            for (int i = 0; i < most_elements; ++i)
                if (element(row0, i, count, row)) f(row);
    }

    // The thread's unit in the block, and in the layer.
    __device__ __forceinline__ int column() const { return column_; }
    __device__ __forceinline__ int unit() const { return first_unit + column_; }
    __device__ __forceinline__ int state_at(int row) const {
        return row * tiling_.units() + column_;
    }
    __device__ __forceinline__ int bias_at(int bias) const {
        return bias * tiling_.units() + column_;
    }
    // One thread of those that have the same unit.
    __device__ __forceinline__ bool first_of_unit() const { return unit_row_ == 0; }

    // The warp's weights. weights_of(unit, output, k): those of a chunk from k on, of which a unit
    // has a row.
    template <class Weights, class WeightsOf>
    __device__ __forceinline__ void load_rows(Weights& weights, WeightsOf weights_of) {
        weights.load_rows(chunks_, [&](int unit_of_tile, int output, int chunk) {
            return weights_of(first_unit_ + unit_of_tile, output, first_k_ + chunk * chunk_size);
        });
        place_sums();
    }
    // The same where a unit has a column. weights_of(unit, k): of the unit and those after it.
    template <class Weights, class WeightsOf>
    __device__ __forceinline__ void load_columns(Weights& weights, WeightsOf weights_of) {
        weights.load_columns(chunks_, [&](int chunk) {
            return weights_of(first_unit_, first_k_ + chunk * chunk_size);
        });
        place_sums();
    }

    // Multiplies a tile of rows. The sums are complete after the next __syncthreads. That is enough
    // also before the next tile, which uses the other of two buffers.
    template <class Weights>
    __device__ __forceinline__ void multiply(const Weights& weights, const S* exchange, int width,
                                             int row0, int count, float* sums) const {
        weights.multiply(exchange + row0 * width, width, first_k_, count - row0, chunks_,
                         sums + turn(row0) * tiling_.sums(O) + warp_sums_, tiling_.sums_row(O));
    }

    // Adds to total [O] the sums of all slices, in a fixed order.
    __device__ __forceinline__ void add_sums(const float* sums, int row, float* total) const {
        constexpr int stored = stored_outputs(O);
        sums += turn(row) * tiling_.sums(O) + column_ / tile * tiling_.sums_tile(O) +
                row % tile_rows * tiling_.sums_row(O) + column_ % tile * stored;
        const int of_a_slice = tiling_.tiles * tiling_.sums_tile(O);
#pragma unroll 1
        for (int k = 0; k < tiling_.slices; ++k, sums += of_a_slice) {
            alignas(16) float some[stored];
            if constexpr (stored == 4)
                *reinterpret_cast<float4*>(some) = *reinterpret_cast<const float4*>(sums);
            else
                memcpy(some, sums, sizeof some);
#pragma unroll
            for (int output = 0; output < O; ++output) total[output] += some[output];
        }
    }

private:
    // Of the warp.
    __device__ __forceinline__ int own_tile() const { return threadIdx.x / 32 % tiling_.tiles; }
    __device__ __forceinline__ int slice() const { return threadIdx.x / 32 / tiling_.tiles; }

    // Not before the weights are there, whose loads take all registers.
    __device__ __forceinline__ void place_sums() {
        warp_sums_ = (slice() * tiling_.tiles + own_tile()) * tiling_.sums_tile(O);
    }

    static __device__ __forceinline__ int turn(int row) { return row / tile_rows % 2; }

    const Tiling& tiling_;
    int column_;  // of the thread's unit in the block
    int first_unit_, first_k_, chunks_, unit_row_, warp_sums_;

public:
    const int first_unit;  // of the block
    const int first_row;   // of the group
};

// The group's rows of the exchange buffer, [2][whole tiles of rows][width]: in shared memory where
// the group is a single block.
template <class S, class Arguments>
class Exchange {
public:
    __device__ __forceinline__ Exchange(const Arguments& a, void* shared)
        : a_(a), memory_(static_cast<S*>(shared)) {
        if (gridDim.x == 1) {
            for (int i = threadIdx.x; i < 2 * of_group(); i += blockDim.x)
                memory_[i] = narrow<S>(0);
            __syncthreads();
        } else {
            memory_ = static_cast<S*>(a.exchange) +
                      (blockIdx.z * gridDim.y + blockIdx.y) * int64_t(of_group());
        }
    }

    // What is read in a step, and written in the step before. Worked out wherever it is used: there
    // are no registers to keep it in.
    __device__ __forceinline__ S* of_step(int step) const {
        const int groups = gridDim.x == 1 ? 1 : gridDim.z * gridDim.y;
        return memory_ + (step & 1) * int64_t(groups) * of_group();
    }

private:
    __device__ __forceinline__ int of_group() const { return a_.tiling.whole_tiles() * a_.width; }

    const Arguments& a_;
    S* memory_;
};

__device__ __forceinline__ unsigned* counter_of_group(unsigned* counters) {
    return counters + (blockIdx.z * gridDim.y + blockIdx.y) * counter_stride;
}

template <class Cell, class M>
__global__ void __launch_bounds__(most_threads<Stored<M>>)
    persistent_forward(const __grid_constant__ PersistentArguments<ForwardDirection> a) {
    using S = Stored<M>;
    constexpr int G = Cell::gates;
    extern __shared__ float4 shared_memory[];
    const ForwardDirection& d = a.direction[blockIdx.z];
    const int H = a.size.hidden, width = a.width;
    const bool in_order = blockIdx.z == 0;
    Part<M, G, forward_tile> part(a);
    float* sums = reinterpret_cast<float*>(shared_memory);
    float* c_states = sums + 2 * a.tiling.sums(G);                     // [rows, units]
    float* h_states = c_states + Cell::has_c * a.tiling.state();       // [rows, units]
    float* biases = h_states + Cell::needs_h_prev * a.tiling.state();  // [2][G][units]
    const TileInputs<S, G> inputs(biases + 2 * G * a.tiling.units(), a.tiling.units(),
                                  a.tiling.most_rows());

    using Weights = Resident<M, most_chunks(G, 1, forward_tile), G, forward_tile>;
    Weights weights;
    part.load_rows(weights, [&](int own, int gate, int k) {
        return WeightsRow<S>{
            static_cast<const S*>(a.weight_hh[blockIdx.z]) + (int64_t(gate) * H + own) * H + k,
            own < H ? H - k : 0};
    });
    const Exchange<S, decltype(a)> exchange(a, inputs.end());
    if (part.first_of_unit())
        for (int g = 0; g < G; ++g) {
            biases[part.bias_at(g)] = load<S>(d.bias_ih, g * H + part.unit());
            biases[part.bias_at(G + g)] = load<S>(d.bias_hh, g * H + part.unit());
        }
    part.for_each_element(part.rows_among(a.sequence.batch), [&](int row) {
        const int64_t at = int64_t(part.first_row + row) * H + part.unit();
        const float h = load<S>(d.h0, at);
        if constexpr (Cell::has_c) c_states[part.state_at(row)] = load<S>(d.c0, at);
        if constexpr (Cell::needs_h_prev) h_states[part.state_at(row)] = h;
        // Into both: a row that joins later finds it at whatever step.
        for (int step = 0; step < 2; ++step)
            exchange.of_step(step)[Weights::place(row, part.unit(), width)] = operand<M>(h);
    });
    const auto ask = [&](int turn, int step, int row0) {
        const StepRows asked = rows_at(a.sequence, in_order, step);
        const int64_t first = asked.first + part.first_row + row0;
        inputs.ask(turn, part.rows_among(asked.rows) - row0, H - part.first_unit,
                   [&](int gate, int row) {
                       return static_cast<const S*>(d.x) + ((first + row) * G + gate) * H +
                              part.first_unit;
                   });
    };
    ask(0, 0, 0);
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    barrier.arrive();

    int turn = 0;  // of `inputs`
    for (int step = 0; step < a.sequence.steps; ++step) {
        const int rows = part.rows_among(rows_at(a.sequence, in_order, step).rows);
        barrier.wait(step + 1);
        for (int row0 = 0; row0 == 0 || row0 < rows; row0 += tile_rows, turn ^= 1) {
            const bool last = row0 + tile_rows >= rows;
            part.forget();
            if (row0 < rows)
                part.multiply(weights, exchange.of_step(step), width, row0, rows, sums);
            inputs.arrived();
            __syncthreads();
            part.forget();
            ask(turn ^ 1, step + last, last ? 0 : row0 + tile_rows);
            const auto write = [&](int row, const ForwardOutputs<Cell, S>& out) {
                const int b = part.first_row + row;
                const int64_t at = rows_at(a.sequence, in_order, step).first + b,
                              state_at = int64_t(b) * H + part.unit();
                out.keep(d, H, at, part.unit());
                out.put(d, a.size.output_stride, at, part.unit());
                if (b >= rows_at(a.sequence, in_order, step + 1).rows) {  // its last step
                    static_cast<S*>(d.h)[state_at] = out.h;
                    if constexpr (Cell::has_c)
                        store<S>(d.c_n, state_at, c_states[part.state_at(row)]);
                }
            };
            Packed<ForwardOutputs<Cell, S>> first;
            int row;
#pragma unroll
            for (int i = 0; i < most_elements; ++i) {
                if (!part.element(row0, i, rows, row)) continue;
                float x_sum[G], r_sum[G] = {}, h_prev{}, c{};
                part.add_sums(sums, row, r_sum);
                for (int g = 0; g < G; ++g) {
                    x_sum[g] = widen(inputs.value(turn, g, row - row0, part.column())) +
                               biases[part.bias_at(g)];
                    r_sum[g] += biases[part.bias_at(G + g)];
                }
                if constexpr (Cell::has_c) c = c_states[part.state_at(row)];
                if constexpr (Cell::needs_h_prev) h_prev = h_states[part.state_at(row)];
                const auto out = forward_element<Cell, S>(x_sum, r_sum, h_prev, c);
                const float h = widen(out.h);
                exchange.of_step(step + 1)[Weights::place(row, part.unit(), width)] = operand<M>(h);
                if constexpr (Cell::has_c) c_states[part.state_at(row)] = c;
                if constexpr (Cell::needs_h_prev) h_states[part.state_at(row)] = h;
                if (i == 0)
                    first = Packed(out);
                else
                    write(row, out);
            }
            if (last) barrier.arrive();
            if (part.element(row0, 0, rows, row)) write(row, first.value());
        }
    }
}

template <class Cell, class M>
__global__ void __launch_bounds__(most_threads<Stored<M>>)
    persistent_backward(const __grid_constant__ PersistentArguments<BackwardDirection> a) {
    using S = Stored<M>;
    using In = BackwardInputs<Cell, S>;
    constexpr int G = Cell::gates;
    extern __shared__ float4 shared_memory[];
    const BackwardDirection& d = a.direction[blockIdx.z];
    const LayerSize& z = a.size;
    const int H = z.hidden, width = a.width, gate_width = width / G;
    const bool in_order = blockIdx.z == 1;
    Part<M, 1, backward_tile<S>> part(a);
    float* sums = reinterpret_cast<float*>(shared_memory);
    float* dh_states = sums + 2 * a.tiling.sums(1);   // what is known of dh: [rows, units]
    float* dc_states = dh_states + a.tiling.state();  // [rows, units]
    const TileInputs<S, In::kinds> inputs(dc_states + Cell::has_c * a.tiling.state(),
                                          a.tiling.units(), a.tiling.most_rows());

    using Weights = Resident<M, most_chunks(1, G, backward_tile<S>), 1, backward_tile<S>>;
    Weights weights;
    part.load_columns(weights, [&](int own, int k) {
        const int gate = k / gate_width, row = k % gate_width;
        return WeightsColumns<S>{
            static_cast<const S*>(a.weight_hh[blockIdx.z]) + (int64_t(gate) * H + row) * H + own, H,
            H - row, H - own};
    });
    const Exchange<S, decltype(a)> exchange(a, inputs.end());
    part.for_each_element(part.rows_among(a.sequence.batch), [&](int row) {
        const int64_t at = int64_t(part.first_row + row) * H + part.unit();
        dh_states[part.state_at(row)] = load<S>(d.dh_n, at);
        if constexpr (Cell::has_c) dc_states[part.state_at(row)] = load<S>(d.dc_n, at);
    });
    const auto ask = [&](int turn, int step, int row0) {
        const StepRows asked = rows_at(a.sequence, in_order, step),
                       next = rows_at(a.sequence, in_order, step + 1);
        inputs.ask(
            turn, part.rows_among(asked.rows) - row0, H - part.first_unit, [&](int kind, int row) {
                const int b = part.first_row + row0 + row;
                const BackwardRow at{b, asked.first + b, b < next.rows ? next.first + b : -1};
                const S* from = In::source(d, z, at, kind);
                return from ? from + part.first_unit : nullptr;
            });
    };
    // One step more than there are: the last takes the first step's gradients to the initial state.
    ask(0, 0, 0);
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    barrier.arrive();

    int linked = 0;  // rows that were alive in the step handled before
    int turn = 0;    // of `inputs`
    for (int step = 0; step <= a.sequence.steps; ++step) {
        const int rows = part.rows_among(rows_at(a.sequence, in_order, step).rows),
                  all_rows = max(rows, linked);
        barrier.wait(step + 1);
        for (int row0 = 0; row0 == 0 || row0 < all_rows; row0 += tile_rows, turn ^= 1) {
            const bool last = row0 + tile_rows >= all_rows;
            part.forget();
            if (row0 < linked)
                part.multiply(weights, exchange.of_step(step), width, row0, linked, sums);
            inputs.arrived();
            __syncthreads();
            part.forget();
            ask(turn ^ 1, step + last, last ? 0 : row0 + tile_rows);
            const auto write = [&](int row, const BackwardOutputs<Cell, S>& out) {
                const int b = part.first_row + row;
                const int64_t at = rows_at(a.sequence, in_order, step).first + b,
                              state_at = int64_t(b) * H + part.unit();
                if (row < rows) {
                    out.keep(d, H, at, part.unit());
                    if (d.prev)
                        static_cast<S*>(d.prev)[at * H + part.unit()] =
                            inputs.value(turn, In::h_prev, row - row0, part.column());
                } else {  // at its initial state
                    static_cast<float*>(d.dh)[state_at] = dh_states[part.state_at(row)];
                    if constexpr (Cell::has_c)
                        static_cast<float*>(d.dc)[state_at] = dc_states[part.state_at(row)];
                }
            };
            Packed<BackwardOutputs<Cell, S>> first;
            int row;
#pragma unroll
            for (int i = 0; i < most_elements; ++i) {
                if (!part.element(row0, i, all_rows, row)) continue;
                float dh = dh_states[part.state_at(row)], dc{};
                if constexpr (Cell::has_c) dc = dc_states[part.state_at(row)];
                if (row < linked) {
                    float sum[1] = {};
                    part.add_sums(sums, row, sum);
                    dh += sum[0];
                }
                BackwardOutputs<Cell, S> out;
                if (row < rows) {
                    const In in([&](int kind) {
                        return inputs.value(turn, kind, row - row0, part.column());
                    });
                    dh += widen(in.value[In::grad_output]);
                    out = backward_element<Cell, S>(in, dh, dc);
                    for (int g = 0; g < G; ++g)
                        exchange.of_step(
                            step + 1)[Weights::place(row, g * gate_width + part.unit(), width)] =
                            operand<M>(widen(out.of_h(g)));
                }
                dh_states[part.state_at(row)] = dh;
                if constexpr (Cell::has_c) dc_states[part.state_at(row)] = dc;
                if (i == 0)
                    first = Packed(out);
                else
                    write(row, out);
            }
            if (last) barrier.arrive();
            if (part.element(row0, 0, all_rows, row)) write(row, first.value());
        }
        linked = rows;
    }
}

}  // namespace fastrnn::cuda

// Defines `persistent_<suffix>`: the kernels of each cell of the registry, in its order.
#define FASTRNN_ENTRY(name, Cell)                                                          \
    {{reinterpret_cast<const void*>(&persistent_forward<Cell, Multiplied>),                \
      most_threads<Stored<Multiplied>>, forward_tile, Cell::gates, 1,                      \
      Cell::has_c + Cell::needs_h_prev, 2 * Cell::gates, Cell::gates},                     \
     {reinterpret_cast<const void*>(&persistent_backward<Cell, Multiplied>),               \
      most_threads<Stored<Multiplied>>, backward_tile<Stored<Multiplied>>, 1, Cell::gates, \
      1 + Cell::has_c, 0, BackwardInputs<Cell, Stored<Multiplied>>::kinds}},
#define FASTRNN_DEFINE_PERSISTENT(suffix, multiplied)                                         \
    namespace fastrnn::cuda {                                                                 \
    namespace {                                                                               \
    using Multiplied = multiplied;                                                            \
    }                                                                                         \
    extern const PersistentKernel persistent_##suffix[cell_count][2];                         \
    const PersistentKernel persistent_##suffix[][2] = {FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)}; \
    }
