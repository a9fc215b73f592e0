// The forward kernel of the one-block path, for small layers. A block runs all steps of a direction
// for up to 8 rows. Its warps have all of W_hh in their registers, 16 units each, and wait for no
// other block. In every step:
//   1. each warp multiplies all of h_{t-1}, which is in shared memory;
//   2. each lane has both sums of its two units and two rows, and applies the cell; states stay in
//      its registers;
//   3. h_t goes to the other of two buffers in shared memory and, with what backward reads, to
//      memory.
// A step is a chain of a few hundred dependent cycles. So whatever can be computed before the loop
// is.
#pragma once
#include "../common/element.cuh"
#include "block.cuh"
#include "register_units.cuh"

namespace fastrnn::cuda {

template <class Cell, class M>
__global__ void __launch_bounds__(one_block_threads(Cell::gates, sizeof(Stored<M>)))
    one_block_forward(const __grid_constant__ OneBlockArguments<ForwardArrays> a) {
    using S = Stored<M>;
    constexpr int G = Cell::gates, threads = one_block_threads(G, sizeof(S));
    extern __shared__ float4 shared_memory[];
    const ForwardArrays& d = a.direction[blockIdx.z];
    const int H = static_cast<int>(a.size.hidden);
    // Private to each thread: [2][G] pairs of biases, and the prefetched values.
    auto* biases = reinterpret_cast<UnitPair<float>*>(shared_memory) + threadIdx.x;
    const PairPrefetch<S, G, threads> inputs(biases - threadIdx.x + 2 * G * threads);
    OneBlock<M> block(a,
                      has_pairs<S>(d.x, H) && has_pairs<S>(d.output, a.size.output_stride) &&
                          has_pairs<S>(d.again, a.size.output_stride) && has_pairs<S>(d.saved, H) &&
                          has_pairs<S>(d.kept_c, a.size.c_stride),
                      reinterpret_cast<char*>(shared_memory) +
                          one_block_private_bytes(threads, 2 * G, G, sizeof(S)));
    const LaneUnits& units = block.units;

    RegisterUnits<M, one_block_chunks(G, sizeof(S)), G> weights;
    weights.load_rows(a.chunks, [&](int u, int gate, int chunk) {
        const int own = units.first() + u, k = chunk * chunk_size;
        return WeightsRow<S>{
            static_cast<const S*>(a.weight_hh[blockIdx.z]) + (int64_t(gate) * H + own) * H + k,
            own < H ? H - k : 0};
    });
    for (int g = 0; g < G; ++g) {
        const auto bias = [&](const void* b) {
            const UnitPair<S> pair = units.load(b ? static_cast<const S*>(b) + g * H : nullptr);
            return UnitPair<float>{{widen(pair.of[0]), widen(pair.of[1])}};
        };
        biases[g * threads] = bias(d.bias_ih);
        biases[(G + g) * threads] = bias(d.bias_hh);
    }
    float c[2][2] = {}, h[2][2] = {};  // [row][unit]
    const int all_rows = block.rows_among(static_cast<int>(a.sequence.batch));
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        const UnitPair<S> h0 = units.load(row_at<S>(d.h0, at));
        for (int u = 0; u < 2; ++u) h[i][u] = widen(h0.of[u]);
        if constexpr (Cell::has_c) {
            const UnitPair<S> c0 = units.load(row_at<S>(d.c0, at));
            for (int u = 0; u < 2; ++u) c[i][u] = widen(c0.of[u]);
        }
    });
    // Into both buffers: against time, a row of packed data starts at a later step, of either
    // parity.
    for (int buffer = 0; buffer < 2; ++buffer) {
        block.for_each_row(all_rows, [&](int i, int row) { block.put(row, 0, h[i]); });
        block.end_step();
    }
    StepWindow window(a.sequence, blockIdx.z == 0);
    const S* const x = in_register<const S>(d.x);
    S* const output = in_register<S>(d.output);
    S* const again = in_register<S>(d.again);
    S* const saved = in_register<S>(d.saved);
    S* const kept_c = in_register<S>(d.kept_c);
    const int output_stride = static_cast<int>(a.size.output_stride);
    const auto prefetch = [&](int stage, const DeviceStepRows& now) {
        block.for_each_row(block.rows_among(now.count), [&](int i, int row) {
            const S* of_row = x + (now.first + block.first_row + row) * (G * H);
#pragma unroll
            for (int g = 0; g < G; ++g, of_row += H)
                inputs.prefetch(stage, i, g, of_row, true, units);
        });
        inputs.commit();
    };
    prefetch(0, window[0]);
    prefetch(1, window[1]);

    int stage = 0;
    const int steps = static_cast<int>(a.sequence.steps);
    for (int step = 0; step < steps; ++step, stage = stage_after(stage, 1), window.advance(step)) {
        prefetch(stage_after(stage, 2), window[2]);
        float r_sums[G][2][2];  // [gate][unit][row]
        for (int g = 0; g < G; ++g) {
            const auto bias = load_pair<float>(biases + (G + g) * threads);
            for (int u = 0; u < 2; ++u) r_sums[g][u][0] = r_sums[g][u][1] = bias.of[u];
        }
        block.multiply(weights, a.chunks, r_sums);
        inputs.wait();
        block.for_each_row(block.rows_among(window[0].count), [&](int i, int row) {
            ForwardOutputs<Cell, S> out[2];
            float x_sum[2][G], r_sum[2][G];
            for (int g = 0; g < G; ++g) {
                const auto x_of = inputs.values(stage, i, g);
                const auto bias = load_pair<float>(biases + g * threads);
                for (int u = 0; u < 2; ++u) {
                    x_sum[u][g] = widen(x_of.of[u]) + bias.of[u];
                    r_sum[u][g] = r_sums[g][u][i];
                }
            }
            for (int u = 0; u < 2; ++u) {
                out[u] = forward_element<Cell, S>(x_sum[u], r_sum[u], h[i][u], c[i][u]);
                h[i][u] = widen(out[u].h);
            }
            block.put(row, 0, h[i]);
            const int64_t at = window[0].first + block.first_row + row;
            units.store(output + at * output_stride, UnitPair<S>{{out[0].h, out[1].h}});
            if (again) units.store(again + at * output_stride, UnitPair<S>{{out[0].h, out[1].h}});
            if (saved) {
                S* to = saved + at * (Cell::saved * H);
                for (int k = 0; k < Cell::saved; ++k, to += H)
                    units.store(to, UnitPair<S>{{out[0].saved[k], out[1].saved[k]}});
            }
            if constexpr (Cell::has_c)
                if (kept_c)
                    units.store(kept_c + at * a.size.c_stride, UnitPair<S>{{out[0].c, out[1].c}});
        });
        block.end_step();
    }
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        units.store_each(static_cast<S*>(d.h) + at,
                         UnitPair<S>{{narrow<S>(h[i][0]), narrow<S>(h[i][1])}});
        if constexpr (Cell::has_c)
            units.store_each(static_cast<S*>(d.c_n) + at,
                             UnitPair<S>{{narrow<S>(c[i][0]), narrow<S>(c[i][1])}});
    });
}

}  // namespace fastrnn::cuda
