// The forward pass of one layer. Every thread of the team runs `forward` with its rank, and in it
// its share of the time loop: some directions, some rows, some units (share.h).
//
//     pack       the weights of the thread's units; each thread does that for itself, because
//                reading what another core has just written is slow
//     for each chunk of steps:
//         project    x = W_ih input + b_ih, one product over all rows of the chunk
//         for each step:
//             h_{t-1} W_hh'  ->  sums in registers  ->  + x, biases, the cell  ->  h_t, c_t, saved
//             barrier of the threads that share units
//     copy       the last h and c to h_n and c_n
//
// In a network of one step weights are not packed (unpacked.h), only biases.
//
// A diagonal cell has no product in its steps: the vectors of W_hh are packed as biases are, and no
// thread waits for another before the end of a chunk.
#pragma once
#include <algorithm>

#include "share.h"
#include "simd_math.h"
#include "unpacked.h"
#include "workspace.h"

namespace fastrnn {
namespace FASTRNN_ISA {

using cpu::ForwardTask;
using cpu::odd_lines;
using cpu::Workspace;

// The sizes of the forward pass and its workspace. X and P are the operands (operands.h) of the
// input projection and of the step.
template <class Cell, class T, class S, class X, class P>
struct ForwardPlan {
    struct Direction {
        // Packed weights, one copy for each share of the rows. If at_once, `ih` is one panel for
        // each thread.
        typename X::Packed* ih;
        typename P::Packed* hh;
        T *bias_ih, *bias_hh, *hr;
        // Rows are row_stride, x_stride, h_stride, c_stride and c_stride apart.
        typename X::Row* rows;  // [steps of a chunk, B, I]: the input, if it is converted to X::Row
        T* x;                   // [steps of a chunk, B, columns of `ih`]: W_ih x + b_ih
        typename P::Row* h[2];  // [B, R]: h of the last step and of this step, alternating
        T* m;                   // [B, H]: the cell's output before the projection
        T* c;                   // [c_states, B, H]
        T* diagonal;            // as bias_hh: W_hh of a diagonal cell
        T* lanes;               // transposed rows, lanes_size values for each thread, if one_step
    };

    static_assert(Cell::gates <= max_panel_vectors, "a block of units must fit into a panel");
    Panels ih, hh, hr;
    int64_t row_stride, x_stride, h_stride, c_stride, lanes_size;
    int64_t chunk;  // steps
    bool one_step;  // weights are not packed
    bool at_once;   // one chunk: each panel of W_ih is packed, used and overwritten by the next
    bool converts;  // the input is converted to X::Row
    Direction direction[2];
    size_t size;

    explicit ForwardPlan(const ForwardTask& layer) {
        constexpr int L = lanes<T>;
        const Dimensions& d = layer.size;
        const int share = layer.team->partition.units;
        row_stride = round_up(d.input, X::depth_step);
        ih = Panels(row_stride, d.hidden, Cell::gates, L, X::forward_sum, share);
        hh = Panels(round_up(d.recurrent, P::depth_step), d.hidden, Cell::gates, L, P::forward_sum,
                    share);
        hr = Panels(d.hidden, d.projected ? d.recurrent : 0, 1, L, Plain<T>::forward_sum, share);
        x_stride = odd_lines<T>(ih.columns());
        h_stride = odd_lines<typename P::Row>(hh.depth);
        c_stride = odd_lines<T>(d.hidden);
        const Sequence& s = layer.sequence;
        const bool all = s.rows() <= cpu::at_once_rows;
        chunk = all                       ? s.steps
                : s.batch < X::chunk_rows ? minimum(s.steps, X::chunk_rows / s.batch)
                                          : 1;
        one_step = s.steps == 1;
        at_once = !one_step && all;
        converts = !one_step && (sizeof(S) != sizeof(typename X::Row) || row_stride != d.input);
        const int64_t copies = layer.team->partition.rows;
        lanes_size =
            one_step ? lane_scratch<T>(s.batch, std::max({d.input, d.recurrent, d.hidden})) : 0;
        Workspace space(layer.workspace);
        for (int i = 0; i < d.directions; ++i) {
            Direction& p = direction[i];
            p.ih = space.take<typename X::Packed>(one_step ? 0 : copies * ih_size(share));
            p.hh = space.take<typename P::Packed>(
                one_step || is_diagonal<Cell> ? 0 : copies * hh.size());
            p.hr = space.take<T>(one_step ? 0 : copies * hr.size());
            p.bias_ih = space.take<T>(copies * ih.columns());
            p.bias_hh = space.take<T>(copies * hh.columns());
            p.rows = space.take<typename X::Row>(converts ? chunk * s.batch * row_stride : 0);
            p.x = space.take<T>(chunk * s.batch * x_stride);
            p.h[0] = space.take<typename P::Row>(s.batch * h_stride);
            p.h[1] = space.take<typename P::Row>(s.batch * h_stride);
            p.m = space.take<T>(d.projected ? s.batch * c_stride : 0);
            p.c = space.take<T>(c_states<Cell> * s.batch * c_stride);
            p.diagonal = space.take<T>(is_diagonal<Cell> ? copies * hh.columns() : 0);
            p.lanes = space.take<T>(copies * share * lanes_size);
        }
        size = space.size();
    }

