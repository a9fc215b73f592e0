// The backward pass of one layer. Every thread of the team runs `backward` with its rank; over a chunk
// of steps, last step first:
//   1. its part of the time loop: a step is one product of the gate gradients of the step after it
//      with W_hh, with the cell's backward as its epilogue, which leaves this step's gate gradients;
//   2. from the gate gradients of the chunk, together: what it adds to the gradients of the input
//      and of the weights (gradients.h); then the next chunk.
// As in forward.h a thread packs what it uses itself.
#pragma once
#include "forward.h"

namespace fastrnn {
namespace FASTRNN_ISA {

using cpu::BackwardTask;

// A chunk of steps [first, first + count) in time.
struct Chunk {
    int64_t first, count;
    int64_t row, rows;  // of the data
};

// P is how the products with the gate gradients read their operands (operands.h).
template <class Cell, class T, class P>
struct BackwardPlan {
    using D = typename P::Row;

    struct Direction {
        // Packed, transposed; `hh` and `hr` once for each part of the rows, of `ih` one panel a
        // thread, if at_once.
        typename P::Packed *ih, *hh;
        T* hr;
        D* dgates;    // [rows of a chunk, stride]: `grads` times `units`
        D* after;     // [B, stride]: those of the last step of the chunk before
        T* dh;        // [B, H or P]: dL/dh of the step before, as far as it is known
        T* dc;        // [B, H]
        T* dh_total;  // [rows of a chunk, P]: dL/dh_t, for the gradient of the projection
        T* m;         // [rows of a chunk, H]: the projection's input, likewise
    };

    Panels ih, hh, hr;           // for gradients of the input, of h and of the projection's input
    Panels sum_x, sum_h, sum_m;  // rows of input, of h_{t-1} and of m, for gradients of weights
    char* sums;                  // packed rows, of each thread
    int64_t sums_size;           // bytes a thread
    bool sums_together;          // of rows of input and of h_{t-1}
    char* tiles;                 // of each thread: columns of dgates, for gradients of weights
    template <class Q>
    static constexpr int64_t tiled_rows = cpu::tiles_at_once * Q::tile_rows(max_panel_vectors);
    int64_t tiles_size;
    int64_t units;                       // of a gate in dgates: H, and zeros up to P::depth_step
    int64_t stride;                      // of the gate gradients' rows
    int64_t chunk, chunks;               // steps of a chunk, and how many there are
    bool at_once;                        // few rows: a panel of W_ih is packed, used and done with
    bool unpacked_input, unpacked_step;  // fewer still: W_ih, or W_hh, is used as it lies in memory
    bool first_product;                  // whether the gradient of h0 is asked for
    Direction direction[2];
    size_t size;

    explicit BackwardPlan(const BackwardTask& layer) {
        constexpr int L = lanes<T>;
        const Dimensions& d = layer.size;
        const Sequence& s = layer.sequence;
        const int threads = layer.team->partition.threads(), share = layer.team->partition.units;
        const int64_t copies = layer.team->partition.rows;
        const int64_t outputs = d.projected ? d.recurrent : 0;
        units = round_up(d.hidden, P::depth_step);
        at_once = s.rows() <= cpu::at_once_rows;
        // Not pairs, whose sums run in another order.
        unpacked_input = P::step == 1 && s.rows() <= cpu::unpacked_rows;
        unpacked_step = P::step == 1 && s.steps == 1 && s.batch <= cpu::unpacked_rows;
        ih = Panels(Cell::gates * units, d.input, 1, L, P::backward_sum, at_once ? threads : 1);
        hh = Panels(Cell::gates * units, d.recurrent, 1, L, P::backward_sum, share);
        hr = Panels(outputs, d.hidden, 1, L, Plain<T>::backward_sum, share);
        sum_x = Panels(cpu::sum_rows, d.input, 1, L, P::backward_sum);
        sum_h = Panels(cpu::sum_rows, d.recurrent, 1, L, P::backward_sum);
        sum_m = Panels(cpu::sum_rows, d.projected ? d.hidden : 0, 1, L, Plain<T>::backward_sum);
        constexpr int64_t value = sizeof(typename P::Packed);
        const int64_t x_size = sum_x.size() * value, h_size = sum_h.size() * value;
        sums_together = sum_x.blocks == sum_h.blocks && x_size + h_size <= cpu::summed_bytes;
        sums_size = std::max({sums_together ? x_size + h_size : std::max(x_size, h_size),
                              sum_m.size() * int64_t(sizeof(T))});
        stride = odd_lines<D>(Cell::grads * units);
        first_product = false;
        for (int i = 0; i < d.directions; ++i)
            if (layer.direction[i].grad_h0) first_product = true;
        chunk = s.batch < cpu::backward_rows ? minimum(s.steps, cpu::backward_rows / s.batch) : 1;
        chunks = (s.steps + chunk - 1) / chunk;
        const int64_t rows = minimum(s.rows(), chunk * s.batch);
        Workspace space(layer.workspace);
        sums = space.take<char>(threads * sums_size);
        const int64_t summed = minimum(cpu::sum_rows, rows);
        tiles_size = std::max(round_up(summed, P::depth_step) * tiled_rows<P> * int64_t(sizeof(D)),
                              d.projected ? summed * tiled_rows<Plain<T>> * int64_t(sizeof(T)) : 0);
        tiles = space.take<char>(threads * tiles_size);
        for (int i = 0; i < d.directions; ++i) {
            Direction& p = direction[i];
            p.ih = space.take<typename P::Packed>(!layer.grad_input || unpacked_input ? 0
                                                  : at_once ? threads * ih.offset(1)
                                                            : ih.size());
            p.hh = space.take<typename P::Packed>(unpacked_step ? 0 : copies * hh.size());
            p.hr = space.take<T>(copies * hr.size());
            p.dgates = space.take<D>(rows * stride);
            p.after = space.take<D>(chunks > 1 ? s.batch * stride : 0);
            p.dh = space.take<T>(s.batch * d.recurrent);
            p.dc = space.take<T>(Cell::has_c ? s.batch * d.hidden : 0);
            p.dh_total = space.take<T>(rows * outputs);
            p.m = space.take<T>(d.projected ? rows * d.hidden : 0);
        }
        size = space.size();
    }

