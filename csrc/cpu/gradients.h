// What a chunk of steps adds to the gradients of the input and of the weights, after its time loop:
// products over the chunk's rows n, of gate gradients that the time loop has left.
//
//     grad_input [n, I]    = dgates [n, G H]  W_ih [G H, I]
//     grad_ih [G H, I]    += dgates' [G H, n] input [n, I]
//     grad_hh [G H, R]    += dgates' [G H, n] h_{t-1} [n, R]
//     grad_bias [G H]     += sum over n of dgates
//     grad_hh [G H]       += sum over n of dgates * h_{t-1}          of a diagonal cell
//     grad_vector [H]     += sum over n of what the cell's backward left after the gate gradients
//
// All threads partition each result. Every element is summed in one fixed order, for any partition.
#pragma once
#include "backward_plan.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// The gate of W_ih x that a gate gradient belongs to, or -1.
template <class Cell>
constexpr int gate_of_grad(int grad) {
    for (int g = 0; g < Cell::gates; ++g)
        if (Cell::x_grad[g] == grad) return g;
    return -1;
}

// Whether the first G gate gradients are those of W_ih x, which the product for grad_input reads.
template <class Cell>
constexpr bool has_x_grads_first() {
    for (int grad = 0; grad < Cell::gates; ++grad)
        if (gate_of_grad<Cell>(grad) < 0) return false;
    return true;
}

// The row of W_ih that is multiplied with the k-th gate gradient, where gates have `units` units.
template <class Cell, class S>
auto input_weights(const BackwardTask& layer, int direction, int64_t units) {
    const Dimensions& d = layer.size;
    const S* ih = static_cast<const S*>(layer.direction[direction].weights.ih);
    return [&d, ih, units](int64_t k) -> const S* {
        int grad = 0;
        for (; k >= units; k -= units) ++grad;  // a division would take longer than a row
        return k < d.hidden ? ih + (gate_of_grad<Cell>(grad) * d.hidden + k) * d.input : nullptr;
    };
}

// The sum of value(row) over rows [first, last); value is called in this order. Recursively the sum
// of two halves: the rounding error grows with the logarithm of the number of rows.
template <class T, class Value>
Vec<T> sum_pairwise(int64_t first, int64_t last, const Value& value) {
    if (last - first <= cpu::sequential_rows) {
        Vec<T> sum{};
        for (int64_t row = first; row < last; ++row) sum += value(row);
        return sum;
    }
    const int64_t half = first + (last - first) / 2;
    const Vec<T> sum = sum_pairwise<T>(first, half, value);
    return sum + sum_pairwise<T>(half, last, value);
}

template <class T, class D>
Vec<T> sum_pairwise(const D* from, int64_t stride, int64_t rows, int n) {
    return sum_pairwise<T>(0, rows, [=](int64_t row) { return load<T>(from + row * stride, n); });
}

template <class Cell, class T, class S, class P>
class Gradients {
    static constexpr int L = lanes<T>;

public:
    using Plan = BackwardPlan<Cell, T, P>;
    using D = typename P::Row;

    Gradients(const BackwardTask& layer, const Plan& plan, int rank, int direction, int64_t chunk)
        : layer_(layer),
          plan_(plan),
          user_(layer.direction[direction]),
          own_(plan.direction[direction]),
          direction_(direction),
          reverse_(direction == 1),
          chunk_(plan.chunk_at(layer.sequence, chunk, direction == 1)),
          first_(chunk == 0),
          rank_(rank),
          threads_(layer.team->partition.threads()),
          H_(layer.size.hidden) {}

    // grad_input, to which the second direction adds.
    void input() {
        if (!layer_.grad_input) return;
        const Span rows{0, chunk_.rows}, panels{0, plan_.ih.count()};
        if constexpr (P::step == 1)
            if (plan_.unpacked_input) {
                const Span blocks = Span{0, plan_.ih.block_count()}.part(rank_, threads_);
                unpacked_columns_product<T>(
                    plan_.ih, blocks, input_weights(), own_.dgates, plan_.stride, chunk_.rows,
                    plan_.template sums_of<T>(rank_), store_input(chunk_.row));
                return;
            }
        if (!plan_.at_once) {
            multiply(panels, own_.ih, rows.part(rank_, threads_));
            return;
        }
        const Span mine = panels.part(rank_, threads_);
        auto* packed = own_.ih + rank_ * plan_.ih.offset(1);
        for (int64_t panel = mine.first; panel < mine.last; ++panel) {
            pack_columns<P>(plan_.ih, {panel, panel + 1}, input_weights(),
                            packed - plan_.ih.offset(panel), cpu::prefetch_distance);
            multiply({panel, panel + 1}, packed - plan_.ih.offset(panel), rows);
        }
    }

