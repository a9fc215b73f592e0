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
#include "backward_elements.cuh"
#include "columns_part.cuh"
#include "grid_barrier.cuh"
#include "register_columns.cuh"

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
    BackwardElements<Cell, float, ColumnsPart> elements{a,         d,         part, inputs,
                                                        dh_states, dc_states, H,    in_order};
    int row;
    for (int row0 = 0; part.element(row0, all, row); row0 += rows_at_once) {
        const int64_t at = int64_t(part.first_row + row) * H + part.unit();
        dh_states[part.state_at(row)] = load<float>(d.dh_n, at);
        if constexpr (Cell::has_c) dc_states[part.state_at(row)] = load<float>(d.dc_n, at);
    }
    elements.prefetch(0, 0, 0);
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    backward_steps<Cell, float, 1, false>(
        a.sequence.steps,
        BackwardPath{
            .tile_rows = rows_at_once,
            .rows_of = [&](int step) { return elements.rows_of(step); },
            .wait = [&](int step) { barrier.wait(step); },
            .begin =
                [&](const BackwardTile& tile) {
                    // With a barrier: the operands of the tile before have been read.
                    elements.await_inputs(tile);
                },
            .for_each_element =
                [&](const BackwardTile& tile, const auto& f) {
                    int row;
                    if (part.element(tile.row0, tile.all_rows(), row)) f(0, row);
                },
            .state = [&](int, int row) { return elements.state(row); },
            .add_product =
                [&](const BackwardTile& tile, int, int row, float (&dh)[1]) {
                    dh[0] += partial.sum(tile.step, row, part.unit());
                },
            .grad_c = [&](const BackwardTile& tile, int row,
                          int) { return elements.gradient_of_c(tile, row); },
            .inputs =
                [&](const BackwardTile& tile, int, int row) {
                    return [&, row](int kind, int) { return elements.input(tile, kind, row); };
                },
            .publish =
                [&](const BackwardTile& tile, int, int row, const auto&, const Out(&out)[1]) {
                    gradients.set(out[0]);
                    float* to = operands + (row - tile.row0) * stride + part.column();
                    for (int g = 0; g < G; ++g) to[g * units] = operand<M>(out[0].of_h(g));
                },
            .keep = [&](const BackwardTile&, int, int row,
                        const BackwardState<1>& state) { elements.put_state(row, state); },
            .multiply =
                [&](const BackwardTile& tile) {
                    __syncthreads();
                    part.rematerialize();
                    if (tile.row0 >= tile.rows) return;
                    const auto put = [&](int columns_tile, int i, float2 sums) {
                        const int row = tile.row0 + threadIdx.x % 4 + 4 * i,
                                  column = (part.first_tile() + columns_tile) * 16 +
                                           threadIdx.x % 32 / 4 * 2;
                        if (row < min(tile.rows, tile.row0 + rows_at_once))
                            partial.put(tile.step + 1, part.slice(), row, column, sums);
                    };
                    columns.multiply(part.tiles(), part.chunks(), operands + part.first_k(), stride,
                                     min(tile.rows - tile.row0, rows_at_once), put);
                },
            .arrive = [&] { barrier.arrive(); },
            .write =
                [&](const BackwardTile& tile) {
                    part.rematerialize();
                    int row;
                    if (!part.element(tile.row0, tile.all_rows(), row)) return;
                    if (row < tile.rows) {
                        const int64_t at = elements.row_at(tile, row);
                        const Out out = gradients.get();
                        out.store(d, H, at, part.unit());
                        gradients.add(out);
                        elements.write_prev(tile, row, at);
                    } else {
                        elements.write_state(row);
                    }
                },
            .next = [&](int) { elements.buffer ^= 1; }});
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
