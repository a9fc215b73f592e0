// The steps of a backward pass: the loop of all kernels that run them in one launch.
#pragma once
#include "element.cuh"

namespace fastrnn::cuda {

// The rows of a step that are handled at a time, counted within the block's group. Packed data is
// sorted by length: the rows that have a step come first.
struct BackwardTile {
    int step, row0;  // row0: the first row of the tile
    int rows;        // how many rows of the group have this step
    int rows_after;  // and the next step in time, which was handled before
    int size;        // rows of a tile
    bool last;       // the last tile of the step

    // How many rows of the group gradients have reached.
    __device__ __forceinline__ int all_rows() const { return max(rows, rows_after); }
    // The tile that is handled next.
    __device__ __forceinline__ int next_step() const { return step + last; }
    __device__ __forceinline__ int next_row0() const { return last ? 0 : row0 + size; }
};

// The running gradients of an element.
template <int units>
struct BackwardState {
    float dh[units] = {}, dc[units] = {};
};

// What differs between the kernels. An element is what a thread handles at a time: one or two units
// of a row. i counts the elements of a thread in a tile.
template <class RowsOf, class Wait, class Begin, class ForEachElement, class State,
          class AddProduct, class GradC, class Inputs, class Publish, class Keep, class Multiply,
          class Arrive, class Write, class Next>
struct BackwardPath {
    int tile_rows;
    RowsOf rows_of;  // (step): how many rows of the group have the step
    Wait wait;       // (step): waits until gate gradients of the step before, or their products,
                     // can be read
    Begin begin;     // (tile): prefetches inputs of a later tile and waits for those of this one;
                     // multiplies gate gradients of the step before with W_hh, unless `multiply`
                     // does
    ForEachElement for_each_element;  // (tile, f): calls f(i, row) for the thread's elements
    State state;                      // (i, row): the BackwardState, or a reference to it
    AddProduct add_product;           // (tile, i, row, dh): adds dL/dh from the step before
    GradC grad_c;       // (tile, row, u): what all states that were returned add to dL/dc_t
    Inputs inputs;      // (tile, i, row): a function of a kind of BackwardInputs and a unit
    Publish publish;    // (tile, i, row, inputs, out): stores what is multiplied, and stores or
                        // keeps what `write` writes
    Keep keep;          // (tile, i, row, state): keeps the state for the next step
    Multiply multiply;  // (tile): multiplies the tile's gate gradients with W_hh, unless `begin`
                        // does
    Arrive arrive;      // (): ends a step: `wait` waits for it
    Write write;        // (tile): writes what no other block waits for
    Next next;          // (step): moves on to the next tile
};

// Runs all steps, from the last in time to the first. one_tile: all rows are in one tile.
template <class Cell, class S, int units, bool one_tile, class Steps, class Path>
__device__ __forceinline__ void backward_steps(const Steps& steps, const Path& path) {
    using In = BackwardInputs<Cell, S>;
    int rows_after = 0;
    // In one step more than there are, the gradients reach the initial state.
    for (int step = 0; step <= steps; ++step) {
        const int rows = path.rows_of(step);
        const auto any_from = [&](int row) { return !one_tile && row < max(rows, rows_after); };
        path.wait(step);
        for (int row0 = 0; row0 == 0 || any_from(row0); row0 += path.tile_rows, path.next(step)) {
            const BackwardTile tile{step,       row0,           rows,
                                    rows_after, path.tile_rows, !any_from(row0 + path.tile_rows)};
            path.begin(tile);
            path.for_each_element(tile, [&](int i, int row) {
                auto&& state = path.state(i, row);
                if (row < rows_after) path.add_product(tile, i, row, state.dh);
                if (row < rows) {
                    const auto inputs = path.inputs(tile, i, row);
                    BackwardOutputs<Cell, S> out[units];
                    for (int u = 0; u < units; ++u) {
                        const In in([&](int kind) { return inputs(kind, u); });
                        state.dh[u] += widen(in.value[In::grad_output]);
                        if constexpr (Cell::has_c) state.dc[u] += path.grad_c(tile, row, u);
                        out[u] = backward_element<Cell, S>(in, state.dh[u], state.dc[u]);
                    }
                    path.publish(tile, i, row, inputs, out);
                }
                path.keep(tile, i, row, state);
            });
            path.multiply(tile);
            if (tile.last) path.arrive();
            path.write(tile);
        }
        rows_after = rows;
    }
}

}  // namespace fastrnn::cuda