    void weights() {
        const int64_t I = layer_.size.input, R = layer_.size.recurrent, stride = plan_.stride;
        // The last G gate gradients are those of W_hh h.
        constexpr auto h_grad = in_order<Cell::gates>(Cell::grads - Cell::gates);
        const WeightGradients& grads = user_.grads;
        const auto x_row = [&](int64_t, int64_t, int64_t n) {
            return static_cast<const S*>(layer_.input) + n * I;
        };
        const PreviousRows<S> before{.sequence = layer_.sequence,
                                     .reverse = reverse_,
                                     .rows = static_cast<const S*>(user_.output),
                                     .rows_stride = layer_.output_stride,
                                     .initial = static_cast<const S*>(user_.h0),
                                     .initial_stride = R};
        const auto h_row = [&](int64_t t, int64_t b, int64_t) { return before.values(t, b); };
        Factor x{plan_.sum_x, x_row, Cell::x_grad, static_cast<T*>(grads.ih), chunk_.first};
        Factor h{plan_.sum_h, h_row, h_grad.index, static_cast<T*>(grads.hh), chunk_.first};
        if constexpr (is_diagonal<Cell>) {
            if (grads.ih) sum_products<P>(H_, Cell::gates, own_.dgates, stride, x);
            if (grads.hh) sum_times_h(before, h_grad.index, static_cast<T*>(grads.hh));
        } else if (grads.ih && grads.hh && plan_.sums_together) {
            sum_products<P>(H_, Cell::gates, own_.dgates, stride, x, h);
        } else {
            if (grads.ih) sum_products<P>(H_, Cell::gates, own_.dgates, stride, x);
            if (grads.hh) sum_products<P>(H_, Cell::gates, own_.dgates, stride, h);
        }
        if (grads.hr) {
            const auto m_row = [&](int64_t, int64_t, int64_t n) {
                return own_.m + (n - chunk_.row) * H_;
            };
            constexpr int only[1] = {0};
            Factor m{plan_.sum_m, m_row, only, static_cast<T*>(grads.hr), chunk_.first};
            sum_products<Plain<T>>(R, 1, own_.dh_total, R, m);
        }
        for (int i = 0; i < vectors<Cell>; ++i)
            if (grads.vectors[i])
                sum_rows_of<1>({Cell::grads + i}, static_cast<T*>(grads.vectors[i]));
        if (grads.bias_ih) sum_rows_of(Cell::x_grad, static_cast<T*>(grads.bias_ih));
        if (grads.bias_hh && grads.bias_ih && same(Cell::x_grad, h_grad.index))
            copy_sums(static_cast<const T*>(grads.bias_ih), static_cast<T*>(grads.bias_hh));
        else if (grads.bias_hh)
            sum_rows_of(h_grad.index, static_cast<T*>(grads.bias_hh));
    }

private:
    auto input_weights() const {
        return FASTRNN_ISA::input_weights<Cell, S>(layer_, direction_, plan_.units);
    }

    void multiply(Span panels, const typename P::Packed* packed, Span rows) const {
        // In blocks of rows whose gate gradients stay in the cache while the panels of W are read.
        for (int64_t first = rows.first; first < rows.last; first += cpu::input_rows)
            product<P>(plan_.ih, panels, false, packed, nullptr, own_.dgates + first * plan_.stride,
                       plan_.stride, minimum(cpu::input_rows, rows.last - first),
                       store_input(chunk_.row + first));
    }