    int64_t ih_size(int64_t threads) const {
        return at_once ? threads * ih.width() * ih.depth : ih.size();
    }
};

// Whether the state of row b that enters step t is zeros, and whether the row has ended.
inline bool is_reset(const Sequence& s, int64_t t, int64_t b, bool reverse) {
    const uint8_t* events = s.entering(t, reverse);
    return events && events[b] == reset;
}
inline bool has_ended(const Sequence& s, int64_t t, int64_t b) {
    return s.events && s.events[t * s.batch + b] == past_end;
}

// Converts between the storage type and T.
template <class T, class From, class To>
FASTRNN_INLINE void convert(const From* from, To* to, int64_t count) {
    for (int64_t i = 0; i < count; i += lanes<T>) {
        const int n = static_cast<int>(minimum(lanes<T>, count - i));
        store<T>(to + i, load<T>(from + i, n), n);
    }
}

template <class Cell, class T, class S, class X, class P>
class ForwardLoop {
    static constexpr int L = lanes<T>;
    using Plan = ForwardPlan<Cell, T, S, X, P>;
    using H = typename P::Row;

public:
    ForwardLoop(const ForwardTask& layer, const Plan& plan, const Share& share, int64_t direction)
        : layer_(layer),
          plan_(plan),
          share_(share),
          user_(layer.direction[direction]),
          own_(plan.direction[direction]),
          reverse_(direction == 1),
          H_(layer.size.hidden),
          R_(layer.size.recurrent),
          my_panels_(Span{0, plan.hh.count()}.part(share.unit, share.units)),
          my_outputs_(Span{0, plan.hr.count()}.part(share.unit, share.units)),
          ih_(own_.ih + share.row_share * plan.ih_size(share.units)),
          hh_(own_.hh + share.row_share * plan.hh.size()),
          bias_ih_(own_.bias_ih + share.row_share * plan.ih.columns()),
          bias_hh_(own_.bias_hh + share.row_share * plan.hh.columns()),
          diagonal_(own_.diagonal + share.row_share * plan.hh.columns()),
          hr_(own_.hr + share.row_share * plan.hr.size()),
          lanes_(own_.lanes + (share.row_share * share.units + share.unit) * plan.lanes_size) {}

    void run() {
        pack();
        start();
        const Sequence& s = layer_.sequence;
        for (int64_t done = 0; done < s.steps;) {
            // A chunk: steps [first, first + count) in time, from first to last, or in reverse.
            const int64_t count = minimum(plan_.chunk, s.steps - done);
            const int64_t first = reverse_ ? s.steps - done - count : done;
            if (plan_.converts) convert_input(first, count);
            project_input(first, count);
            for (int64_t i = 0; i < count; ++i, ++done) {
                const int64_t t = reverse_ ? first + count - 1 - i : first + i;
                step(t, own_.x + (t - first) * s.batch * plan_.x_stride, own_.h[done % 2],
                     own_.h[(done + 1) % 2]);
                if (!is_diagonal<Cell>) share_.barrier->wait();
            }
            if (is_diagonal<Cell>) share_.barrier->wait();
        }
        finish();
    }

private:
    void pack() {
        const Weights& w = user_.weights;
        pack_bias<T>(plan_.ih, my_panels_, static_cast<const S*>(w.bias_ih), bias_ih_);
        pack_bias<T>(plan_.hh, my_panels_, static_cast<const S*>(w.bias_hh), bias_hh_);
        if (is_diagonal<Cell>)
            pack_bias<T>(plan_.hh, my_panels_, static_cast<const S*>(w.hh), diagonal_);
        if (plan_.one_step) return;
        if (!plan_.at_once)
            pack_rows<X>(plan_.ih, my_panels_, layer_.size.input, static_cast<const S*>(w.ih),
                         ih_ + plan_.ih.offset(my_panels_.first));
        if (!is_diagonal<Cell>)
            pack_rows<P>(plan_.hh, my_panels_, R_, static_cast<const S*>(w.hh),
                         hh_ + plan_.hh.offset(my_panels_.first));
        if (layer_.size.projected)
            pack_rows<Plain<T>>(plan_.hr, my_outputs_, H_, static_cast<const S*>(w.hr),
                                hr_ + plan_.hr.offset(my_outputs_.first));
    }

