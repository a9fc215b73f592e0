// The kernels of the stepwise path: a step without its products. Each launch handles one step of
// every direction; the directions may be at steps of different sizes.
#pragma once
#include <cuda_runtime_api.h>

#include "../common/layer_arguments.h"

namespace fastrnn::cuda {

// A block is a tile of units along the lanes, so that accesses coalesce, and of rows: fewer if the
// batch has fewer.
constexpr int step_tile_units = 32, step_tile_rows = 16;

// A row is alive in a step if the step has it: packed data has fewer and fewer rows. Before and
// after a step is meant in the order in which the direction takes the steps forward.
struct ForwardStep {
    int64_t batch;        // B
    int64_t row;          // the step's first row in the data
    int64_t rows;         // rows alive in it
    int64_t rows_before;  // those also alive in the step before; the others start from h0 and c0
    int64_t rows_after;   // those also alive in the step after; the others end here
    const void* r;        // [rows, G * H]: W_hh h_{t-1}, or null for zeros
    const void* h;        // [rows_before, H], h_stride apart: h_{t-1}
    int64_t h_stride;
    const void* c;  // [rows_before, H] of A, c_stride apart: c_{t-1}
    int64_t c_stride;
    // [B] of Event or null: those of the step, and those at which the direction enters it
    // (Sequence::entering).
    const uint8_t *events, *entering;
    bool stores_h;  // whether rows that do not end here store h_t in the direction's h, for a step
                    // after that does not read it from the output
    bool stores_c;  // whether they store c_t in the direction's c, for a step after that does not
                    // read it from kept_c
    void* unprojected;  // [rows, H]: where h_t goes if a projection follows; else null
};

struct BackwardStep {
    int64_t batch;        // B
    int64_t row;          // the step's first row in the data
    int64_t rows;         // rows alive in it; 0 in the last launch, which only completes grad_h0
    int64_t rows_after;   // rows alive in the step after, which was handled before this one; or 0
    int64_t row_before;   // first row of the step before, which is handled next
    int64_t rows_before;  // rows alive in it; the others of `rows` started from h0 and c0
    const void* r;        // [rows_after, R]: dgates of the step after, times W_hh
    const void* dh;       // [rows, H]: dL/dh_t before the projection, if there is one; else null
    // As in ForwardStep; and those at which the direction enters the step after.
    const uint8_t *events, *entering, *entering_after;
    bool has_events;    // the running dh is kept for all rows, also where `events` is null
    void* unprojected;  // [N, H] or null: h before the projection, for the gradient of W_hr
    bool first;         // the first launch of several: it sets BiasGradients::done to 0
    bool last;          // the last launch with rows: it completes the gradients of the biases
};

struct BackwardSum {
    BackwardStep step;  // with r, without dh
    void* dh;           // [N, R]: dL/dh_t of every row, for the gradient of W_hr
};

// What the kernel of a step is told.
template <class Step, class Arrays>
struct StepArguments {
    LayerSize size;
    Arrays direction[2];
    Step step[2];
};
template <class Step, class Arrays>
using StepKernel = void (*)(StepArguments<Step, Arrays>);

// Adds the products and biases, and applies the cell.
FASTRNN_API cudaError_t launch_forward_step(int cell, Storage storage, const LayerSize& size,
                                            int directions, const ForwardArrays* direction,
                                            const ForwardStep* step, cudaStream_t stream);

// With a projection and events, after the product that leaves h_t in the output: copies it to h,
// and zeros the output of rows that have ended.
FASTRNN_API cudaError_t launch_keep_ended(Storage storage, const LayerSize& size, int directions,
                                          const ForwardArrays* direction, const ForwardStep* step,
                                          cudaStream_t stream);

// Adds up dL/dh_t, applies the cell's gradients and leaves the running dh and dc for the step
// before. A row that is not alive any more, at its initial state, gets its grad_h0. With a
// projection (step.dh) launch_backward_sum has added up dL/dh_t and completed grad_h0; dh is not
// touched.
FASTRNN_API cudaError_t launch_backward_step(int cell, Storage storage, const LayerSize& size,
                                             int directions, const BackwardArrays* direction,
                                             const BackwardStep* step, cudaStream_t stream);

// With a projection: dL/dh_t of the projected h, which W_hr is then multiplied with; and prev.
FASTRNN_API cudaError_t launch_backward_sum(Storage storage, const LayerSize& size, int directions,
                                            const BackwardArrays* direction,
                                            const BackwardSum* step, cudaStream_t stream);

}  // namespace fastrnn::cuda
