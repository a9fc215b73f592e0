// Dual numbers as the value type of a cell, and the kernels of double backward (dual_kernel.h). A
// cell's forward and backward with dual numbers compute their tangents as well, so that no cell has
// formulas of second derivatives.
#pragma once
#include <type_traits>

#include "dual_kernel.h"
#include "gradients.h"
#include "simd_math.h"

namespace fastrnn {
namespace FASTRNN_ISA {

using cpu::DualRows;
using cpu::DualStep;

// value + tangent e, with e * e = 0; in each lane.
template <class T>
struct Dual {
    Vec<T> value, tangent;

    friend FASTRNN_INLINE Dual operator+(Dual a, Dual b) {
        return {a.value + b.value, a.tangent + b.tangent};
    }
    friend FASTRNN_INLINE Dual operator-(Dual a, Dual b) {
        return {a.value - b.value, a.tangent - b.tangent};
    }
    friend FASTRNN_INLINE Dual operator*(Dual a, Dual b) {
        return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
    }
    friend FASTRNN_INLINE Dual operator/(Dual a, Dual b) {
        const Vec<T> value = a.value / b.value;
        return {value, (a.tangent - value * b.tangent) / b.value};
    }
    friend FASTRNN_INLINE Dual operator-(Dual a) { return {-a.value, -a.tangent}; }

#define FASTRNN_WITH_LITERAL(op)                            \
    template <class A>                                      \
        requires std::is_arithmetic_v<A>                    \
    friend FASTRNN_INLINE Dual operator op(A a, Dual b) {   \
        return Dual {                                       \
            broadcast(static_cast<T>(a)), {}                \
        }                                                   \
        op b;                                               \
    }                                                       \
    template <class A>                                      \
        requires std::is_arithmetic_v<A>                    \
    friend FASTRNN_INLINE Dual operator op(Dual a, A b) {   \
        return a op Dual{broadcast(static_cast<T>(b)), {}}; \
    }
    FASTRNN_WITH_LITERAL(+)
    FASTRNN_WITH_LITERAL(-)
    FASTRNN_WITH_LITERAL(*)
    FASTRNN_WITH_LITERAL(/)
#undef FASTRNN_WITH_LITERAL

    // Comparisons are those of the values.
#define FASTRNN_COMPARISON(op)                                                            \
    friend FASTRNN_INLINE auto operator op(Dual a, Dual b) { return a.value op b.value; } \
    template <class A>                                                                    \
        requires std::is_arithmetic_v<A>                                                  \
    friend FASTRNN_INLINE auto operator op(Dual a, A b) {                                 \
        return a.value op static_cast<T>(b);                                              \
    }                                                                                     \
    template <class A>                                                                    \
        requires std::is_arithmetic_v<A>                                                  \
    friend FASTRNN_INLINE auto operator op(A a, Dual b) {                                 \
        return static_cast<T>(a) op b.value;                                              \
    }
    FASTRNN_COMPARISON(<)
    FASTRNN_COMPARISON(<=)
    FASTRNN_COMPARISON(>)
    FASTRNN_COMPARISON(>=)
#undef FASTRNN_COMPARISON
};

}  // namespace FASTRNN_ISA

template <class T>
struct Math<FASTRNN_ISA::Dual<T>> {
    using D = FASTRNN_ISA::Dual<T>;
    using Values = FASTRNN_ISA::SimdMath<T>;