    // Both buffers of h start as h0: a row that starts late (the end of a short sequence, in
    // reverse) reads it from either.
    void start() {
        const Span rows = share_.rows.part(share_.unit, share_.units);
        const Sequence& s = layer_.sequence;
        for (int64_t b = rows.first; b < rows.last; ++b) {
            const bool zeros = is_reset(s, reverse_ ? s.steps - 1 : 0, b, reverse_);
            const S *h0 = static_cast<const S*>(zeros ? s.zeros : user_.h0) + (zeros ? 0 : b * R_),
                    *c0 = static_cast<const S*>(zeros ? s.zeros : user_.c0) +
                          (zeros ? 0 : b * c_states<Cell> * H_);
            for (H* h : own_.h) {
                convert<T>(h0, h + b * plan_.h_stride, R_);
                // The product reads these too.
                std::fill(h + b * plan_.h_stride + R_, h + b * plan_.h_stride + plan_.hh.depth,
                          H{});
            }
            for (int i = 0; i < c_states<Cell>; ++i) convert<T>(c0 + i * H_, c_row(i, b), H_);
        }
        share_.barrier->wait();
    }

    // No thread still reads the rows of the last chunk: all have passed the barrier at its end.
    void convert_input(int64_t first, int64_t count) {
        const Sequence& s = layer_.sequence;
        const int64_t I = layer_.size.input;
        for (int64_t t = first; t < first + count; ++t) {
            const Span rows =
                Span{share_.rows.first, minimum(share_.rows.last, s.batch_sizes[t])}.part(
                    share_.unit, share_.units);
            for (int64_t b = rows.first; b < rows.last; ++b) {
                auto* to = own_.rows + ((t - first) * s.batch + b) * plan_.row_stride;
                convert<T>(static_cast<const S*>(layer_.input) + (s.offsets[t] + b) * I, to, I);
                std::fill(to + I, to + plan_.row_stride, typename X::Row{});
            }
        }
        share_.barrier->wait();
    }

    void project_input(int64_t first, int64_t count) {
        const Sequence& s = layer_.sequence;
        const int64_t I = layer_.size.input, stride = plan_.x_stride, b0 = share_.rows.first;
        if (plan_.one_step) {
            T* x = own_.x + b0 * stride;
            unpacked_product<T>(
                plan_.ih, blocks_of(plan_.ih, my_panels_), static_cast<const S*>(user_.weights.ih),
                I, bias_ih_, static_cast<const S*>(layer_.input) + b0 * I, I, share_.rows.size(),
                lanes_, [=](int64_t row, int64_t block, const Vec<T>* sums) {
                    for (int g = 0; g < Cell::gates; ++g)
                        store<T>(x + row * stride + (block * Cell::gates + g) * L, sums[g], L);
                });
            return;
        }
        using XPacked = typename X::Packed;
        using XRow = typename X::Row;
        const int64_t row_stride = plan_.row_stride;
        const auto project = [&](Span panels, const XPacked* packed, int64_t t, int64_t rows) {
            const XRow* x = plan_.converts ? own_.rows + ((t - first) * s.batch + b0) * row_stride
                                           : static_cast<const XRow*>(layer_.input) +
                                                 (s.offsets[t] + b0) * row_stride;
            product_to<X>(own_.x + ((t - first) * s.batch + b0) * stride, stride, plan_.ih, panels,
                          packed, bias_ih_, x, row_stride, rows);
        };
        // The rows of all steps are contiguous, unless some are another thread's or missing.
        const bool contiguous = share_.rows.size() == s.batch &&
                                s.offsets[first + count] - s.offsets[first] == count * s.batch;
        const auto project_all = [&](Span panels, const XPacked* packed) {
            if (contiguous) {
                project(panels, packed, first, count * s.batch);
            } else {
                for (int64_t t = first; t < first + count; ++t)
                    project(panels, packed, t, minimum(share_.rows.last, s.batch_sizes[t]) - b0);
            }
        };
        if (!plan_.at_once && contiguous) {
            project_all(my_panels_, ih_);
            return;
        }
        XPacked* one = ih_ + share_.unit * plan_.ih.offset(1);
        for (int64_t panel = my_panels_.first; panel < my_panels_.last; ++panel) {
            if (plan_.at_once)
                pack_rows<X>(plan_.ih, {panel, panel + 1}, I,
                             static_cast<const S*>(user_.weights.ih), one);
            project_all({panel, panel + 1}, plan_.at_once ? one - plan_.ih.offset(panel) : ih_);
        }
    }

