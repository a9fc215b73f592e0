// One hidden unit of one row at one step, forward and backward: what the stepwise and the
// persistent kernels do once both products are there.
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

// h_{t-1}.
template <class S>
__device__ __forceinline__ S previous_h(const BackwardDirection& d, const LayerSize& z,
                                        const BackwardRow& row, int64_t unit) {
    return row.prev < 0 ? read<S>(d.h0, row.b * z.recurrent + unit)
                        : read<S>(d.output, row.prev * z.output_stride + unit);
}

// What a row's gradients of the gates are computed from, beside what comes through time. Apart and
// as it is stored, so that the persistent kernel can ask for it before it waits.
template <class Cell, class S>
struct BackwardInputs {
    S saved[Cell::saved + 1], h, h_prev, c, c_prev;

    __device__ __forceinline__ BackwardInputs() {
        for (int i = 0; i < Cell::saved; ++i) saved[i] = narrow<S>(0);
        h = h_prev = c = c_prev = narrow<S>(0);
    }
    __device__ __forceinline__ BackwardInputs(const BackwardDirection& d, const LayerSize& z,
                                              const BackwardRow& row, int64_t unit, bool projected)
        : BackwardInputs() {
        for (int i = 0; i < Cell::saved; ++i)
            saved[i] = read<S>(d.saved, (row.at * Cell::saved + i) * z.hidden + unit);
        if constexpr (Cell::needs_h) h = read<S>(d.output, row.at * z.output_stride + unit);
        if (!projected && (Cell::needs_h_prev || d.prev)) h_prev = previous_h<S>(d, z, row, unit);
        if constexpr (Cell::has_c) {
            c = read<S>(d.kept_c, row.at * z.hidden + unit);
            c_prev = row.prev < 0 ? read<S>(d.c0, row.b * z.hidden + unit)
                                  : read<S>(d.kept_c, row.prev * z.hidden + unit);
        }
    }
};

// Writes the gradients of the gates, and leaves them in dgates [grads]; dc: dL/dc_t, becomes
// dL/dc_{t-1}. Returns the part of dL/dh_{t-1} that does not pass through W_hh.
template <class Cell, class S>
__device__ __forceinline__ Arithmetic<S> backward_element(const BackwardDirection& d,
                                                          int64_t hidden, int64_t at, int64_t unit,
                                                          const BackwardInputs<Cell, S>& in,
                                                          Arithmetic<S> dh, Arithmetic<S>& dc,
                                                          Arithmetic<S>* dgates) {
    using A = Arithmetic<S>;
    A saved[Cell::saved + 1], dh_prev{}, dc_prev{};
    for (int i = 0; i < Cell::saved; ++i) saved[i] = widen(in.saved[i]);
    Cell::backward(saved, widen(in.h_prev), widen(in.c_prev), widen(in.h), widen(in.c), dh, dc,
                   dgates, dh_prev, dc_prev);
    for (int i = 0; i < Cell::grads; ++i)
        store<S>(d.dgates, (at * Cell::grads + i) * hidden + unit, dgates[i]);
    dc = dc_prev;
    return dh_prev;
}

}  // namespace fastrnn::cuda
