// The time loop of the backward pass over a chunk of steps, last step first. A step is one product
// of the gate gradients of the step after it with W_hh; its epilogue is the cell's backward, which
// writes the gate gradients of this step:
//
//     dgates_{t+1} W_hh  ->  dh_t in registers  ->  + grad_output, the cell  ->  dgates_t, dc_t
//     barrier of the threads that share units
//
// A diagonal cell has no product: its threads meet once a chunk.
#pragma once
#include "backward_plan.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// The time loop of one direction over one chunk.
template <class Cell, class T, class S, class P>
class BackwardLoop {
    static constexpr int L = lanes<T>, C = c_states<Cell>;
    using D = typename P::Row;

public:
    BackwardLoop(const BackwardTask& layer, const BackwardPlan<Cell, T, P>& plan,
                 const Share& share, int64_t rank, int64_t direction, int64_t chunk)
        : layer_(layer),
          plan_(plan),
          share_(share),
          rank_(rank),
          user_(layer.direction[direction]),
          own_(plan.direction[direction]),
          reverse_(direction == 1),
          is_first_(chunk == 0),
          is_last_(chunk + 1 == plan.chunks),
          chunk_(plan.chunk_at(layer.sequence, chunk, direction == 1)),
          H_(layer.size.hidden),
          R_(layer.size.recurrent),
          h_panels_(Span{0, plan.hh.count()}.part(share.unit, share.units)),
          m_panels_(Span{0, plan.hr.count()}.part(share.unit, share.units)),
          hh_(own_.hh + share.row_share * plan.hh.size()),
          hr_(own_.hr + share.row_share * plan.hr.size()),
          h_prev_{.sequence = layer.sequence,
                  .reverse = reverse_,
                  .rows = static_cast<const S*>(user_.output),
                  .rows_stride = layer.output_stride,
                  .initial = static_cast<const S*>(user_.h0),
                  .initial_stride = R_},
          c_prev_{.sequence = layer.sequence,
                  .reverse = reverse_,
                  .rows = static_cast<const S*>(user_.c),
                  .rows_stride = C * H_,
                  .initial = static_cast<const S*>(user_.c0),
                  .initial_stride = C * H_} {}

    void run() {
        if (is_first_) start();
        // After the last chunk comes one more product: from the first step to the initial state.
        const bool one_more = is_last_ && plan_.first_product;
        for (int64_t i = 0; i < chunk_.count + one_more; ++i) {
            const int64_t t = reverse_ ? chunk_.first + i : chunk_.first + chunk_.count - 1 - i;
            const bool follows = i > 0 || !is_first_;
            step(t, follows && !is_diagonal<Cell> ? t + (reverse_ ? -1 : 1) : -1, i < chunk_.count);
            if (!is_diagonal<Cell>) share_.barrier->wait();
        }
        if (is_diagonal<Cell>) share_.barrier->wait();
        if (is_last_)
            finish();
        else
            keep_last_step();
    }

private:
    void start() {
        if (!is_diagonal<Cell> && !plan_.unpacked_step &&
            (layer_.sequence.steps > 1 || plan_.first_product))
            pack_columns<P>(plan_.hh, h_panels_, step_weights(), hh_);
        if (layer_.size.projected)
            pack_columns<Plain<T>>(
                plan_.hr, m_panels_,
                [&](int64_t k) { return static_cast<const S*>(user_.weights.hr) + k * H_; }, hr_);
        const Span rows = share_.rows.part(share_.unit, share_.units);
        const auto copy = [&](const void* from, T* to, int64_t width) {
            if (from)
                memcpy(to + rows.first * width, static_cast<const T*>(from) + rows.first * width,
                       rows.size() * width * sizeof(T));
            else
                memset(to + rows.first * width, 0, rows.size() * width * sizeof(T));
        };
        copy(user_.grad_h_n, own_.dh, R_);
        if (Cell::has_c) copy(user_.grad_c_n, own_.dc, C * H_);
        share_.barrier->wait();
    }

    // The row of W_hh that is multiplied with the k-th gate gradient.
    auto step_weights() const {
        return [hh = static_cast<const S*>(user_.weights.hh), units = plan_.units, H = H_,
                R = R_](int64_t k) -> const S* {
            if (units == H) return hh + k * R;
            return k % units < H ? hh + (k / units * H + k % units) * R : nullptr;
        };
    }

