// One hidden unit of one row at one step, forward and backward: what the stepwise and the persistent
// kernels do once both products are there.
#pragma once
#include "layer.h"
#include "math.cuh"

namespace fastrnn::cuda {

// Applies the cell and keeps what backward needs.
//   at: the row of the data; x, r [G]: both products with their biases; c: c_{t-1}, becomes c_t
// Returns h_t as the storage type has it.
template <class Cell, class S>
__device__ __forceinline__ Arithmetic<S> forward_element(const ForwardDirection& d, int64_t hidden,
                                                         int64_t at, int64_t unit,
                                                         const Arithmetic<S>* x,
                                                         const Arithmetic<S>* r,
                                                         Arithmetic<S> h_prev, Arithmetic<S>& c) {
    using A = Arithmetic<S>;
    A h{}, c_next{}, saved[Cell::saved + 1];
    Cell::forward(x, r, h_prev, c, h, c_next, saved);
    if (d.saved)
        for (int i = 0; i < Cell::saved; ++i)
            store<S>(d.saved, (at * Cell::saved + i) * hidden + unit, saved[i]);
    if constexpr (Cell::has_c) {
        c = c_next;
        if (d.kept_c) store<S>(d.kept_c, at * hidden + unit, c);
    }
    return widen(narrow<S>(h));
}

// The way of a row through time, backward.
struct BackwardRow {
    int64_t b;     // in the batch
    int64_t at;    // in the data
    int64_t prev;  // in the data at the step that came before in the forward pass, or -1 if that
                   // was the initial state
};

// h_{t-1}, which is also left for the gradient of W_hh if that is wanted.
template <class S>
__device__ __forceinline__ Arithmetic<S> previous_h(const BackwardDirection& d, const LayerSize& z,
                                                    const BackwardRow& row, int64_t unit) {
    const auto h = row.prev < 0 ? load<S>(d.h0, row.b * z.recurrent + unit)
                                : load<S>(d.output, row.prev * z.output_stride + unit);
    if (d.prev) store<S>(d.prev, row.at * z.recurrent + unit, h);
    return h;
}

// dL/dh_t: what is known of it, and what the user's loss says of this step's output.
template <class S>
__device__ __forceinline__ Arithmetic<S> whole_dh(const BackwardDirection& d, const LayerSize& z,
                                                  int64_t at, int64_t unit, Arithmetic<S> known) {
    return known + load<S>(d.grad_output, at * z.grad_output_stride + unit);
}

// What a row's gradients of the gates are computed from, beside dh, dc and h_{t-1}. Apart, so that
// the persistent kernel can read it while it waits for dh.
template <class Cell, class S>
struct BackwardInputs {
    using A = Arithmetic<S>;
    A saved[Cell::saved + 1], h{}, c{}, c_prev{};

    __device__ __forceinline__ BackwardInputs() {}
    __device__ __forceinline__ BackwardInputs(const BackwardDirection& d, const LayerSize& z,
                                              const BackwardRow& row, int64_t unit) {
        for (int i = 0; i < Cell::saved; ++i)
            saved[i] = load<S>(d.saved, (row.at * Cell::saved + i) * z.hidden + unit);
        if constexpr (Cell::needs_h) h = load<S>(d.output, row.at * z.output_stride + unit);
        if constexpr (Cell::has_c) {
            c = load<S>(d.kept_c, row.at * z.hidden + unit);
            c_prev = row.prev < 0 ? load<S>(d.c0, row.b * z.hidden + unit)
                                  : load<S>(d.kept_c, row.prev * z.hidden + unit);
        }
    }
};

// Writes the gradients of the gates, and leaves them in dgates [grads]; dc: dL/dc_t, becomes
// dL/dc_{t-1}.
// Returns the part of dL/dh_{t-1} that does not pass through W_hh.
template <class Cell, class S>
__device__ __forceinline__ Arithmetic<S> backward_element(const BackwardDirection& d,
                                                          int64_t hidden, int64_t at, int64_t unit,
                                                          const BackwardInputs<Cell, S>& in,
                                                          Arithmetic<S> h_prev, Arithmetic<S> dh,
                                                          Arithmetic<S>& dc,
                                                          Arithmetic<S>* dgates) {
    using A = Arithmetic<S>;
    A dh_prev{}, dc_prev{};
    Cell::backward(in.saved, h_prev, in.c_prev, in.h, in.c, dh, dc, dgates, dh_prev, dc_prev);
    for (int i = 0; i < Cell::grads; ++i)
        store<S>(d.dgates, (at * Cell::grads + i) * hidden + unit, dgates[i]);
    dc = dc_prev;
    return dh_prev;
}

}  // namespace fastrnn::cuda
