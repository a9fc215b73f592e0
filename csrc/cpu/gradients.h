// What follows the time loop of a backward pass: the gradients of the input and of the weights, as
// products over all rows of the data with the same tiles. Every element is summed in one fixed
// order, whoever computes it.
#pragma once
#include "backward.h"

namespace fastrnn {
namespace FASTRNN_ISA {

template <class Cell, class T, class S>
class Gradients {
    static constexpr int L = lanes<T>;

public:
    Gradients(const BackwardLayer& layer, const BackwardPlan<Cell, T>& plan, int rank)
        : layer_(layer),
          plan_(plan),
          rank_(rank),
          threads_(layer.team->partition.threads()),
          H_(layer.size.hidden) {}

    // grad_input [N, I] = sum over directions of dgates [N, G * H] W_ih [G * H, I].
    void input() {
        if (!layer_.grad_input) return;
        const int64_t I = layer_.size.input, stride = Cell::grads * H_;
        const Span mine = Span{0, layer_.sequence.rows()}.part(rank_, threads_);
        // In blocks of rows whose gate gradients stay in the cache while the panels of W pass by.
        for (int64_t first = mine.first; first < mine.last; first += input_rows) {
            const int64_t rows = minimum(input_rows, mine.last - first);
            for (int d = 0; d < layer_.size.directions; ++d) {
                T* out = static_cast<T*>(layer_.grad_input) + first * I;
                product<T>(plan_.ih, {0, plan_.ih.count()}, plan_.direction[d].ih, nullptr,
                           plan_.direction[d].dgates + first * stride, stride, rows,
                           [=](int64_t row, int64_t block, const Vec<T>* sums) {
                               const int64_t unit = block * L;
                               const int n = static_cast<int>(minimum(L, I - unit));
                               T* p = out + row * I + unit;
                               store<T>(p, d == 0 ? sums[0] : load<T>(p, n) + sums[0], n);
                           });
            }
        }
    }

    void weights() {
        const int64_t I = layer_.size.input, R = layer_.size.recurrent, stride = Cell::grads * H_;
        constexpr int recurrent =
            Cell::grads - Cell::gates;  // the first gate gradient that belongs to W_hh h
        for (int d = 0; d < layer_.size.directions; ++d) {
            const BackwardDirection& user = layer_.direction[d];
            const auto& own = plan_.direction[d];
            const auto x_row = [&](int64_t, int64_t, int64_t n) {
                return static_cast<const T*>(layer_.input) + n * I;
            };
            if (user.grads.ih)
                sum_products(plan_.sum_x, x_row, H_, Cell::gates, own.dgates, stride, Cell::x_grad,
                             static_cast<T*>(user.grads.ih));
            constexpr auto h_grad = in_order<Cell::gates>(recurrent);
            if (user.grads.hh) {
                const PreviousRows<S, S> before{layer_.sequence,
                                                d == 1,
                                                static_cast<const S*>(user.output),
                                                layer_.output_stride,
                                                static_cast<const S*>(user.h0),
                                                R};
                const auto h_row = [&](int64_t t, int64_t b, int64_t) {
                    return before.from_rows(t, b) ? before.row(t, b) : before.start(b);
                };
                sum_products(plan_.sum_h, h_row, H_, Cell::gates, own.dgates, stride, h_grad.index,
                             static_cast<T*>(user.grads.hh));
            }
            if (user.grads.hr) {
                const auto m_row = [&](int64_t, int64_t, int64_t n) { return own.m + n * H_; };
                constexpr int only[1] = {0};
                sum_products(plan_.sum_m, m_row, R, 1, own.dh_total, R, only,
                             static_cast<T*>(user.grads.hr));
            }
            if (user.grads.bias_ih)
                sum_rows_of(own.dgates, Cell::x_grad, static_cast<T*>(user.grads.bias_ih));
            if (user.grads.bias_hh)
                sum_rows_of(own.dgates, h_grad.index, static_cast<T*>(user.grads.bias_hh));
        }
    }

private:
    static constexpr int64_t input_rows = 63;  // a multiple of the tiles' rows

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