    void finish() {
        const Span rows = share_.rows.part(share_.unit, share_.units);
        const auto copy = [&](const T* from, void* to, int64_t width) {
            if (to)
                memcpy(static_cast<T*>(to) + rows.first * width, from + rows.first * width,
                       rows.size() * width * sizeof(T));
        };
        copy(own_.dh, user_.grad_h0, R_);
        if (Cell::has_c) copy(own_.dc, user_.grad_c0, C * H_);
    }

    void keep_last_step() {
        const int64_t t = reverse_ ? chunk_.first + chunk_.count - 1 : chunk_.first;
        const Span rows = share_.rows.part(share_.unit, share_.units);
        const int64_t count = minimum(rows.last, layer_.sequence.batch_sizes[t]) - rows.first;
        if (count > 0)
            memcpy(own_.after + rows.first * plan_.stride, dgates_of(t, rows.first),
                   count * plan_.stride * sizeof(D));
    }

    // Row b of step t in the memory of a chunk.
    int64_t slot(int64_t t, int64_t b) const { return layer_.sequence.offsets[t] + b - chunk_.row; }

    D* dgates_of(int64_t t, int64_t b) const {
        const bool inside = t >= chunk_.first && t < chunk_.first + chunk_.count;
        return inside ? own_.dgates + slot(t, b) * plan_.stride : own_.after + b * plan_.stride;
    }

    // t: this step; after: the step after it in the direction's order, or -1. inside: whether t is
    // a step, or the initial state. In packed data:
    //
    //     rows of   t   after
    //               *     *      through W_hh to dh_t, then through the cell
    //               *            the row's last step: only through the cell
    //                     *      the row's first step was `after`: dh is the gradient of h0
    void step(int64_t t, int64_t after, bool inside) {
        const Sequence& s = layer_.sequence;
        const int64_t b0 = share_.rows.first;
        const auto rows_in = [&](int64_t step) {
            return minimum(share_.rows.last, s.batch_sizes[step]) - b0;
        };
        const int64_t rows = inside ? rows_in(t) : 0;
        const int64_t following_rows = after >= 0 ? rows_in(after) : 0;
        const bool projected = layer_.size.projected;

        const uint8_t* resets_after = after >= 0 ? s.entering(after, reverse_) : nullptr;
        const auto add_up = [=, &s, this](int64_t row, int64_t block, const Vec<T>& through) {
            const int64_t b = b0 + row, unit = block * L;
            const int n = static_cast<int>(minimum(L, R_ - unit));
            T* known = own_.dh + b * R_ + unit;
            Vec<T> dh = load<T>(known, n);
            if (!resets_after || resets_after[b] != reset) dh = through + dh;
            if (row >= rows) {
                store<T>(known, dh, n);
                return;
            }
            if (has_ended(s, t, b)) {  // the output is no state, and the state is the one before
                if (projected)
                    store<T>(own_.dh_total + slot(t, b) * R_ + unit, Vec<T>{}, n);
                else
                    store_no_gradients(t, b, unit, n);
                store<T>(known, dh, n);
                return;
            }
            const int64_t at = layer_.sequence.offsets[t] + b;
            if (user_.grad_output) {
                const int64_t offset = at * layer_.grad_output_stride + unit;
                dh += layer_.grad_output_stored
                          ? load<T>(static_cast<const S*>(user_.grad_output) + offset, n)
                          : load<T>(static_cast<const T*>(user_.grad_output) + offset, n);
            }
            if (projected) {
                store<T>(own_.dh_total + slot(t, b) * R_ + unit, dh, n);
                store<T>(known, Vec<T>{}, n);
            } else {
                store<T>(known, through_cell(t, b, unit, n, dh), n);
            }
        };
        const Span blocks{h_panels_.first * plan_.hh.blocks,
                          minimum(h_panels_.last * plan_.hh.blocks, plan_.hh.block_count())};
        if (!is_diagonal<Cell> && following_rows > 0) {
            // The last G gate gradients are those of W_hh h.
            const D* dgates = dgates_of(after, b0) + (Cell::grads - Cell::gates) * plan_.units;
            const auto add = [&](int64_t row, int64_t block, const Vec<T>* sums) {
                add_up(row, block, sums[0]);
            };
            if (share_.units > 1)
                prefetch_rows(dgates, plan_.stride, following_rows, plan_.hh.depth);
            const auto multiply = [&] {
                if constexpr (P::step == 1)
                    if (plan_.unpacked_step)
                        return unpacked_columns_product<T>(plan_.hh, blocks, step_weights(), dgates,
                                                           plan_.stride, following_rows,
                                                           plan_.template sums_of<T>(rank_), add);
                product<P>(plan_.hh, h_panels_, t % 2 != 0, hh_, nullptr, dgates, plan_.stride,
                           following_rows, add, [&](int64_t row, int count, int64_t panel) {
                               const Rows tile{t, b0 + row, minimum(b0 + row + count, b0 + rows)};
                               const Span units = units_of(plan_.hh, panel);
                               prefetch_grad_output(tile, units);
                               if (!projected) prefetch_saved(tile, units);
                           });
            };
            multiply();
        }
        for (int64_t row = following_rows > 0 ? following_rows : 0; row < rows; ++row)
            for (int64_t block = blocks.first; block < blocks.last; ++block)
                add_up(row, block, Vec<T>{});
        if (!projected || rows <= 0) return;

        share_.barrier->wait();  // all units of dh_total are written
        product<Plain<T>>(
            plan_.hr, m_panels_, t % 2 != 0, hr_, nullptr, own_.dh_total + slot(t, b0) * R_, R_,
            rows,
            [=, &s, this](int64_t row, int64_t block, const Vec<T>* sums) {
                const int64_t unit = block * L;
                const int n = static_cast<int>(minimum(L, H_ - unit));
                if (has_ended(s, t, b0 + row))
                    store_no_gradients(t, b0 + row, unit, n);
                else
                    through_cell(t, b0 + row, unit, n, sums[0]);
            },
            [&](int64_t row, int count, int64_t panel) {
                prefetch_saved({t, b0 + row, b0 + row + count}, units_of(plan_.hr, panel));
            });
    }

