// What every cell in this folder is written against.
//
// A cell is the mathematics of ONE hidden unit at ONE time step: no loops over units, no memory, no
// torch. It is a struct of constants and two static functions, templated on the value type V: a
// float, a double, or a SIMD vector that holds the same unit position of several units. The kernels
// (csrc/cpu, csrc/cuda) are templated on the cell.
//
//   gates      G: rows of weight_ih and weight_hh per hidden unit, in torch's order
//   has_c      whether there is a second state c beside h (LSTM)
//   saved      values per unit and step that forward keeps for backward
//   grads      pre-activation gradients per unit and step that backward produces. The last G of
//              them belong to W_hh h + b_hh, in gate order. A cell whose two products only meet in
//              a sum (LSTM, RNN) has grads == gates
//   x_grad[g]  which of them belongs to gate g of W_ih x + b_ih: the first G, in any order
//   needs_h, needs_h_prev
//              whether backward reads the unit's own output h_t, or h_{t-1}
//   passes_h   whether h_{t-1} gets into h_t by another way than W_hh: whether dh_prev is not zero
//
// forward(x, r, h_prev, c_prev, h, c, saved)
//   x[G]: W_ih x_t + b_ih;  r[G]: W_hh h_{t-1} + b_hh
// backward(saved, h_prev, c_prev, h, c, dh, dc, dgates, dh_prev, dc_prev)
//   dh, dc: whole gradients of h_t and c_t
//   dh_prev: the part of dL/dh_{t-1} that does not pass through W_hh
// output(saved, c): h_t again from what was kept (only for cells that allow a projection)
#pragma once

#ifdef __CUDACC__
#define FASTRNN_FN __host__ __device__ __forceinline__
#else
#define FASTRNN_FN inline __attribute__((always_inline))
#endif

namespace fastrnn {

// sigmoid and tanh of a value type; each device specialises it for its own types.
template <class V>
struct Math;

// Whether a projection (proj_size) may follow the cell: h_t is then not kept, and has to be found again
// from what is, by `output`.
template <class Cell>
constexpr bool allows_projection =
    Cell::has_c && !Cell::needs_h && !Cell::needs_h_prev && !Cell::passes_h;

}  // namespace fastrnn
