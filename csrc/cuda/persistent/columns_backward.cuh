// The persistent backward kernel for float32 and TF32. As in backward.cuh one launch runs all steps
// and a block has some units of some rows. But a block that multiplies columns of W_hh needs the
// gate gradients of all units. Here a block has the rows of W_hh that belong to its own gates, all
// columns of them, and blocks exchange what each adds to dL/dh of every unit. In every step:
//   1. when the block has passed the barrier, the sums of all blocks are in the exchange buffer;
//   2. each thread adds them up for its element, one unit of one row, and applies the cell; the
//      gate gradients go to shared memory;
//   3. each warp multiplies them with its columns, for a slice of the contraction, and stores the
//      sums to the exchange buffer;
//   4. after the arrival at the next barrier, the gate gradients go to memory.
//
//   gate gradients        W_hh                          the block's part of
//   [rows, own gates]  x  [own gates, H]             =  dL/dh [rows, H]
//                         | warp 0 | warp 1 | ...       | warp 0 | warp 1 | ...
//
// For every row a block writes H sums for each of its slices, and reads as many. Blocks that
// exchange gate gradients would read G H values each, and would have to be smaller, so that there
// would be more of them. For 16 bits that gains nothing, since the sums are float32.
#pragma once
#include "../common/element.cuh"
#include "backward_prefetch.cuh"
#include "columns_part.cuh"
#include "grid_barrier.cuh"
#include "part.cuh"
#include "register_columns.cuh"
#include "tile_prefetch.cuh"