    // Rows [first, last) of step t; none if last <= first.
    struct Rows {
        int64_t t, first, last;
    };

    static Span units_of(const Panels& panels, int64_t panel) {
        return {panel * panels.width(), minimum((panel + 1) * panels.width(), panels.units)};
    }

    template <class V>
    static void prefetch_units(const V* row, const Span& units) {
        for (int64_t unit = units.first; unit < units.last; unit += L) prefetch(row + unit);
    }

    // Prefetch what add_up and through_cell read: it was written long ago.
    void prefetch_grad_output(const Rows& rows, const Span& units) const {
        if (!user_.grad_output) return;
        for (int64_t b = rows.first; b < rows.last; ++b) {
            const int64_t at = (layer_.sequence.offsets[rows.t] + b) * layer_.grad_output_stride;
            if (layer_.grad_output_stored)
                prefetch_units(static_cast<const S*>(user_.grad_output) + at, units);
            else
                prefetch_units(static_cast<const T*>(user_.grad_output) + at, units);
        }
    }

    void prefetch_saved(const Rows& rows, const Span& units) const {
        const auto* saved = static_cast<const S*>(user_.saved);
        for (int64_t b = rows.first; b < rows.last; ++b) {
            const int64_t at = layer_.sequence.offsets[rows.t] + b;
            for (int i = 0; i < Cell::saved; ++i)
                prefetch_units(saved + (at * Cell::saved + i) * H_, units);
            if (Cell::needs_h)
                prefetch_units(static_cast<const S*>(user_.output) + at * layer_.output_stride,
                               units);
            if (Cell::needs_h_prev && h_prev_.from_rows(rows.t, b))
                prefetch_units(h_prev_.row(rows.t, b), units);
            for (int i = 0; i < C; ++i) {
                prefetch_units(static_cast<const S*>(user_.c) + (at * C + i) * H_, units);
                if (c_prev_.from_rows(rows.t, b))
                    prefetch_units(c_prev_.row(rows.t, b) + i * H_, units);
                if (user_.grad_c)
                    prefetch_units(static_cast<const S*>(user_.grad_c) +
                                       at * layer_.grad_output_stride + i * H_,
                                   units);
            }
        }
    }

