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
#include "persistent_part.cuh"
#include "resident.cuh"
#include "tile_inputs.cuh"

namespace fastrnn::cuda {

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

// Asks for what a tile of rows from row0 on needs beside its product, between the rows of a step and those
// of the next. In: its kinds.
template <class In, class Part, class Inputs>
__device__ __forceinline__ void ask_backward(const BackwardDirection& d, const LayerSize& z,
                                             const Part& part, const Inputs& inputs, int turn,
                                             const StepRows& asked, const StepRows& next, int row0,
                                             int H) {
    inputs.ask(turn, part.rows_among(asked.rows) - row0, H - part.first_unit,
               [&](int kind, int row) {
                   const int b = part.first_row + row0 + row;
                   const BackwardRow at{b, asked.first + b, b < next.rows ? next.first + b : -1};
                   const auto* from = In::source(d, z, at, kind);
                   return from ? from + part.first_unit : nullptr;
               });
}

template <class Cell, class M>
__global__ void __launch_bounds__(most_threads<Stored<M>>)
    persistent_backward(const __grid_constant__ PersistentArguments<BackwardDirection> a) {
    using S = Stored<M>;
    using In = BackwardInputs<Cell, S>;
    constexpr int G = Cell::gates;
    extern __shared__ float4 shared_memory[];
    const BackwardDirection& d = a.direction[blockIdx.z];
    const int H = a.size.hidden, width = a.width, gate_width = width / G;
    const bool in_order = blockIdx.z == 1;
    Part<M, 1, backward_tile> part(a);
    float* sums = reinterpret_cast<float*>(shared_memory);
    float* dh_states = sums + 2 * a.tiling.sums(1);   // what is known of dh: [rows, units]
    float* dc_states = dh_states + a.tiling.state();  // [rows, units]
    const TileInputs<S, In::kinds> inputs(dc_states + Cell::has_c * a.tiling.state(),
                                          a.tiling.units(), a.tiling.most_rows());

    using Weights = Resident<M, most_chunks(1, G, backward_tile), 1, backward_tile>;
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
        ask_backward<In>(d, a.size, part, inputs, turn, rows_at(a.sequence, in_order, step),
                         rows_at(a.sequence, in_order, step + 1), row0, H);
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

template <class Cell, class M>
PersistentKernel forward_kernel() {
    return {reinterpret_cast<const void*>(&persistent_forward<Cell, M>),
            most_threads<Stored<M>>,
            forward_tile,
            Cell::gates,
            1,
            Cell::has_c + Cell::needs_h_prev,
            2 * Cell::gates,
            Cell::gates,
            0};
}
template <class Cell, class M>
PersistentKernel backward_kernel() {
    return {reinterpret_cast<const void*>(&persistent_backward<Cell, M>),
            most_threads<Stored<M>>,
            backward_tile,
            1,
            Cell::gates,
            1 + Cell::has_c,
            0,
            BackwardInputs<Cell, Stored<M>>::kinds,
            0};
}

}  // namespace fastrnn::cuda

// Defines `persistent_<suffix>`: the kernels of each cell of the registry, in its order. backward:
// what is told of those of the backward pass.
#define FASTRNN_ENTRY(name, Cell) {forward_kernel<Cell, Multiplied>(), backward_of<Cell>()},
#define FASTRNN_DEFINE_PERSISTENT(suffix, multiplied, backward)                               \
    namespace fastrnn::cuda {                                                                 \
    namespace {                                                                               \
    using Multiplied = multiplied;                                                            \
    template <class Cell>                                                                     \
    PersistentKernel backward_of() {                                                          \
        return backward<Cell, Multiplied>();                                                  \
    }                                                                                         \
    }                                                                                         \
    extern const PersistentKernel persistent_##suffix[cell_count][2];                         \
    const PersistentKernel persistent_##suffix[][2] = {FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)}; \
    }