    template <class V>
    V* sums_of(int64_t rank) const {
        return reinterpret_cast<V*>(sums + rank * sums_size);
    }
    template <class V>
    V* tiles_of(int64_t rank) const {
        return reinterpret_cast<V*>(tiles + rank * tiles_size);
    }

    // The directions come to the same rows of the input's gradient in different chunks.
    bool starts_from_zeros(const BackwardTask& layer) const {
        return layer.size.directions == 2 && chunks > 1;
    }

    // The i-th chunk that a direction handles, from the end of its sequence.
    Chunk chunk_at(const Sequence& s, int64_t i, bool reverse) const {
        const int64_t count = minimum(chunk, s.steps - i * chunk);
        const int64_t first = reverse ? i * chunk : s.steps - i * chunk - count;
        return {first, count, s.offsets[first], s.offsets[first + count] - s.offsets[first]};
    }
};

// Where the previous values of a row are: in the row of the step before it, or in the initial
// state.
template <class S>
struct PreviousRows {
    const Sequence& sequence;
    bool reverse;
    const S* rows;
    int64_t rows_stride;
    const S* initial;
    int64_t initial_stride;

    bool from_rows(int64_t t, int64_t b) const {
        return reverse ? t + 1 < sequence.steps && b < sequence.batch_sizes[t + 1] : t > 0;
    }
    const S* row(int64_t t, int64_t b) const {
        return rows + (sequence.offsets[t + (reverse ? 1 : -1)] + b) * rows_stride;
    }
    const S* start(int64_t b) const { return initial + b * initial_stride; }

    template <class T>
    FASTRNN_INLINE Vec<T> load_at(int64_t t, int64_t b, int64_t unit, int n) const {
        return from_rows(t, b) ? load<T>(row(t, b) + unit, n) : load<T>(start(b) + unit, n);
    }
};

// The time loop of one direction over one chunk.
template <class Cell, class T, class S, class P>
class BackwardLoop {
    static constexpr int L = lanes<T>;
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
          h_prev_{layer.sequence,
                  reverse_,
                  static_cast<const S*>(user_.output),
                  layer.output_stride,
                  static_cast<const S*>(user_.h0),
                  R_},
          c_prev_{layer.sequence,
                  reverse_,
                  static_cast<const S*>(user_.c),
                  H_,
                  static_cast<const S*>(user_.c0),
                  H_} {}

    void run() {
        if (is_first_) start();
        // After the last chunk, one more: the way from the first step to the initial state.
        const bool one_more = is_last_ && plan_.first_product;
        for (int64_t i = 0; i < chunk_.count + one_more; ++i) {
            const int64_t t = reverse_ ? chunk_.first + i : chunk_.first + chunk_.count - 1 - i;
            const bool follows = i > 0 || !is_first_;
            step(t, follows ? t + (reverse_ ? -1 : 1) : -1, i < chunk_.count);
            share_.barrier->wait();
        }
        if (is_last_)
            finish();
        else
            keep_last_step();
    }

private:
    void start() {
        if (!plan_.unpacked_step && (layer_.sequence.steps > 1 || plan_.first_product))
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
        if (Cell::has_c) copy(user_.grad_c_n, own_.dc, H_);
        share_.barrier->wait();
    }

    // The row of W_hh that the k-th gate gradient is multiplied with.
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
        if (Cell::has_c) copy(own_.dc, user_.grad_c0, H_);
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

