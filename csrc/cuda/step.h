// The stepwise path: what is left of a step once the products are done elsewhere. Each launch
// handles one step of every direction it is given; directions may be at different steps, of
// different sizes.
#pragma once
#include <cuda_runtime_api.h>

#include "layer.h"

namespace fastrnn::cuda {

// A block is a tile of units along the lanes, so that accesses coalesce, and of rows: fewer where the
// batch has fewer.
constexpr int step_tile_units = 32, step_tile_rows = 16;

struct ForwardStep {
    int64_t batch;  // B
    int64_t row;    // first row of the step in the data
    int64_t rows;   // rows alive in it
    int64_t begun;  // of them alive in the step before: the others come from h0 and c0
    int64_t go_on;  // of them alive in the step after: the others end here
    const void* r;  // [rows, G * H]: W_hh h_{t-1}, or null for zeros
    const void* h;  // [begun, H], h_stride apart: h_{t-1}
    int64_t h_stride;
    const void* c;  // [begun, H] of A: c_{t-1}
    bool leaves_h;  // whether rows that go on leave h_t in the direction's h: the step after does
                    // not find it in the output
    bool leaves_c;  // likewise c_t, not in kept_c
    void* unprojected;  // [rows, H]: where h_t goes instead, if a projection follows; else null
};

struct BackwardStep {
    int64_t batch;     // B
    int64_t row;       // first row of the step in the data
    int64_t rows;      // rows alive in it; 0 in the last launch, where all have reached their start
    int64_t linked;    // rows alive in the step handled before (the next in time); 0 in the first
    int64_t prev_row;  // first row of the step to be handled next (the one before in time)
    int64_t prev_rows;  // rows alive in it: the others of `rows` came from h0 and c0
    const void* r;      // [linked, R]: dgates of the step handled before, times W_hh
    const void* dh;     // [rows, H]: dL/dh before the projection, if there is one; else null
    void* unprojected;  // [N, H] or null: h before the projection, for the gradient of W_hr
    bool first;         // of several steps: `done` becomes 0; of a single one it is so already
    bool last;          // of those with rows: the gradients of the biases become known
};

struct BackwardSum {
    BackwardStep step;  // r, and not dh
    void* dh;           // [N, R]: dL/dh_t of every row, for the gradient of W_hr
};

// Adds products and biases, applies the cell.
cudaError_t launch_forward_step(int cell, Storage storage, const LayerSize& size, int directions,
                                const ForwardDirection* direction, const ForwardStep* step,
                                cudaStream_t stream);

// Without a projection: rows that are in `linked` get in dh what comes through W_hh; rows that are
// in `rows` go on through the cell, and leave in dh and dc what they know of the step before. With
// one (step.dh), launch_backward_sum has done the former, dh is not touched here, and there is
// nothing to launch after the last step.
cudaError_t launch_backward_step(int cell, Storage storage, const LayerSize& size, int directions,
                                 const BackwardDirection* direction, const BackwardStep* step,
                                 cudaStream_t stream);

// With a projection: dL/dh_t of the projected h, to be multiplied by W_hr; and prev.
cudaError_t launch_backward_sum(Storage storage, const LayerSize& size, int directions,
                                const BackwardDirection* direction, const BackwardSum* step,
                                cudaStream_t stream);

}  // namespace fastrnn::cuda
