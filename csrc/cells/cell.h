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
// and, where it has more than torch's cells (the functions below have these defaults):
//
//   c_states   the states besides h, up to max_c_states: by default 1 or 0, as has_c says
//   vectors    parameters of one value a unit, up to max_vectors, such as the peepholes of an LSTM
//   diagonal   whether W_hh is a vector a gate, [G * H]: r_g = w_g * h_{t-1} + b_g, unit by unit
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
//
// Those of a cell with several c or with vectors take arrays, V c_prev[c_states] and so on, and its
// vectors w and their gradients dw:
//
// forward(x, r, w, h_prev, c_prev, h, c, saved)
// backward(saved, w, h_prev, c_prev, h, c, dh, dc, dgates, dw, dh_prev, dc_prev)
// output(saved, w, c)
//
// The kernels call all cells by forward_of, backward_of and output_of.
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

// log(1 + exp(x)). At 0 dual numbers get no derivative from the first term and 1/2 from the second,
// together the right one.
template <class V>
FASTRNN_FN V softplus(V x) {
    using F = Math<V>;
    return F::choose(x > 0, x, V{}) + F::log1p(F::exp(F::choose(x > 0, -x, x)));
}

constexpr int max_c_states = 3, max_vectors = 8;

template <class Cell>
constexpr int c_states = Cell::has_c;
template <class Cell>
    requires requires { Cell::c_states; }
constexpr int c_states<Cell> = Cell::c_states;

template <class Cell>
constexpr int vectors = 0;
template <class Cell>
    requires requires { Cell::vectors; }
constexpr int vectors<Cell> = Cell::vectors;

template <class Cell>
constexpr bool is_diagonal = false;
template <class Cell>
    requires requires { Cell::diagonal; }
constexpr bool is_diagonal<Cell> = Cell::diagonal;

// Whether its functions take arrays.
template <class Cell>
constexpr bool takes_arrays = (c_states<Cell> > 1) || (vectors<Cell> > 0);

// Arrays of the callers: at least one element, which what a cell has not is left in.
template <class Cell>
constexpr int c_array = c_states<Cell> > 1 ? c_states<Cell> : 1;
template <class Cell>
constexpr int w_array = vectors<Cell> > 0 ? vectors<Cell> : 1;

template <class Cell, class V>
FASTRNN_FN void forward_of(const V* x, const V* r, const V* w, V h_prev, const V* c_prev, V& h,
                           V* c, V* saved) {
    if constexpr (takes_arrays<Cell>)
        Cell::forward(x, r, w, h_prev, c_prev, h, c, saved);
    else
        Cell::forward(x, r, h_prev, c_prev[0], h, c[0], saved);
}

template <class Cell, class V>
FASTRNN_FN void backward_of(const V* saved, const V* w, V h_prev, const V* c_prev, V h, const V* c,
                            V dh, const V* dc, V* dgates, V* dw, V& dh_prev, V* dc_prev) {
    if constexpr (takes_arrays<Cell>)
        Cell::backward(saved, w, h_prev, c_prev, h, c, dh, dc, dgates, dw, dh_prev, dc_prev);
    else
        Cell::backward(saved, h_prev, c_prev[0], h, c[0], dh, dc[0], dgates, dh_prev, dc_prev[0]);
}

template <class Cell, class V>
FASTRNN_FN V output_of(const V* saved, const V* w, const V* c) {
    if constexpr (takes_arrays<Cell>)
        return Cell::output(saved, w, c);
    else
        return Cell::output(saved, c[0]);
}

// Whether a projection (proj_size) may follow the cell. h_t is then not saved; `output` recomputes
// it.
template <class Cell>
constexpr bool allows_projection =
    Cell::has_c && !Cell::needs_h && !Cell::needs_h_prev && !Cell::passes_h && !is_diagonal<Cell>;

}  // namespace fastrnn
