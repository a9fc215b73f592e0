// The persistent forward kernel. One launch runs all steps of both directions of a layer: weights
// stay in registers, states in shared memory. Each block computes its units of its rows. In every
// step:
//   1. when the block has passed the barrier, all of h_{t-1} is in the exchange buffer;
//   2. each warp multiplies its slice of h_{t-1} with its weights and stores sums to shared memory;
//   3. the block prefetches W_ih x of the next tile of rows, or of the next step;
//   4. each thread adds up the slices for its elements, one unit of one row each, and applies the
//      cell. h_t goes to the exchange buffer and, with what backward reads, to memory. Of the first
//      element, often the only one, only after the arrival at the next barrier: no other block
//      waits for that.
// A thread has the same elements in every step, so that no other thread reads its states.
#pragma once
#include "../../cells/dependence.h"
#include "../common/element.cuh"
#include "grid_barrier.cuh"
#include "part.cuh"
#include "register_tile.cuh"
#include "tile_prefetch.cuh"

namespace fastrnn::cuda {

template <class Cell, class M>
__global__ void __launch_bounds__(most_threads<Stored<M>>)
    persistent_forward(const __grid_constant__ PersistentArguments<ForwardArrays> a) {
    using S = Stored<M>;
    constexpr int G = Cell::gates;
    extern __shared__ float4 shared_memory[];
    const ForwardArrays& d = a.direction[blockIdx.z];
    const int H = a.size.hidden, width = a.width;
    const bool in_order = blockIdx.z == 0;
    Part<M, G, forward_tile> part(a);
    float* sums = reinterpret_cast<float*>(shared_memory);
    float* c_states = sums + 2 * a.tiling.sums(G);                             // [rows, units]
    float* h_states = c_states + Cell::has_c * a.tiling.state();               // [rows, units]
    float* biases = h_states + forward_reads_h_prev<Cell> * a.tiling.state();  // [2][G][units]
    const TilePrefetch<S, G> inputs(biases + 2 * G * a.tiling.units(), a.tiling.units(),
                                    a.tiling.most_rows());

    using Weights = RegisterTile<M, most_chunks(G, 1, forward_tile), G, forward_tile>;
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
        if constexpr (forward_reads_h_prev<Cell>) h_states[part.state_at(row)] = h;
        // Into both buffers: against time, a row of packed data starts at a later step, of either
        // parity.
        for (int step = 0; step < 2; ++step)
            exchange.of_step(step)[Weights::index(row, part.unit(), width)] = operand<M>(h);
    });
    const auto prefetch = [&](int buffer, int step, int row0) {
        const DeviceStepRows now = rows_at(a.sequence, in_order, step);
        const int64_t first = now.first + part.first_row + row0;
        inputs.prefetch(buffer, part.rows_among(now.count) - row0, H - part.first_unit,
                        [&](int gate, int row) {
                            return static_cast<const S*>(d.x) + ((first + row) * G + gate) * H +
                                   part.first_unit;
                        });
    };
    prefetch(0, 0, 0);
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    barrier.arrive();

    int buffer = 0;  // of `inputs`, for the current tile
    for (int step = 0; step < a.sequence.steps; ++step) {
        const int rows = part.rows_among(rows_at(a.sequence, in_order, step).count);
        barrier.wait(step + 1);
        for (int row0 = 0; row0 == 0 || row0 < rows; row0 += tile_rows, buffer ^= 1) {
            const bool last = row0 + tile_rows >= rows;
            part.rematerialize();
            if (row0 < rows)
                part.multiply(weights, exchange.of_step(step), width, row0, rows, sums);
            inputs.wait();
            __syncthreads();
            part.rematerialize();
            prefetch(buffer ^ 1, step + last, last ? 0 : row0 + tile_rows);
            const auto write = [&](int row, const ForwardOutputs<Cell, S>& out) {
                const int b = part.first_row + row;
                const int64_t at = rows_at(a.sequence, in_order, step).first + b,
                              state_at = int64_t(b) * H + part.unit();
                out.store_saved(d, a.size, at, part.unit());
                out.store_output(d, a.size.output_stride, at, part.unit());
                if (b >=
                    rows_at(a.sequence, in_order, step + 1).count) {  // the last step of the row
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
                    x_sum[g] = widen(inputs.value(buffer, g, row - row0, part.column())) +
                               biases[part.bias_at(g)];
                    r_sum[g] += biases[part.bias_at(G + g)];
                }
                if constexpr (Cell::has_c) c = c_states[part.state_at(row)];
                if constexpr (forward_reads_h_prev<Cell>) h_prev = h_states[part.state_at(row)];
                const auto out = forward_element<Cell, S>(x_sum, r_sum, h_prev, c);
                const float h = widen(out.h);
                exchange.of_step(step + 1)[Weights::index(row, part.unit(), width)] = operand<M>(h);
                if constexpr (Cell::has_c) c_states[part.state_at(row)] = c;
                if constexpr (forward_reads_h_prev<Cell>) h_states[part.state_at(row)] = h;
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
PersistentKernel forward_kernel() {
    return {.function = reinterpret_cast<const void*>(&persistent_forward<Cell, M>),
            .most_threads = most_threads<Stored<M>>,
            .tile = forward_tile,
            .outputs = Cell::gates,
            .inputs = 1,
            .states = Cell::has_c + forward_reads_h_prev<Cell>,
            .biases = 2 * Cell::gates,
            .kinds = Cell::gates,
            .grads = 0};
}

}  // namespace fastrnn::cuda