    // h for the next step, with the value of the output: rounded to the storage type.
    static FASTRNN_INLINE void store_h(H* to, Vec<T> h, int n) {
        store<T>(to, sizeof(H) == sizeof(S) ? h : rounded_to<T, S>(h), n);
    }

    // Stores h of one row of the data.
    FASTRNN_INLINE void store_output(int64_t row, int64_t unit, Vec<T> h, int n) const {
        const int64_t at = row * layer_.output_stride + unit;
        store<T>(static_cast<S*>(user_.output) + at, h, n);
        if (user_.output_copy) store<T>(static_cast<S*>(user_.output_copy) + at, h, n);
    }

    // What a row's next step gets: what this step computed, what it got, or zeros.
    enum class Carried { new_state, old_state, zeros };

    // The events [B] of a step, and those at which the direction enters the next one; or null.
    struct StepEvents {
        const uint8_t *now, *next;

        FASTRNN_INLINE Carried carried(int64_t b) const {
            if (now && now[b] == past_end) return Carried::old_state;
            return next && next[b] == reset ? Carried::zeros : Carried::new_state;
        }
    };
    StepEvents events_of(int64_t t) const {
        const Sequence& s = layer_.sequence;
        const int64_t next = reverse_ ? t - 1 : t + 1;
        return {s.events ? s.events + t * s.batch : nullptr,
                next >= 0 ? s.entering(next, reverse_) : nullptr};
    }

    FASTRNN_INLINE void store_h_and_output(Carried carried, const H* h_prev, H* h_next, int64_t row,
                                           int64_t unit, Vec<T> h, int n) const {
        if (carried == Carried::new_state) {
            store_h(h_next, h, n);
            store_output(row, unit, h, n);
        } else if (carried == Carried::zeros) {
            store_h(h_next, Vec<T>{}, n);
            store_output(row, unit, h, n);
        } else {
            store<T>(h_next, load<T>(h_prev, n), n);
            store_output(row, unit, Vec<T>{}, n);
        }
    }

    static Span blocks_of(const Panels& panels, Span span) {
        return {span.first * panels.blocks,
                minimum(span.last * panels.blocks, panels.block_count())};
    }

    // The i-th state besides h of a row.
    T* c_row(int i, int64_t b) const {
        return own_.c + (i * layer_.sequence.batch + b) * plan_.c_stride;
    }

    // What stands in for the product of a diagonal cell's step: W_hh * h_{t-1}, unit by unit.
    template <class Epilogue>
    FASTRNN_INLINE void scale_h(const H* h_prev, int64_t rows, const Epilogue& epilogue) const {
        const Span blocks = blocks_of(plan_.hh, my_panels_);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t block = blocks.first; block < blocks.last; ++block) {
                const int n = static_cast<int>(minimum(L, H_ - block * L));
                const Vec<T> h = load<T>(h_prev + row * plan_.h_stride + block * L, n);
                Vec<T> sums[Cell::gates];
                for (int g = 0; g < Cell::gates; ++g) {
                    const int64_t at = (block * Cell::gates + g) * L;
                    sums[g] = load<T>(bias_hh_ + at, L) + load<T>(diagonal_ + at, L) * h;
                }
                epilogue(row, block, sums);
            }
    }