    static FASTRNN_INLINE D sigmoid(D x) {
        const auto y = Values::sigmoid(x.value);
        return {y, x.tangent * y * (1 - y)};
    }
    static FASTRNN_INLINE D tanh(D x) {
        const auto y = Values::tanh(x.value);
        return {y, x.tangent * (1 - y * y)};
    }
    static FASTRNN_INLINE D exp(D x) {
        const auto y = Values::exp(x.value);
        return {y, x.tangent * y};
    }
    static FASTRNN_INLINE D log(D x) { return {Values::log(x.value), x.tangent / x.value}; }
    static FASTRNN_INLINE D log1p(D x) {
        return {Values::log1p(x.value), x.tangent / (1 + x.value)};
    }
    static FASTRNN_INLINE D sqrt(D x) {
        const auto y = Values::sqrt(x.value);
        return {y, x.tangent / (y + y)};
    }
    static FASTRNN_INLINE D erf(D x) {
        const auto two_over_root_pi = Values::number(1.12837916709551257390);
        return {Values::erf(x.value),
                x.tangent * two_over_root_pi * Values::exp(-(x.value * x.value))};
    }
    static FASTRNN_INLINE D abs(D x) {
        const FASTRNN_ISA::Vec<T> zero{};
        const auto tangent = x.value < zero ? -x.tangent : x.tangent;
        return {Values::abs(x.value), x.value == zero ? zero : tangent};  // as torch: 0 at 0
    }
    template <class Condition>
    static FASTRNN_INLINE D choose(Condition condition, D yes, D no) {
        return {condition ? yes.value : no.value, condition ? yes.tangent : no.tangent};
    }
    static FASTRNN_INLINE D number(double value) {
        return {Values::number(value), FASTRNN_ISA::Vec<T>{}};
    }
};

namespace FASTRNN_ISA {

template <class T>
FASTRNN_INLINE Dual<T> load_dual(const DualRows<T>& from, int64_t row, int64_t unit, int n) {
    return {load<T>(from.values(row) + unit, n), load<T>(from.tangents(row) + unit, n)};
}

template <class T>
FASTRNN_INLINE void store_dual(const DualRows<T>& to, int64_t row, int64_t unit, Dual<T> v, int n) {
    store<T>(to.values(row) + unit, v.value, n);
    store<T>(to.tangents(row) + unit, v.tangent, n);
}

// body(row, unit, n) for each vector of units of each row.
template <class T, class Body>
FASTRNN_INLINE void for_each_vector(const DualStep<T>& s, const Body& body) {
    for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t unit = 0; unit < s.hidden; unit += lanes<T>)
            body(row, unit, static_cast<int>(minimum(lanes<T>, s.hidden - unit)));
}

template <class Cell, class T>
void dual_forward(const DualStep<T>& s) {
    for_each_vector(s, [&](int64_t row, int64_t unit, int n) {
        Dual<T> x[Cell::gates], r[Cell::gates], saved[Cell::saved + 1], h_prev{}, c_prev{}, h, c{};
        for (int g = 0; g < Cell::gates; ++g) {
            const int64_t at = g * s.hidden + unit;
            x[g] = load_dual(s.x, row, at, n) + load_dual(s.bias_x, 0, at, n);
            r[g] = load_dual(s.r, row, at, n) + load_dual(s.bias_r, 0, at, n);
        }
        if constexpr (!allows_projection<Cell>) h_prev = load_dual(s.h_prev, row, unit, n);
        if constexpr (Cell::has_c) c_prev = load_dual(s.c_prev, row, unit, n);
        Cell::forward(x, r, h_prev, c_prev, h, c, saved);
        store_dual(s.h, row, unit, h, n);
        if constexpr (Cell::has_c) store_dual(s.c, row, unit, c, n);
        for (int i = 0; i < Cell::saved; ++i)
            store_dual(s.saved, row, i * s.hidden + unit, saved[i], n);
    });
}

template <class Cell, class T>
void dual_backward(const DualStep<T>& s) {
    for_each_vector(s, [&](int64_t row, int64_t unit, int n) {
        Dual<T> saved[Cell::saved + 1], dgates[Cell::grads], h{}, h_prev{}, c{}, c_prev{}, dc{},
            dh_prev{}, dc_prev{};
        for (int i = 0; i < Cell::saved; ++i)
            saved[i] = load_dual(s.saved, row, i * s.hidden + unit, n);
        if constexpr (Cell::needs_h) h = load_dual(s.h, row, unit, n);
        if constexpr (Cell::needs_h_prev) h_prev = load_dual(s.h_prev, row, unit, n);
        if constexpr (Cell::has_c) {
            c = load_dual(s.c, row, unit, n);
            c_prev = load_dual(s.c_prev, row, unit, n);
            dc = load_dual(s.dc, row, unit, n);
        }
        const Dual<T> dh = load_dual(s.dh, row, unit, n);
        Cell::backward(saved, h_prev, c_prev, h, c, dh, dc, dgates, dh_prev, dc_prev);
        for (int g = 0; g < Cell::gates; ++g) {
            const int64_t at = g * s.hidden + unit;
            store_dual(s.dx, row, at, dgates[Cell::x_grad[g]], n);
            store_dual(s.dr, row, at, dgates[Cell::grads - Cell::gates + g], n);
        }
        if (s.dh_prev.first) store_dual(s.dh_prev, row, unit, dh_prev, n);
        if constexpr (Cell::has_c) store_dual(s.dc, row, unit, dc_prev, n);
    });
}

template <class T>
using DualFunction = void (*)(const DualStep<T>&);

// Null for other cells.
template <class Cell, class T>
constexpr DualFunction<T> dual_forward_of() {
    if constexpr (takes_arrays<Cell> || is_diagonal<Cell>)
        return nullptr;
    else
        return dual_forward<Cell, T>;
}
template <class Cell, class T>
constexpr DualFunction<T> dual_backward_of() {
    if constexpr (takes_arrays<Cell> || is_diagonal<Cell>)
        return nullptr;
    else
        return dual_backward<Cell, T>;
}

template <class Cell>
constexpr bool same_gradients() {
    for (int g = 0; g < Cell::gates; ++g)
        if (Cell::x_grad[g] != Cell::grads - Cell::gates + g) return false;
    return true;
}

template <class T>
Panels matrix_panels(int64_t depth, int64_t columns) {
    return {depth, columns, 1, lanes<T>, Plain<T>::backward_sum};
}

template <class T>
size_t matrix_size(int64_t depth, int64_t columns) {
    return matrix_panels<T>(depth, columns).size();
}

template <class T>
void pack_matrix(const T* w, int64_t stride, bool transposed, int64_t depth, int64_t columns,
                 T* packed) {
    const Panels panels = matrix_panels<T>(depth, columns);
    const Span all{0, panels.count()};
    if (transposed)
        pack_rows<Plain<T>>(panels, all, depth, w, packed);
    else
        pack_columns<Plain<T>>(panels, all, [=](int64_t k) { return w + k * stride; }, packed);
}

// The epilogue of a product: out (+)= sums.
template <class T>
auto store_sums(T* out, int64_t stride, int64_t columns, bool add) {
    return [=](int64_t row, int64_t block, const Vec<T>* sums) {
        const int64_t unit = block * lanes<T>;
        const int n = static_cast<int>(minimum(lanes<T>, columns - unit));
        T* to = out + row * stride + unit;
        store<T>(to, add ? load<T>(to, n) + sums[0] : sums[0], n);
    };
}

template <class T>
void multiply_matrix(const T* packed, int64_t depth, int64_t columns, const T* a, int64_t a_stride,
                     int64_t rows, T* out, int64_t out_stride, bool add) {
    const Panels panels = matrix_panels<T>(depth, columns);
    product<Plain<T>>(panels, {0, panels.count()}, false, packed, nullptr, a, a_stride, rows,
                      store_sums(out, out_stride, columns, add));
}

// The columns of a that are multiplied at a time.
template <class T>
constexpr int64_t outer_columns = cpu::tiles_at_once * Plain<T>::tile_rows(max_panel_vectors);

template <class T>
size_t outer_scratch(int64_t columns) {
    return matrix_size<T>(cpu::sum_rows, columns) + cpu::sum_rows * outer_columns<T>;
}

template <class T>
void add_outer(const T* a, int64_t a_stride, int64_t first, int64_t last, const T* b,
               int64_t b_stride, int64_t columns, int64_t rows, T* out, bool add, T* scratch) {
    T* const tiles = scratch + matrix_size<T>(cpu::sum_rows, columns);
    for (int64_t n = 0; n < rows; n += cpu::sum_rows, add = true) {
        const int64_t depth = minimum(cpu::sum_rows, rows - n);
        const Panels panels = matrix_panels<T>(depth, columns);
        pack_matrix(b + n * b_stride, b_stride, false, depth, columns, scratch);
        for (int64_t i = first; i < last; i += outer_columns<T>) {
            const int64_t count = minimum(outer_columns<T>, last - i);
            pack_tiles(panels, a + n * a_stride + i, a_stride, count, tiles);
            product<Plain<T>, true>(panels, {0, panels.count()}, false, scratch, nullptr, tiles, 0,
                                    count, store_sums(out + i * columns, columns, columns, add));
        }
    }
}

template <class T>
void sum_rows(const T* rows, int64_t stride, int64_t count, int64_t first, int64_t last, T* out) {
    for (int64_t i = first; i < last; i += lanes<T>) {
        const int n = static_cast<int>(minimum(lanes<T>, last - i));
        store<T>(out + i, sum_pairwise<T>(rows + i, stride, count, n), n);
    }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
