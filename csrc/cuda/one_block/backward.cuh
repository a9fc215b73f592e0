// The backward kernel of the one-block path: the loop of forward.cuh with W_hh transposed and the
// steps reversed. What is multiplied are the gate gradients, and dh and dc stay in registers.
#pragma once
#include "../common/backward_steps.cuh"
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
    BackwardState<2> states[2];  // [row]
    const int all_rows = block.rows_among(static_cast<int>(a.sequence.batch));
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        const UnitPair<S> dh_n = units.load(row_at<S>(d.dh_n, at));
        for (int u = 0; u < 2; ++u) states[i].dh[u] = widen(dh_n.of[u]);
        if constexpr (Cell::has_c) {
            const UnitPair<S> dc_n = units.load(row_at<S>(d.dc_n, at));
            for (int u = 0; u < 2; ++u) states[i].dc[u] = widen(dc_n.of[u]);
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

    int stage = 0;
    float sums[1][2][2];  // [][unit][row]
    struct Inputs {
        UnitPair<S> of[In::kinds];
        __device__ __forceinline__ S operator()(int kind, int u) const { return of[kind].of[u]; }
    };
    using Out = BackwardOutputs<Cell, S>;
    backward_steps<Cell, S, 2, true>(
        static_cast<int>(a.sequence.steps),
        BackwardPath{
            .tile_rows = one_block_rows,
            .rows_of = [&](int) { return block.rows_among(window[0].count); },
            .wait = [](int) {},
            .begin =
                [&](const BackwardTile& tile) {
                    prefetch(stage_after(stage, 2), window[2],
                             step_rows(a.sequence, blockIdx.z == 1, tile.step + 3));
                    for (int u = 0; u < 2; ++u) sums[0][u][0] = sums[0][u][1] = 0;
                    if (tile.rows_after > 0) block.multiply(weights, a.chunks, sums);
                    inputs.wait();
                },
            .for_each_element = [&](const BackwardTile& tile,
                                    const auto& f) { block.for_each_row(tile.all_rows(), f); },
            .state = [&](int i, int) -> BackwardState<2>& { return states[i]; },
            .add_product =
                [&](const BackwardTile&, int i, int, float (&dh)[2]) {
                    for (int u = 0; u < 2; ++u) dh[u] += sums[0][u][i];
                },
            .grad_c =
                [&](const BackwardTile&, int row, int u) {
                    const BackwardArrays& all = a.direction[blockIdx.z];
                    return all.grad_c && u < units.count()
                               ? gradient_of_c<S>(all, z, window[0].first + block.first_row + row,
                                                  units.first() + u)
                               : 0;
                },
            .inputs =
                [&](const BackwardTile&, int i, int) {
                    Inputs values;
                    for (int kind = 0; kind < In::kinds; ++kind)
                        values.of[kind] = inputs.values(stage, i, kind);
                    return values;
                },
            .publish =
                [&](const BackwardTile&, int, int row, const Inputs& values, const Out(&out)[2]) {
                    const int64_t at = window[0].first + (block.first_row + row);
                    S* const to = static_cast<S*>(d.dgates) + at * (stored_gradients<Cell> * H);
                    out[0].for_each_stored([&](int k, int grad) {
                        units.store(to + k * H,
                                    UnitPair<S>{{out[0].dgates[grad], out[1].dgates[grad]}});
                    });
                    for (int g = 0; g < G; ++g)
                        block.put(row, g * gate_width,
                                  {widen(out[0].of_h(g)), widen(out[1].of_h(g))});
                    if (d.prev)
                        units.store(static_cast<S*>(d.prev) + at * H, values.of[In::h_prev]);
                },
            .keep = [](const BackwardTile&, int, int, const BackwardState<2>&) {},
            .multiply = [](const BackwardTile&) {},
            .arrive = [&] { block.end_step(); },
            .write = [](const BackwardTile&) {},
            .next =
                [&](int step) {
                    stage = stage_after(stage, 1);
                    window.advance(step + 1);
                }});
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        units.store_each(static_cast<float*>(d.dh) + at,
                         UnitPair<float>{{states[i].dh[0], states[i].dh[1]}});
        if constexpr (Cell::has_c)
            units.store_each(static_cast<float*>(d.dc) + at,
                             UnitPair<float>{{states[i].dc[0], states[i].dc[1]}});
    });
}

}  // namespace fastrnn::cuda
