// The interface of a cell.
//
// A cell is the mathematics of ONE hidden unit at ONE time step: no loops over units, no memory, no
// torch. It is a struct of constants and static functions, templated on the value type V: a float,
// a double, a SIMD vector with one unit in each lane, or a vector of dual numbers (cpu/dual.h). The
// kernels (csrc/cpu, csrc/cuda) are templated on the cell.
//
//   gates      G: rows of weight_ih and weight_hh per hidden unit, in torch's order
//   has_c      whether there is a second state c in addition to h (LSTM)
//   saved      values per unit and step that forward saves for backward
//   grads      pre-activation gradients per unit and step that backward computes. The last G of
//              them belong to W_hh h + b_hh, in gate order. A cell that only adds its two products
//              (LSTM, RNN) has grads == gates
//   x_grad[g]  which of them belongs to gate g of W_ih x + b_ih: the first G, in any order
//   needs_h, needs_h_prev
//              whether backward reads the unit's own output h_t, or h_{t-1}
//   passes_h   whether h_t depends on h_{t-1} in another way than through W_hh, so that dh_prev is
//              not zero
// These three are checked against what the functions compute (dependence.h).
//
// For example the gradients of a GRU, with grads = 4 and x_grad = {1, 2, 0}:
//
//     index          0      1      2      3
//     dgates        x_n    r_r    r_z    r_n
//     of W_ih x     n      r      z               the first G
//     of W_hh h            r      z      n        the last G
//
// forward(x, r, h_prev, c_prev, h, c, saved)
//   x[G]: W_ih x_t + b_ih;  r[G]: W_hh h_{t-1} + b_hh
// backward(saved, h_prev, c_prev, h, c, dh, dc, dgates, dh_prev, dc_prev)
//   dh, dc: the complete gradients of h_t and c_t
//   dh_prev: the part of dL/dh_{t-1} that does not pass through W_hh
// output(saved, c): recomputes h_t from what was saved (only for cells that allow a projection)
#pragma once

#ifdef __CUDACC__
#define FASTRNN_FN constexpr __host__ __device__ __forceinline__
#else
#define FASTRNN_FN constexpr inline __attribute__((always_inline))
#endif

namespace fastrnn {

// The functions of a value type, lane by lane: sigmoid, tanh, exp, log, log1p, sqrt, erf, abs;
// choose(condition, yes, no); and number(value), a constant that need not be exact in float. Each
// device specialises it for its own types.
template <class V>
struct Math;

// Whether a projection (proj_size) may follow the cell. h_t is then not saved; `output` recomputes
// it.
template <class Cell>
constexpr bool allows_projection =
    Cell::has_c && !Cell::needs_h && !Cell::needs_h_prev && !Cell::passes_h;

}  // namespace fastrnn