    // t: this step; after: the step handled before it (the next in time), or -1. Rows that are in
    // `after` get their gradient through W_hh; rows that are in t go on through the cell. A row
    // only in `after` has reached its initial state; one only in t is at its last step.
    void step(int64_t t, int64_t after, bool inside) {
        const Sequence& s = layer_.sequence;
        const int64_t b0 = share_.rows.first;
        const auto rows_in = [&](int64_t step) {
            return minimum(share_.rows.last, s.batch_sizes[step]) - b0;
        };
        const int64_t rows = inside ? rows_in(t) : 0;
        const int64_t following_rows = after >= 0 ? rows_in(after) : 0;
        const bool projected = layer_.size.projected;

        const auto add_up = [=, this](int64_t row, int64_t block, const Vec<T>& through) {
            const int64_t b = b0 + row, unit = block * L;
            const int n = static_cast<int>(minimum(L, R_ - unit));
            T* known = own_.dh + b * R_ + unit;
            Vec<T> dh = through + load<T>(known, n);
            if (row >= rows) {
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
        if (following_rows > 0) {
            // The last G gate gradients belong to W_hh h.
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
                               const Rows asked{t, b0 + row, minimum(b0 + row + count, b0 + rows)};
                               const Span units = units_of(plan_.hh, panel);
                               prefetch_grad_output(asked, units);
                               if (!projected) prefetch_saved(asked, units);
                           });
            };
            multiply();
        }
        for (int64_t row = following_rows > 0 ? following_rows : 0; row < rows; ++row)
            for (int64_t block = blocks.first; block < blocks.last; ++block)
                add_up(row, block, Vec<T>{});
        if (!projected || rows <= 0) return;

        share_.barrier->wait();  // every unit of dh_total is there
        product<Plain<T>>(
            plan_.hr, m_panels_, t % 2 != 0, hr_, nullptr, own_.dh_total + slot(t, b0) * R_, R_,
            rows,
            [=, this](int64_t row, int64_t block, const Vec<T>* sums) {
                const int64_t unit = block * L;
                through_cell(t, b0 + row, unit, static_cast<int>(minimum(L, H_ - unit)), sums[0]);
            },
            [&](int64_t row, int count, int64_t panel) {
                prefetch_saved({t, b0 + row, b0 + row + count}, units_of(plan_.hr, panel));
            });
    }

    // Of step t, [first, last) of the batch; none if last <= first.
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

    // What add_up and through_cell are about to read, and was written long ago.
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
            if (Cell::has_c) {
                prefetch_units(static_cast<const S*>(user_.c) + at * H_, units);
                if (c_prev_.from_rows(rows.t, b)) prefetch_units(c_prev_.row(rows.t, b), units);
            }
        }
    }

    // Writes the gate gradients; returns the part of the gradient of h_{t-1} that does not pass
    // through W_hh.
    FASTRNN_INLINE Vec<T> through_cell(int64_t t, int64_t b, int64_t unit, int n, Vec<T> dh) const {
        const int64_t at = layer_.sequence.offsets[t] + b;
        Vec<T> saved[Cell::saved + 1], dgates[Cell::grads], h{}, h_prev{}, c{}, c_prev{}, dc{},
            dh_prev{}, dc_prev{};
        for (int i = 0; i < Cell::saved; ++i)
            saved[i] =
                load<T>(static_cast<const S*>(user_.saved) + (at * Cell::saved + i) * H_ + unit, n);
        if (Cell::needs_h)
            h = load<T>(static_cast<const S*>(user_.output) + at * layer_.output_stride + unit, n);
        if (Cell::needs_h_prev) h_prev = h_prev_.template load_at<T>(t, b, unit, n);
        if (Cell::has_c) {
            c = load<T>(static_cast<const S*>(user_.c) + at * H_ + unit, n);
            c_prev = c_prev_.template load_at<T>(t, b, unit, n);
            dc = load<T>(own_.dc + b * H_ + unit, n);
        }
        Cell::backward(saved, h_prev, c_prev, h, c, dh, dc, dgates, dh_prev, dc_prev);
        for (int i = 0; i < Cell::grads; ++i) {
            D* to = own_.dgates + slot(t, b) * plan_.stride + i * plan_.units;
            store<T>(to + unit, dgates[i], n);
            if (P::depth_step > 1 && unit + n == H_) std::fill(to + H_, to + plan_.units, D{});
        }
        if (Cell::has_c) store<T>(own_.dc + b * H_ + unit, dc_prev, n);
        if constexpr (allows_projection<Cell>)
            if (layer_.size.projected)
                store<T>(own_.m + slot(t, b) * H_ + unit, Cell::output(saved, c), n);
        return dh_prev;
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
    typename P::Packed* const hh_;  // packed, its copies
    T* const hr_;
    const PreviousRows<S> h_prev_;
    const PreviousRows<S> c_prev_;
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
