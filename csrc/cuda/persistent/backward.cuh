// The persistent backward kernel for 16 bits. It is the loop of forward.cuh with W_hh transposed
// and the steps reversed: blocks exchange gate gradients, of which each multiplies all with its
// columns of W_hh; dh and dc are in shared memory. For float32 there is columns_backward.cuh.
#pragma once
#include "backward_elements.cuh"
#include "grid_barrier.cuh"
#include "register_tile.cuh"

namespace fastrnn::cuda {

template <class Cell, class M>
__global__ void __launch_bounds__(most_threads<Stored<M>>)
    persistent_backward(const __grid_constant__ PersistentArguments<BackwardArrays> a) {
    using S = Stored<M>;
    using In = BackwardInputs<Cell, S>;
    using Out = BackwardOutputs<Cell, S>;
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
    BackwardElements<Cell, S, decltype(part)> elements{a,         d,         part, inputs,
                                                       dh_states, dc_states, H,    in_order};
    elements.prefetch(0, 0, 0);
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    barrier.arrive();

    Packed<Out> first;  // the outputs of the thread's first element in the tile
    const auto write = [&](const BackwardTile& tile, int row, const Out& out) {
        const int64_t at = elements.row_at(tile, row);
        out.store(d, H, at, part.unit());
        elements.write_prev(tile, row, at);
    };
    backward_steps<Cell, S, 1, false>(
        a.sequence.steps,
        BackwardPath{
            .tile_rows = tile_rows,
            .rows_of = [&](int step) { return elements.rows_of(step); },
            .wait = [&](int step) { barrier.wait(step + 1); },
            .begin =
                [&](const BackwardTile& tile) {
                    part.rematerialize();
                    if (tile.row0 < tile.rows_after)
                        part.multiply(weights, exchange.of_step(tile.step), width, tile.row0,
                                      tile.rows_after, sums);
                    elements.await_inputs(tile);
                },
            .for_each_element =
                [&](const BackwardTile& tile, const auto& f) {
                    int row;
#pragma unroll
                    for (int i = 0; i < most_elements; ++i)
                        if (part.element(tile.row0, i, tile.all_rows(), row)) f(i, row);
                },
            .state = [&](int, int row) { return elements.state(row); },
            .add_product =
                [&](const BackwardTile&, int, int row, float (&dh)[1]) {
                    float sum[1] = {};
                    part.add_sums(sums, row, sum);
                    dh[0] += sum[0];
                },
            .grad_c = [&](const BackwardTile& tile, int row,
                          int) { return elements.gradient_of_c(tile, row); },
            .inputs =
                [&](const BackwardTile& tile, int, int row) {
                    return [&, row](int kind, int) { return elements.input(tile, kind, row); };
                },
            .publish =
                [&](const BackwardTile& tile, int i, int row, const auto&, const Out(&out)[1]) {
                    for (int g = 0; g < G; ++g)
                        exchange.of_step(
                            tile.step +
                            1)[Weights::index(row, g * gate_width + part.unit(), width)] =
                            operand<M>(widen(out[0].of_h(g)));
                    if (i == 0)
                        first = Packed(out[0]);
                    else
                        write(tile, row, out[0]);
                },
            .keep =
                [&](const BackwardTile& tile, int i, int row, const BackwardState<1>& state) {
                    elements.put_state(row, state);
                    if (i > 0 && row >= tile.rows) elements.write_state(row);
                },
            .multiply = [](const BackwardTile&) {},
            .arrive = [&] { barrier.arrive(); },
            .write =
                [&](const BackwardTile& tile) {
                    int row;
                    if (!part.element(tile.row0, 0, tile.all_rows(), row)) return;
                    if (row < tile.rows)
                        write(tile, row, first.value());
                    else
                        elements.write_state(row);
                },
            .next = [&](int) { elements.buffer ^= 1; }});
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
