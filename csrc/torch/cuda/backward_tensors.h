// The memory that a direction's backward pass needs besides the user's, on every path.
#pragma once
#include "../../cuda/common/layer_arguments.h"
#include "matrices.h"

namespace fastrnn::cuda {

// The running gradient of a state, [B, size] of the arithmetic type. It is computed where the user
// wants it if that memory is of this type, else in memory of its own.
struct StateGradient {
    Tensor own;
    void* data = nullptr;

    void start(const Problem& p, int64_t size, void* wanted) {
        if (p.dtype != p.arithmetic || !wanted) own = Matrices(p).arithmetic(p.batch, size);
        data = own.defined() ? own.data_ptr() : wanted;
    }
    void finish(const Problem& p, int64_t size, void* wanted) const {
        if (wanted && own.defined()) Matrices(p).tensor(wanted, {p.batch, size}).copy_(own);
    }
};

// Whether W_ih x + b_ih and W_hh h + b_hh have the same gradients.
inline bool shares_gradients(const Problem& p) { return p.cell.grads == p.cell.gates; }

// N rows of all steps, B batch, G gates, H hidden, R the size of h.
struct BackwardTensors {
    StateGradient dh;    // [B, R]
    StateGradient dc;    // [B, H], of a cell with c
    Tensor dgates;       // [N, stored gradients * H]
    Tensor prev;         // [N, R]: h_{t-1}, if W_hh's gradient needs it
    Tensor projected;    // [N, P]: dL/dh_t, if there is a projection
    Tensor unprojected;  // [N, H]: h before the projection, if W_hr's gradient is wanted

    BackwardTensors(const Problem& p, const BackwardDirection& user, bool has_events) {
        const Matrices m(p);
        const int64_t N = p.rows, H = p.hidden, R = p.recurrent;
        dh.start(p, R, user.grad_h0);
        if (p.cell.has_c) dc.start(p, H, user.grad_c0);
        dgates = m.stored(N, (shares_gradients(p) ? 1 : 2) * p.cell.gates * H);
        // Where all rows start together and from zeros, h_{t-1} is the output, B rows before: the
        // zeros add nothing to W_hh's gradient.
        const bool prev_is_output = !user.h0 && p.rows == p.steps * p.batch && !has_events;
        if (user.grads.hh && !prev_is_output) prev = m.stored(N, R);
        if (p.projected) {
            projected = m.stored(N, R);
            if (user.grads.hr) unprojected = m.stored(N, H);
        }
    }

    BackwardArrays arrays(const BackwardDirection& user) const {
        return {.h0 = user.h0,
                .c0 = user.c0,
                .output = user.output,
                .saved = user.saved,
                .kept_c = user.c,
                .grad_output = user.grad_output,
                .grad_c = user.grad_c,
                .dh_n = user.grad_h_n,
                .dc_n = user.grad_c_n,
                .dh = dh.data,
                .dc = dc.data,
                .dgates = dgates.data_ptr(),
                .prev = prev.defined() ? prev.data_ptr() : nullptr,
                .biases = {}};
    }

    // [N, G * H]: the gradients of W_ih x + b_ih, and of W_hh h + b_hh.
    Matrix of_x(const Problem& p) const {
        return Matrices(p).of(dgates).some_columns(0, p.cell.gates * p.hidden);
    }
    Matrix of_h(const Problem& p) const {
        return Matrices(p).of(dgates).some_columns(
            shares_gradients(p) ? 0 : p.cell.gates * p.hidden, p.cell.gates * p.hidden);
    }
};

}  // namespace fastrnn::cuda