    // out [G * U, units] = sum over rows n of grad[n, column[g] * U + u] * row(n)[unit]
    template <class Row>
    void sum_products(const Panels& full, const Row& row, int64_t U, int gates, const T* grad,
                      int64_t grad_stride, const int* column, T* out) {
        const Sequence& s = layer_.sequence;
        int64_t t = 0;
        int turn = 0;
        for (int64_t first = 0; first < s.rows(); first += sum_rows, turn ^= 1) {
            Panels panels = full;
            panels.depth = minimum(sum_rows, s.rows() - first);
            T* packed = plan_.sums[turn];
            pack_columns<T>(
                panels, Span{0, panels.count()}.part(rank_, threads_),
                [&](int64_t k) {
                    const int64_t n = first + k;
                    while (n >= s.offsets[t + 1]) ++t;
                    return row(t, n - s.offsets[t], n);
                },
                packed);
            // The other buffer is free again once all have passed the barrier after the next
            // packing.
            layer_.team->all.wait();
            const Span mine = Span{0, U}.part(rank_, threads_);
            for (int g = 0; g < gates; ++g) {
                T* to = out + (g * U + mine.first) * panels.units;
                product<T, true>(
                    panels, {0, panels.count()}, packed, nullptr,
                    grad + first * grad_stride + column[g] * U + mine.first, grad_stride,
                    mine.size(), [&](int64_t m, int64_t block, const Vec<T>* sums) {
                        const int64_t unit = block * L;
                        const int n = static_cast<int>(minimum(L, panels.units - unit));
                        T* p = to + m * panels.units + unit;
                        store<T>(p, first == 0 ? sums[0] : load<T>(p, n) + sums[0], n);
                    });
            }
        }
        layer_.team->all.wait();  // the next sum starts with the first buffer
    }

    // out [G * H] = sum over rows of grad[n, column[g] * H + u]
    void sum_rows_of(const T* grad, const int* column, T* out) {
        const int64_t N = layer_.sequence.rows(), stride = Cell::grads * H_;
        const Span mine = Span{0, (H_ + L - 1) / L}.part(rank_, threads_);
        for (int g = 0; g < Cell::gates; ++g)
            for (int64_t block = mine.first; block < mine.last; ++block) {
                const int n = static_cast<int>(minimum(L, H_ - block * L));
                const T* from = grad + column[g] * H_ + block * L;
                store<T>(out + g * H_ + block * L, sum_pairwise(from, stride, N, n), n);
            }
    }

    // Halves of halves: the rounding error grows with the logarithm of the number of rows.
    static Vec<T> sum_pairwise(const T* from, int64_t stride, int64_t rows, int n) {
        if (rows <= 8) {
            Vec<T> sum{};
            for (int64_t row = 0; row < rows; ++row) sum += load<T>(from + row * stride, n);
            return sum;
        }
        const int64_t half = rows / 2;
        return sum_pairwise(from, stride, half, n) +
               sum_pairwise(from + half * stride, stride, rows - half, n);
    }

    const BackwardLayer& layer_;
    const BackwardPlan<Cell, T>& plan_;
    const int64_t rank_, threads_, H_;
};

template <class Cell, class T, class S>
size_t backward_workspace(const BackwardLayer& layer) {
    return BackwardPlan<Cell, T>(layer).size;
}

// The rows of W_ih in the order in which the gate gradients stand.
template <class Cell>
constexpr int gate_of_grad(int grad) {
    for (int g = 0; g < Cell::gates; ++g)
        if (Cell::x_grad[g] == grad) return g;
    return -1;
}

template <class Cell, class T, class S>
void backward(const BackwardLayer& layer, int rank) {
    const BackwardPlan<Cell, T> plan(layer);
    const Dimensions& d = layer.size;
    const int64_t threads = layer.team->partition.threads();
    for (int i = 0; i < d.directions; ++i) {
        const cpu::Weights& w = layer.direction[i].weights;
        const auto& packed = plan.direction[i];
        const auto part = [&](const Panels& panels) {
            return Span{0, panels.count()}.part(rank, threads);
        };
        pack_columns<T>(
            plan.hh, part(plan.hh),
            [&](int64_t k) { return static_cast<const S*>(w.hh) + k * d.recurrent; }, packed.hh);
        if (d.projected)
            pack_columns<T>(
                plan.hr, part(plan.hr),
                [&](int64_t k) { return static_cast<const S*>(w.hr) + k * d.hidden; }, packed.hr);
        if (layer.grad_input)
            pack_columns<T>(
                plan.ih, part(plan.ih),
                [&](int64_t k) {
                    const int64_t gate = gate_of_grad<Cell>(static_cast<int>(k / d.hidden));
                    return static_cast<const S*>(w.ih) + (gate * d.hidden + k % d.hidden) * d.input;
                },
                packed.ih);
    }
    layer.team->all.wait();
    const Share share(*layer.team, rank, layer.sequence, d.directions);
    for (int64_t i = share.directions.first; i < share.directions.last; ++i)
        BackwardLoop<Cell, T, S>(layer, plan, share, i).run();
    layer.team->all.wait();
    Gradients<Cell, T, S> gradients(layer, plan, rank);
    gradients.input();
    gradients.weights();
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
