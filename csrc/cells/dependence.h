// What the results of a cell depend on, found by running it at compile time with a value type that
// records which inputs a value was computed from; and the proof that a cell declares what it
// computes.
#pragma once
#include <type_traits>

#include "cell.h"

namespace fastrnn {

// The inputs that a value was computed from, one bit each.
struct Dependence {
    unsigned inputs = 0;

    constexpr Dependence() = default;
    constexpr explicit Dependence(unsigned inputs) : inputs(inputs) {}
    // A literal depends on nothing.
    template <class A>
        requires std::is_arithmetic_v<A>
    constexpr Dependence(A) {}

    friend constexpr Dependence operator-(Dependence a) { return a; }
#define FASTRNN_DEPENDS_ON_BOTH(op)                                       \
    friend constexpr Dependence operator op(Dependence a, Dependence b) { \
        return Dependence(a.inputs | b.inputs);                           \
    }
    FASTRNN_DEPENDS_ON_BOTH(+)
    FASTRNN_DEPENDS_ON_BOTH(-)
    FASTRNN_DEPENDS_ON_BOTH(*)
    FASTRNN_DEPENDS_ON_BOTH(/)
    FASTRNN_DEPENDS_ON_BOTH(<)
    FASTRNN_DEPENDS_ON_BOTH(<=)
    FASTRNN_DEPENDS_ON_BOTH(>)
    FASTRNN_DEPENDS_ON_BOTH(>=)
    FASTRNN_DEPENDS_ON_BOTH(==)
    FASTRNN_DEPENDS_ON_BOTH(!=)
#undef FASTRNN_DEPENDS_ON_BOTH
};

template <>
struct Math<Dependence> {
    static constexpr Dependence sigmoid(Dependence x) { return x; }
    static constexpr Dependence tanh(Dependence x) { return x; }
    static constexpr Dependence exp(Dependence x) { return x; }
    static constexpr Dependence log(Dependence x) { return x; }
    static constexpr Dependence log1p(Dependence x) { return x; }
    static constexpr Dependence sqrt(Dependence x) { return x; }
    static constexpr Dependence erf(Dependence x) { return x; }
    static constexpr Dependence abs(Dependence x) { return x; }
    static constexpr Dependence choose(Dependence condition, Dependence yes, Dependence no) {
        return condition + yes + no;
    }
    static constexpr Dependence number(double) { return {}; }
};

// What a cell's forward and backward read, and whether dh_prev is anything but zero.
struct Reads {
    bool forward_h_prev, h_prev, h, dh_prev;
};

template <class Cell>
constexpr Reads reads_of() {
    enum : unsigned { h_prev_bit = 1, h_bit = 2, other = 4 };
    const Dependence h_prev(h_prev_bit), h(h_bit), any(other);
    constexpr int C = c_array<Cell>, W = w_array<Cell>;
    Dependence gates[Cell::gates], saved[Cell::saved + 1], dgates[Cell::grads], c[C], w[W];
    for (Dependence& gate : gates) gate = any;
    for (Dependence& value : c) value = any;
    for (Dependence& value : w) value = any;
    Dependence new_h, new_c[C], dh_prev, dc_prev[C], dw[W];
    const auto inputs_of = [](const auto& values) {
        unsigned all = 0;
        for (const Dependence& value : values) all |= value.inputs;
        return all;
    };
    forward_of<Cell, Dependence>(gates, gates, w, h_prev, c, new_h, new_c, saved);
    const unsigned forward = new_h.inputs | inputs_of(new_c) | inputs_of(saved);
    for (Dependence& value : saved) value = any;
    backward_of<Cell, Dependence>(saved, w, h_prev, c, h, c, any, c, dgates, dw, dh_prev, dc_prev);
    const unsigned backward =
        dh_prev.inputs | inputs_of(dc_prev) | inputs_of(dgates) | inputs_of(dw);
    return {.forward_h_prev = (forward & h_prev_bit) != 0,
            .h_prev = (backward & h_prev_bit) != 0,
            .h = (backward & h_bit) != 0,
            .dh_prev = dh_prev.inputs != 0};
}

// Whether forward reads the unit's own h_{t-1}: not through W_hh.
template <class Cell>
constexpr bool forward_reads_h_prev = reads_of<Cell>().forward_h_prev;

// Compiles only for cells that declare what they compute.
template <class Cell>
struct Declared {
    static constexpr Reads reads = reads_of<Cell>();
    static_assert(!reads.h || Cell::needs_h, "backward reads h: needs_h must be true");
    static_assert(!reads.h_prev || Cell::needs_h_prev,
                  "backward reads h_prev: needs_h_prev must be true");
    static_assert(!reads.dh_prev || Cell::passes_h, "dh_prev is not zero: passes_h must be true");
    static_assert(reads.dh_prev || !Cell::passes_h, "dh_prev is zero: passes_h must be false");
    static_assert(!reads.forward_h_prev || reads.dh_prev,
                  "forward reads h_prev: backward must compute dh_prev");
    static_assert(c_states<Cell> <= max_c_states && Cell::has_c == (c_states<Cell> > 0),
                  "up to three states besides h; has_c says whether there are any");
    static_assert(vectors<Cell> <= max_vectors, "too many vectors");
    static constexpr bool ok = true;
};

}  // namespace fastrnn