    // The product of a step: with packed weights, or with unpacked weights if there is only one
    // step.
    template <class Q, class Epilogue>
    FASTRNN_INLINE void multiply(const Panels& panels, Span span, bool backwards,
                                 const typename Q::Packed* packed, const void* weights,
                                 int64_t depth, const T* bias, const typename Q::Row* a,
                                 int64_t a_stride, int64_t rows, const Epilogue& epilogue) {
        if (plan_.one_step)
            unpacked_product<T>(panels, blocks_of(panels, span), static_cast<const S*>(weights),
                                depth, bias, a, a_stride, rows, lanes_, epilogue);
        else
            product<Q>(panels, span, backwards, packed, bias, a, a_stride, rows, epilogue);
    }

    // x: W_ih x + b_ih of this step, for each row of the batch.
    void step(int64_t t, const T* x, const H* h_prev, H* h_next) {
        const Sequence& s = layer_.sequence;
        const int64_t b0 = share_.rows.first;
        const int64_t rows = minimum(share_.rows.last, s.batch_sizes[t]) - b0;
        const int64_t row0 = s.offsets[t] + b0;  // of the data
        const bool projected = layer_.size.projected;

        constexpr int C = c_states<Cell>;
        const StepEvents events = events_of(t);
        const auto through_cell = [=, this](int64_t row, int64_t block, const Vec<T>* sums) {
            const int64_t unit = block * L;
            const int n = static_cast<int>(minimum(L, H_ - unit));
            const int64_t b = b0 + row, at_h = b * plan_.h_stride + unit;
            Vec<T> gates[Cell::gates], saved[Cell::saved + 1], w[w_array<Cell>], h_before{},
                c_before[c_array<Cell>]{}, h, c[c_array<Cell>]{};
            for (int g = 0; g < Cell::gates; ++g)
                gates[g] = load<T>(x + b * plan_.x_stride + (block * Cell::gates + g) * L, L);
            for (int i = 0; i < vectors<Cell>; ++i)
                w[i] = load<T>(static_cast<const S*>(user_.weights.vectors[i]) + unit, n);
            if (!projected) h_before = load<T>(h_prev + at_h, n);
            for (int i = 0; i < C; ++i) c_before[i] = load<T>(c_row(i, b) + unit, n);
            forward_of<Cell, Vec<T>>(gates, sums, w, h_before, c_before, h, c, saved);
            const Carried carried = events.carried(b);
            for (int i = 0; i < C; ++i) {
                if (carried == Carried::old_state) c[i] = c_before[i];
                store<T>(c_row(i, b) + unit, carried == Carried::zeros ? Vec<T>{} : c[i], n);
            }
            if (projected) {
                store<T>(own_.m + b * plan_.c_stride + unit, h, n);
            } else {
                store_h_and_output(carried, h_prev + at_h, h_next + at_h, row0 + row, unit, h, n);
            }
            if (user_.saved)
                for (int i = 0; i < Cell::saved; ++i)
                    store<T>(
                        static_cast<S*>(user_.saved) + ((row0 + row) * Cell::saved + i) * H_ + unit,
                        saved[i], n);
            if (Cell::has_c && user_.c)
                for (int i = 0; i < C; ++i)
                    store<T>(
                        static_cast<S*>(user_.c) + (row0 + row) * layer_.c_stride + i * H_ + unit,
                        c[i], n);
        };
        if constexpr (is_diagonal<Cell>) {
            scale_h(h_prev + b0 * plan_.h_stride, rows, through_cell);
            return;
        }
        if (share_.units > 1)
            prefetch_rows(h_prev + b0 * plan_.h_stride, plan_.h_stride, rows, plan_.hh.depth);
        multiply<P>(plan_.hh, my_panels_, t % 2 != 0, hh_, user_.weights.hh, R_, bias_hh_,
                    h_prev + b0 * plan_.h_stride, plan_.h_stride, rows, through_cell);
        if (!projected) return;

        share_.barrier->wait();  // all units of m are written
        multiply<Plain<T>>(plan_.hr, my_outputs_, t % 2 != 0, hr_, user_.weights.hr, H_, nullptr,
                           own_.m + b0 * plan_.c_stride, plan_.c_stride, rows,
                           [=, this](int64_t row, int64_t block, const Vec<T>* sums) {
                               const int64_t unit = block * L;
                               const int n = static_cast<int>(minimum(L, R_ - unit));
                               const int64_t b = b0 + row, at_h = b * plan_.h_stride + unit;
                               store_h_and_output(events.carried(b), h_prev + at_h, h_next + at_h,
                                                  row0 + row, unit, sums[0], n);
                           });
    }