namespace fastrnn::cuda {

template <class Cell, class M>
__global__ void __launch_bounds__(column_threads)
    persistent_backward_columns(const __grid_constant__ PersistentArguments<BackwardArrays> a) {
    using In = BackwardInputs<Cell, float>;
    using Out = BackwardOutputs<Cell, float>;
    constexpr int G = Cell::gates;
    extern __shared__ float4 shared_memory[];
    const BackwardArrays& d = a.direction[blockIdx.z];
    const int H = a.size.hidden, units = a.tiling.units(), stride = a.tiling.operands_row(G);
    const bool in_order = blockIdx.z == 1;
    ColumnsPart part(a);
    const int rows_at_once = a.tiling.rows_at_once;
    float* operands = reinterpret_cast<float*>(
        shared_memory);  // [column_rows][stride]: gate gradients of a tile of rows
    float* dh_states = operands + column_rows * stride;  // the running dh: [rows, units]
    float* dc_states = dh_states + a.tiling.state();     // [rows, units]
    ThreadGradients<Cell> gradients(dc_states + Cell::has_c * a.tiling.state());
    const TilePrefetch<float, In::kinds> inputs(gradients.end(), units,
                                                min(a.tiling.group_rows, rows_at_once));
    const PartialSums partial(a, inputs.end());

    const RegisterColumns<M> columns(part.tiles(), part.chunks(), [&](int tile, int k) {
        k += part.first_k();
        const int gate = k / units, row = part.first_unit + k % units,
                  column = (part.first_tile() + tile) * 16;
        return WeightsColumns<float>{static_cast<const float*>(a.weight_hh[blockIdx.z]) +
                                         (int64_t(gate) * H + row) * H + column,
                                     H, gate < G ? H - row : 0, H - column};
    });
    // The padding stays 0.
    for (int i = threadIdx.x; i < column_rows * stride; i += blockDim.x) operands[i] = 0;
    const int all = part.rows_among(a.sequence.batch);
    int row;
    for (int row0 = 0; part.element(row0, all, row); row0 += rows_at_once) {
        const int64_t at = int64_t(part.first_row + row) * H + part.unit();
        dh_states[part.state_at(row)] = load<float>(d.dh_n, at);
        if constexpr (Cell::has_c) dc_states[part.state_at(row)] = load<float>(d.dc_n, at);
    }
    const auto prefetch = [&](int buffer, int step, int row0) {
        prefetch_backward<In>(d, a.size, part, inputs, buffer, rows_at(a.sequence, in_order, step),
                              rows_at(a.sequence, in_order, step + 1), row0, H);
    };
    // In one step more than there are, the gradients reach the initial state.
    prefetch(0, 0, 0);
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    int rows_after = 0;  // rows alive in the step after, which was handled before
    int buffer = 0;      // of `inputs`, for the current tile
    for (int step = 0; step <= a.sequence.steps; ++step) {
        const int rows = part.rows_among(rows_at(a.sequence, in_order, step).count),
                  all_rows = max(rows, rows_after);
        barrier.wait(step);
        for (int row0 = 0; row0 == 0 || row0 < all_rows; row0 += rows_at_once, buffer ^= 1) {
            const bool last = row0 + rows_at_once >= all_rows;
            inputs.wait();
            __syncthreads();  // also: the operands of the tile before have been read
            part.rematerialize();
            prefetch(buffer ^ 1, step + last, last ? 0 : row0 + rows_at_once);
            if (part.element(row0, all_rows, row)) {
                float dh = dh_states[part.state_at(row)], dc{};
                if constexpr (Cell::has_c) dc = dc_states[part.state_at(row)];
                if (row < rows_after) dh += partial.sum(step, row, part.unit());
                if (row < rows) {
                    const In in([&](int kind) {
                        return inputs.value(buffer, kind, row - row0, part.column());
                    });
                    dh += in.value[In::grad_output];
                    const Out out = backward_element<Cell, float>(in, dh, dc);
                    gradients.set(out);
                    float* to = operands + (row - row0) * stride + part.column();
                    for (int g = 0; g < G; ++g) to[g * units] = operand<M>(out.of_h(g));
                }
                dh_states[part.state_at(row)] = dh;
                if constexpr (Cell::has_c) dc_states[part.state_at(row)] = dc;
            }
            __syncthreads();
            part.rematerialize();
            if (row0 < rows)
                columns.multiply(part.tiles(), part.chunks(), operands + part.first_k(), stride,
                                 min(rows - row0, rows_at_once), [&](int tile, int i, float2 sums) {
                                     const int row = row0 + threadIdx.x % 4 + 4 * i,
                                               column = (part.first_tile() + tile) * 16 +
                                                        threadIdx.x % 32 / 4 * 2;
                                     if (row < min(rows, row0 + rows_at_once))
                                         partial.put(step + 1, part.slice(), row, column, sums);
                                 });
            if (last) barrier.arrive();
            part.rematerialize();
            if (!part.element(row0, all_rows, row)) continue;
            const int b = part.first_row + row;
            if (row < rows) {
                const int64_t at = rows_at(a.sequence, in_order, step).first + b;
                const Out out = gradients.get();
                out.store(d, H, at, part.unit());
                gradients.add(out);
                if (d.prev)
                    static_cast<float*>(d.prev)[at * H + part.unit()] =
                        inputs.value(buffer, In::h_prev, row - row0, part.column());
            } else {  // the row has reached its initial state
                const int64_t at = int64_t(b) * H + part.unit();
                static_cast<float*>(d.dh)[at] = dh_states[part.state_at(row)];
                if constexpr (Cell::has_c)
                    static_cast<float*>(d.dc)[at] = dc_states[part.state_at(row)];
            }
        }
        rows_after = rows;
    }
    gradients.finish(part, d.biases, H);
}

template <class Cell, class M>
PersistentKernel columns_backward_kernel() {
    return {.function = reinterpret_cast<const void*>(&persistent_backward_columns<Cell, M>),
            .most_threads = column_threads,
            .tile = 8,
            .outputs = 1,
            .inputs = Cell::gates,
            .states = 1 + Cell::has_c,
            .biases = 0,
            .kinds = BackwardInputs<Cell, float>::kinds,
            .grads = Cell::grads};
}

}  // namespace fastrnn::cuda