    // The epilogue of a product whose first row is row `first` of the data.
    auto store_input(int64_t first) const {
        const int64_t I = layer_.size.input;
        T* out = static_cast<T*>(layer_.grad_input) + first * I;
        const bool add = direction_ == 1 || plan_.starts_from_zeros(layer_);
        return [=](int64_t row, int64_t block, const Vec<T>* sums) {
            const int64_t unit = block * L;
            const int n = static_cast<int>(minimum(L, I - unit));
            store_or_add(out + row * I + unit, sums[0], n, add);
        };
    }

    static FASTRNN_INLINE void store_or_add(T* to, Vec<T> value, int n, bool add) {
        store<T>(to, add ? load<T>(to, n) + value : value, n);
    }

    template <int G>
    struct Indices {
        int index[G];
    };
    template <int G>
    static constexpr Indices<G> in_order(int first) {
        Indices<G> r{};
        for (int g = 0; g < G; ++g) r.index[g] = first + g;
        return r;
    }

    // The other factor of a gradient of weights: row(t, b, n) for every row n of data, which is row
    // b of step t.
    //     out[g * U + u, unit] (+)= sum over n of
    //                               grad[n, column[g] * plan.units + u] * row(n)[unit]
    template <class Row>
    struct Factor {
        const Panels& full;
        const Row& row;
        const int* column;
        T* out;
        int64_t t;  // the step of the next row
    };
    template <class Row>
    Factor(const Panels&, const Row&, const int*, T*, int64_t) -> Factor<Row>;

    // The gradients of all factors. Columns of gate gradients are packed once for successive
    // factors with the same column.
    template <class Q, class... Factors>
    void sum_products(int64_t U, int gates, const typename Q::Row* grad, int64_t grad_stride,
                      Factors&... factors) {
        // Rows of pairs are not packed as tiles, but transposed.
        constexpr bool tiled = Q::step == 1;
        const Span mine = Span{0, U}.part(rank_, threads_);
        if (mine.size() == 0) return;
        auto* tiles = plan_.template tiles_of<typename Q::Row>(rank_);
        for (int64_t first = 0; first < chunk_.rows; first += cpu::sum_rows) {
            const int64_t depth = minimum(cpu::sum_rows, chunk_.rows - first);
            const bool add = !first_ || first > 0;
            const auto panels_of = [&](const auto& factor) {
                Panels panels = factor.full;
                panels.depth = round_up(depth, Q::depth_step);
                return panels;
            };
            auto* packed = plan_.template sums_of<typename Q::Packed>(rank_);
            const auto pack = [&](auto& factor) {
                const Panels panels = panels_of(factor);
                pack_rows_of<Q>(panels, factor, first, depth, packed);
                packed += factor.full.size();
            };
            (pack(factors), ...);
            // Sums of few products are bound by writing the result, which is best row by row.
            const int64_t at_once = depth < cpu::few_rows ? Q::tile_rows(max_panel_vectors)
                                                          : Plan::template tiled_rows<Q>;
            for (int g = 0; g < gates; ++g) {
                for (int64_t m = mine.first; m < mine.last; m += at_once) {
                    const int64_t count = minimum(at_once, mine.last - m);
                    int in_tiles = -1;
                    packed = plan_.template sums_of<typename Q::Packed>(rank_);
                    const auto multiply = [&](const auto& factor) {
                        const Panels panels = panels_of(factor);
                        const int column = factor.column[g];
                        const auto* from = grad + first * grad_stride + column * plan_.units + m;
                        if (column != in_tiles) {
                            if constexpr (tiled)
                                pack_tiles(panels, from, grad_stride, count, tiles);
                            else
                                transpose_rows(panels, from, grad_stride, depth, count, tiles);
                        }
                        in_tiles = column;
                        add_product<Q, tiled>(panels, packed, tiles, count,
                                              factor.out + (g * U + m) * panels.units, add);
                        packed += factor.full.size();
                    };
                    (multiply(factors), ...);
                }
            }
        }
    }

