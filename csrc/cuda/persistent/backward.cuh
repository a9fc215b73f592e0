// The persistent backward kernel for 16 bits. It is the loop of forward.cuh with W_hh transposed
// and the steps reversed: blocks exchange gate gradients, of which each multiplies all with its
// columns of W_hh; dh and dc are in shared memory. For float32 there is columns_backward.cuh.
#pragma once
#include "../common/element.cuh"
#include "backward_prefetch.cuh"
#include "grid_barrier.cuh"
#include "part.cuh"
#include "register_tile.cuh"
#include "tile_prefetch.cuh"

namespace fastrnn::cuda {

template <class Cell, class M>
__global__ void __launch_bounds__(most_threads<Stored<M>>)
    persistent_backward(const __grid_constant__ PersistentArguments<BackwardArrays> a) {
    using S = Stored<M>;
    using In = BackwardInputs<Cell, S>;
    constexpr int G = Cell::gates;
    extern __shared__ float4 shared_memory[];
    const BackwardArrays& d = a.direction[blockIdx.z];
    const int H = a.size.hidden, width = a.width, gate_width = width / G;
    const bool in_order = blockIdx.z == 1;
    Part<M, 1, backward_tile> part(a);
    float* sums = reinterpret_cast<float*>(shared_memory);
    float* dh_states = sums + 2 * a.tiling.sums(1);   // the running dh: [rows, units]
    float* dc_states = dh_states + a.tiling.state();  // [rows, units]
    const TilePrefetch<S, In::kinds> inputs(dc_states + Cell::has_c * a.tiling.state(),
                                            a.tiling.units(), a.tiling.most_rows());

    using Weights = RegisterTile<M, most_chunks(1, G, backward_tile), 1, backward_tile>;
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
    const auto prefetch = [&](int buffer, int step, int row0) {
        prefetch_backward<In>(d, a.size, part, inputs, buffer, rows_at(a.sequence, in_order, step),
                              rows_at(a.sequence, in_order, step + 1), row0, H);
    };
    // In one step more than there are, the gradients reach the initial state.
    prefetch(0, 0, 0);
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    barrier.arrive();

    int rows_after = 0;  // rows alive in the step after, which was handled before
    int buffer = 0;      // of `inputs`, for the current tile
    for (int step = 0; step <= a.sequence.steps; ++step) {
        const int rows = part.rows_among(rows_at(a.sequence, in_order, step).count),
                  all_rows = max(rows, rows_after);
        barrier.wait(step + 1);
        for (int row0 = 0; row0 == 0 || row0 < all_rows; row0 += tile_rows, buffer ^= 1) {
            const bool last = row0 + tile_rows >= all_rows;
            part.rematerialize();
            if (row0 < rows_after)
                part.multiply(weights, exchange.of_step(step), width, row0, rows_after, sums);
            inputs.wait();
            __syncthreads();
            part.rematerialize();
            prefetch(buffer ^ 1, step + last, last ? 0 : row0 + tile_rows);
            const auto write = [&](int row, const BackwardOutputs<Cell, S>& out) {
                const int b = part.first_row + row;
                const int64_t at = rows_at(a.sequence, in_order, step).first + b,
                              state_at = int64_t(b) * H + part.unit();
                if (row < rows) {
                    out.store(d, H, at, part.unit());
                    if (d.prev)
                        static_cast<S*>(d.prev)[at * H + part.unit()] =
                            inputs.value(buffer, In::h_prev, row - row0, part.column());
                } else {  // the row has reached its initial state
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
                if (row < rows_after) {
                    float sum[1] = {};
                    part.add_sums(sums, row, sum);
                    dh += sum[0];
                }
                BackwardOutputs<Cell, S> out;
                if (row < rows) {
                    const In in([&](int kind) {
                        return inputs.value(buffer, kind, row - row0, part.column());
                    });
                    dh += widen(in.value[In::grad_output]);
                    out = backward_element<Cell, S>(in, dh, dc);
                    for (int g = 0; g < G; ++g)
                        exchange.of_step(
                            step + 1)[Weights::index(row, g * gate_width + part.unit(), width)] =
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
        rows_after = rows;
    }
}

template <class Cell, class M>
PersistentKernel backward_kernel() {
    return {.function = reinterpret_cast<const void*>(&persistent_backward<Cell, M>),
            .most_threads = most_threads<Stored<M>>,
            .tile = backward_tile,
            .outputs = 1,
            .inputs = Cell::gates,
            .states = 1 + Cell::has_c,
            .biases = 0,
            .kinds = BackwardInputs<Cell, Stored<M>>::kinds,
            .grads = 0};
}

}  // namespace fastrnn::cuda