    void finish() {
        const Sequence& s = layer_.sequence;
        const Span rows = share_.rows.part(share_.unit, share_.units);
        int64_t length = s.steps;  // of sequence b
        for (int64_t b = rows.first; b < rows.last; ++b) {
            while (s.batch_sizes[length - 1] <= b) --length;
            const H* h = own_.h[(reverse_ ? s.steps : length) % 2];
            convert<T>(h + b * plan_.h_stride, static_cast<S*>(user_.h_n) + b * R_, R_);
            for (int i = 0; i < c_states<Cell>; ++i)
                convert<T>(c_row(i, b), static_cast<S*>(user_.c_n) + (b * c_states<Cell> + i) * H_,
                           H_);
        }
    }

    const ForwardTask& layer_;
    const Plan& plan_;
    const Share& share_;
    const ForwardDirection& user_;
    const typename Plan::Direction& own_;
    const bool reverse_;
    const int64_t H_, R_;
    const Span my_panels_, my_outputs_;
    // Packed, the copies of this thread's share of the rows.
    typename X::Packed* const ih_;
    typename P::Packed* const hh_;
    T *const bias_ih_, *const bias_hh_, *const diagonal_, *const hr_, *const lanes_;
};

// body(X, P) with the operands of this layer's products.
template <class Cell, class T, class S, class Body>
auto with_operands(const ForwardTask& layer, const Body& body) {
    if constexpr (is_diagonal<Cell>) {
        if (layer.sequence.steps > 1) return body(Products<T, S>(), Plain<T>());
    } else if constexpr (sizeof(S) != sizeof(T)) {
        if (layer.sequence.steps > 1) {
            if constexpr (!std::is_same_v<Products<T, S>, Plain<T>>)
                return body(Products<T, S>(), Products<T, S>());
            const int64_t values = Cell::gates * layer.size.hidden * layer.size.recurrent;
            const bool outside_l2 = values > cpu::values_outside_l2 * layer.team->partition.units;
            if (layer.sequence.batch <=
                (outside_l2 ? cpu::compact_rows_outside_l2 : cpu::compact_rows))
                return body(Plain<T>(), Compact<T, S>());
        }
    }
    return body(Plain<T>(), Plain<T>());
}

template <class Cell, class T, class S>
size_t forward_workspace(const ForwardTask& layer) {
    return with_operands<Cell, T, S>(layer, [&](auto x, auto p) {
        return ForwardPlan<Cell, T, S, decltype(x), decltype(p)>(layer).size;
    });
}

// The shape of the tiles of a step.
template <class P>
cpu::TileShape tile_shape(const Panels& panels, const char* operands) {
    const int vectors = panels.blocks_of(0) * panels.gates;
    return {.lanes = lanes<typename P::T>,
            .vectors = vectors,
            .rows = P::tile_rows(vectors),
            .operands = operands};
}

template <class Cell, class T, class S>
cpu::TileShape forward_tile(const ForwardTask& layer) {
    return with_operands<Cell, T, S>(layer, [&](auto x, auto p) {
        const ForwardPlan<Cell, T, S, decltype(x), decltype(p)> plan(layer);
        return tile_shape<decltype(p)>(plan.hh,
                                       plan.one_step ? "unpacked weights" : decltype(p)::name);
    });
}

template <class Cell, class T, class S>
void forward(const ForwardTask& layer, int rank) {
    with_operands<Cell, T, S>(layer, [&](auto x, auto p) {
        const ForwardPlan<Cell, T, S, decltype(x), decltype(p)> plan(layer);
        const Share share(*layer.team, rank, layer.sequence, layer.size.directions);
        [[maybe_unused]] const typename decltype(p)::Registers registers;
        for (int64_t i = share.directions.first; i < share.directions.last; ++i)
            ForwardLoop<Cell, T, S, decltype(x), decltype(p)>(layer, plan, share, i).run();
    });
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