    // Packs the factor's rows for `depth` rows of data, from row `first` of the chunk on.
    template <class Q, class F>
    void pack_rows_of(const Panels& panels, F& factor, int64_t first, int64_t depth,
                      typename Q::Packed* packed) const {
        const Sequence& s = layer_.sequence;
        pack_columns<Q>(
            panels, {0, panels.count()},
            [&](int64_t k) -> decltype(factor.row(0, 0, 0)) {
                if (k >= depth) return nullptr;
                const int64_t n = chunk_.row + first + k;
                while (n >= s.offsets[factor.t + 1]) ++factor.t;
                return factor.row(factor.t, n - s.offsets[factor.t], n);
            },
            packed);
    }

    // to [count, units] (+)= tiles * packed
    template <class Q, bool Tiled>
    void add_product(const Panels& panels, const typename Q::Packed* packed,
                     const typename Q::Row* tiles, int64_t count, T* to, bool add) const {
        product<Q, Tiled>(
            panels, {0, panels.count()}, false, packed, nullptr, tiles, Tiled ? 0 : panels.depth,
            count,
            [to, add, units = panels.units](int64_t row, int64_t block, const Vec<T>* sums) {
                const int64_t unit = block * L;
                const int n = static_cast<int>(minimum(L, units - unit));
                store_or_add(to + row * units + unit, sums[0], n, add);
            },
            [&](int64_t row, int count, int64_t panel) {
                T* first = to + row * panels.units + panel * panels.width();
                constexpr int64_t line = cpu::cache_line / int64_t(sizeof(T));
                for (int r = 0; r < count; ++r)
                    for (int64_t i = 0; i < panels.width(); i += L < line ? line : L)
                        prefetch_for_write(first + r * panels.units + i);
            });
    }

    // out [count * H] (+)= sum over rows of dgates[n, column[g] * H + u]
    template <int Count>
    void sum_rows_of(const int (&column)[Count], T* out) {
        const Span mine = Span{0, (H_ + L - 1) / L}.part(rank_, threads_);
        for (int g = 0; g < Count; ++g)
            for (int64_t block = mine.first; block < mine.last; ++block) {
                const int n = static_cast<int>(minimum(L, H_ - block * L));
                const D* from = own_.dgates + column[g] * plan_.units + block * L;
                store_or_add(out + g * H_ + block * L,
                             sum_pairwise<T>(from, plan_.stride, chunk_.rows, n), n, !first_);
            }
    }

    // out [G * H] (+)= sum over rows of dgates[n, column[g] * H + u] * h_{t-1}[n, u]
    void sum_times_h(const PreviousRows<S>& before, const int* column, T* out) {
        const Span mine = Span{0, (H_ + L - 1) / L}.part(rank_, threads_);
        const Sequence& s = layer_.sequence;
        for (int g = 0; g < Cell::gates; ++g)
            for (int64_t block = mine.first; block < mine.last; ++block) {
                const int64_t unit = block * L;
                const int n = static_cast<int>(minimum(L, H_ - unit));
                const D* from = own_.dgates + column[g] * plan_.units + unit;
                int64_t t = chunk_.first;
                const auto product = [&](int64_t row) {
                    const int64_t at = chunk_.row + row;
                    while (at >= s.offsets[t + 1]) ++t;
                    return load<T>(from + row * plan_.stride, n) *
                           before.template load_at<T>(t, at - s.offsets[t], unit, n);
                };
                store_or_add(out + g * H_ + unit, sum_pairwise<T>(0, chunk_.rows, product), n,
                             !first_);
            }
    }

    static constexpr bool same(const int* a, const int* b) {
        for (int g = 0; g < Cell::gates; ++g)
            if (a[g] != b[g]) return false;
        return true;
    }

    // Copies this thread's share of what sum_rows_of has stored.
    void copy_sums(const T* from, T* to) {
        const Span mine = Span{0, (H_ + L - 1) / L}.part(rank_, threads_);
        const int64_t first = mine.first * L, last = minimum(mine.last * L, H_);
        for (int g = 0; g < Cell::gates && first < last; ++g)
            memcpy(to + g * H_ + first, from + g * H_ + first, (last - first) * sizeof(T));
    }

    const BackwardTask& layer_;
    const Plan& plan_;
    const BackwardDirection& user_;
    const typename Plan::Direction& own_;
    const int direction_;
    const bool reverse_;
    const Chunk chunk_;
    const bool first_;
    const int64_t rank_, threads_, H_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
