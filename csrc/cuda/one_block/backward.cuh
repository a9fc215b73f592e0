// The backward kernel of the one-block path: the loop of forward.cuh with W_hh transposed and the
// steps reversed. What is multiplied are the gate gradients, and dh and dc stay in registers.
#pragma once
#include "../common/element.cuh"
#include "block.cuh"
#include "register_units.cuh"

namespace fastrnn::cuda {

template <class Cell, class M>
__global__ void __launch_bounds__(one_block_threads(Cell::gates, sizeof(Stored<M>)))
    one_block_backward(const __grid_constant__ OneBlockArguments<BackwardArrays> a) {
    using S = Stored<M>;
    using In = BackwardInputs<Cell, S>;
    constexpr int G = Cell::gates, threads = one_block_threads(G, sizeof(S));
    extern __shared__ float4 shared_memory[];
    const LayerSize& z = a.size;
    const int H = static_cast<int>(z.hidden), gate_width = a.width / G;
    BackwardArrays d = a.direction[blockIdx.z];
    d.h0 = in_register<void>(d.h0), d.c0 = in_register<void>(d.c0),
    d.output = in_register<void>(d.output);
    d.saved = in_register<void>(d.saved), d.kept_c = in_register<void>(d.kept_c);
    d.grad_output = in_register<void>(d.grad_output);
    d.dgates = in_register<void>(d.dgates), d.prev = in_register<void>(d.prev);
    const PairPrefetch<S, In::kinds, threads> inputs(shared_memory);
    OneBlock<M> block(a,
                      has_pairs<S>(d.h0, H) && has_pairs<S>(d.c0, H) &&
                          has_pairs<S>(d.output, z.output_stride) && has_pairs<S>(d.saved, H) &&
                          has_pairs<S>(d.kept_c, H) &&
                          has_pairs<S>(d.grad_output, z.grad_output_stride) &&
                          has_pairs<S>(d.dgates, H) && has_pairs<S>(d.prev, H),
                      reinterpret_cast<char*>(shared_memory) +
                          one_block_private_bytes(threads, 0, In::kinds, sizeof(S)));
    const LaneUnits& units = block.units;

    RegisterUnits<M, G * one_block_chunks(G, sizeof(S)), 1> weights;
    weights.load_columns(a.chunks, [&](int chunk) {
        const int gate = chunk * chunk_size / gate_width, row = chunk * chunk_size % gate_width;
        return WeightsColumns<S>{static_cast<const S*>(a.weight_hh[blockIdx.z]) +
                                     (int64_t(gate) * H + row) * H + units.first(),
                                 H, H - row, units.count()};
    });
    float dh[2][2] = {}, dc[2][2] = {};  // the running gradients: [row][unit]
    const int all_rows = block.rows_among(static_cast<int>(a.sequence.batch));
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        const UnitPair<S> dh_n = units.load(row_at<S>(d.dh_n, at));
        for (int u = 0; u < 2; ++u) dh[i][u] = widen(dh_n.of[u]);
        if constexpr (Cell::has_c) {
            const UnitPair<S> dc_n = units.load(row_at<S>(d.dc_n, at));
            for (int u = 0; u < 2; ++u) dc[i][u] = widen(dc_n.of[u]);
        }
    });
    StepWindow window(a.sequence, blockIdx.z == 1);
    const auto prefetch = [&](int stage, const DeviceStepRows& now, const DeviceStepRows& before) {
        block.for_each_row(block.rows_among(now.count), [&](int i, int row) {
            const int b = block.first_row + row;
            const BackwardRow at{b, now.first + b, b < before.count ? before.first + b : -1};
#pragma unroll
            for (int kind = 0; kind < In::kinds; ++kind) {
                const S* row_of = In::source(d, z, at, kind);
                inputs.prefetch(stage, i, kind, row_of, row_of, units);
            }
        });
        inputs.commit();
    };
    prefetch(0, window[0], window[1]);
    prefetch(1, window[1], window[2]);

    int rows_after = 0;  // rows alive in the step after, which was handled before
    int stage = 0;
    // In one step more than there are, the gradients reach the initial state.
    const int steps = static_cast<int>(a.sequence.steps);
    for (int step = 0; step <= steps; ++step, stage = stage_after(stage, 1), window.advance(step)) {
        const int rows = block.rows_among(window[0].count);
        prefetch(stage_after(stage, 2), window[2],
                 step_rows(a.sequence, blockIdx.z == 1, step + 3));
        float sums[1][2][2] = {};  // [][unit][row]
        if (rows_after > 0) block.multiply(weights, a.chunks, sums);
        inputs.wait();
        block.for_each_row(max(rows, rows_after), [&](int i, int row) {
            if (row < rows_after)
                for (int u = 0; u < 2; ++u) dh[i][u] += sums[0][u][i];
            if (row >= rows) return;  // the row has reached its initial state
            UnitPair<S> values[In::kinds];
            for (int kind = 0; kind < In::kinds; ++kind)
                values[kind] = inputs.values(stage, i, kind);
            BackwardOutputs<Cell, S> out[2];
            for (int u = 0; u < 2; ++u) {
                const In in([&](int kind) { return values[kind].of[u]; });
                dh[i][u] += widen(in.value[In::grad_output]);
                out[u] = backward_element<Cell, S>(in, dh[i][u], dc[i][u]);
            }
            for (int g = 0; g < G; ++g)
                block.put(row, g * gate_width, {widen(out[0].of_h(g)), widen(out[1].of_h(g))});
            const int64_t at = window[0].first + block.first_row + row;
            S* const to = static_cast<S*>(d.dgates) + at * (stored_gradients<Cell> * H);
            out[0].for_each_stored([&](int k, int grad) {
                units.store(to + k * H, UnitPair<S>{{out[0].dgates[grad], out[1].dgates[grad]}});
            });
            if (d.prev) units.store(static_cast<S*>(d.prev) + at * H, values[In::h_prev]);
        });
        block.end_step();
        rows_after = rows;
    }
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        units.store_each(static_cast<float*>(d.dh) + at, UnitPair<float>{{dh[i][0], dh[i][1]}});
        if constexpr (Cell::has_c)
            units.store_each(static_cast<float*>(d.dc) + at, UnitPair<float>{{dc[i][0], dc[i][1]}});
    });
}

}  // namespace fastrnn::cuda