    // Zeros in the place of what through_cell writes for gradients of weights and of the input.
    void store_no_gradients(int64_t t, int64_t b, int64_t unit, int n) const {
        D* const row = own_.dgates + slot(t, b) * plan_.stride;
        for (int i = 0; i < Cell::grads + vectors<Cell>; ++i) {
            store<T>(row + i * plan_.units + unit, Vec<T>{}, n);
            if (unit + n == H_)
                std::fill(row + i * plan_.units + H_, row + (i + 1) * plan_.units, D{});
        }
        if (layer_.size.projected) store<T>(own_.m + slot(t, b) * H_ + unit, Vec<T>{}, n);
    }

    // The cell's backward: writes the gate gradients, and returns the part of dL/dh_{t-1} that does
    // not pass through W_hh.
    FASTRNN_INLINE Vec<T> through_cell(int64_t t, int64_t b, int64_t unit, int n, Vec<T> dh) const {
        const int64_t at = layer_.sequence.offsets[t] + b;
        constexpr int W = vectors<Cell>;
        Vec<T> saved[Cell::saved + 1], dgates[Cell::grads], h{}, h_prev{}, dh_prev{};
        Vec<T> c[c_array<Cell>]{}, c_prev[c_array<Cell>]{}, dc[c_array<Cell>]{},
            dc_prev[c_array<Cell>]{}, w[w_array<Cell>], dw[w_array<Cell>];
        for (int i = 0; i < W; ++i)
            w[i] = load<T>(static_cast<const S*>(user_.weights.vectors[i]) + unit, n);
        for (int i = 0; i < Cell::saved; ++i)
            saved[i] =
                load<T>(static_cast<const S*>(user_.saved) + (at * Cell::saved + i) * H_ + unit, n);
        if (Cell::needs_h)
            h = load<T>(static_cast<const S*>(user_.output) + at * layer_.output_stride + unit, n);
        if (Cell::needs_h_prev) h_prev = h_prev_.template load_at<T>(t, b, unit, n);
        for (int i = 0; i < C; ++i) {
            c[i] = load<T>(static_cast<const S*>(user_.c) + (at * C + i) * H_ + unit, n);
            c_prev[i] = c_prev_.template load_at<T>(t, b, i * H_ + unit, n);
            dc[i] = load<T>(own_.dc + (b * C + i) * H_ + unit, n);
            if (user_.grad_c)
                dc[i] += load<T>(static_cast<const S*>(user_.grad_c) +
                                     at * layer_.grad_output_stride + i * H_ + unit,
                                 n);
        }
        backward_of<Cell, Vec<T>>(saved, w, h_prev, c_prev, h, c, dh, dc, dgates, dw, dh_prev,
                                  dc_prev);
        D* const row = own_.dgates + slot(t, b) * plan_.stride;
        for (int i = 0; i < Cell::grads; ++i) {
            D* to = row + i * plan_.units;
            store<T>(to + unit, dgates[i], n);
            if (P::depth_step > 1 && unit + n == H_) std::fill(to + H_, to + plan_.units, D{});
        }
        for (int i = 0; i < W; ++i)
            store<T>(row + (Cell::grads + i) * plan_.units + unit, dw[i], n);
        const bool from_zeros = is_reset(layer_.sequence, t, b, reverse_);
        for (int i = 0; i < C; ++i)
            store<T>(own_.dc + (b * C + i) * H_ + unit, from_zeros ? Vec<T>{} : dc_prev[i], n);
        if constexpr (allows_projection<Cell>)
            if (layer_.size.projected)
                store<T>(own_.m + slot(t, b) * H_ + unit, output_of<Cell, Vec<T>>(saved, w, c), n);
        if constexpr (is_diagonal<Cell>)
            for (int g = 0; g < Cell::gates; ++g)
                dh_prev += dgates[Cell::grads - Cell::gates + g] *
                           load<T>(static_cast<const S*>(user_.weights.hh) + g * H_ + unit, n);
        return from_zeros ? Vec<T>{} : dh_prev;
    }

    const BackwardTask& layer_;
    const BackwardPlan<Cell, T, P>& plan_;
    const Share& share_;
    const int64_t rank_;
    const BackwardDirection& user_;
    const typename BackwardPlan<Cell, T, P>::Direction& own_;
    const bool reverse_, is_first_, is_last_;
    const Chunk chunk_;
    const int64_t H_, R_;
    const Span h_panels_, m_panels_;
    // Packed, the copies of this thread's share of the rows.
    typename P::Packed* const hh_;
    T* const hr_;
    const PreviousRows<S> h_prev_;
    const PreviousRows<S> c_prev_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
