// The sizes of the backward pass of one layer, and its workspace.
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

// P is the operands (operands.h) of the products with the gate gradients.
template <class Cell, class T, class P>
struct BackwardPlan {
    using D = typename P::Row;

    struct Direction {
        // Packed, transposed weights: of `hh` and `hr` one copy for each share of the rows. If
        // at_once, `ih` is one panel for each thread.
        typename P::Packed *ih, *hh;
        T* hr;
        D* dgates;    // [rows of a chunk, stride]: gradients [grads + vectors, units] of each row
        D* after;     // [B, stride]: gate gradients of the step after the chunk
        T* dh;        // [B, R]: what is known of dL/dh_{t-1} without the product with W_hh
        T* dc;        // [B, C]: dL/dc_{t-1}
        T* dh_total;  // [rows of a chunk, P]: dL/dh_t, for the gradient of the projection
        T* m;         // [rows of a chunk, H]: the projection's input, for the same
    };

    Panels ih, hh, hr;           // for gradients of the input, of h and of the projection's input
    Panels sum_x, sum_h, sum_m;  // rows of input, of h_{t-1} and of m, for gradients of weights
    char* sums;                  // packed rows for gradients of weights, of each thread
    int64_t sums_size;           // bytes of one thread
    bool sums_together;          // rows of input and of h_{t-1} are packed at the same time
    char* tiles;  // packed columns of dgates for gradients of weights, of each thread
    template <class Q>
    static constexpr int64_t tiled_rows = cpu::tiles_at_once * Q::tile_rows(max_panel_vectors);
    int64_t tiles_size;
    int64_t units;                       // of a gate in dgates: H, and zeros up to P::depth_step
    int64_t stride;                      // between rows of dgates
    int64_t chunk, chunks;               // steps of a chunk, and the number of chunks
    bool at_once;                        // few rows: each panel of W_ih is overwritten by the next
    bool unpacked_input, unpacked_step;  // even fewer: W_ih, or W_hh, is not packed
    bool first_product;                  // the gradient of h0 is required
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
        // Not with pairs, whose sums have another order.
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
        stride = odd_lines<D>((Cell::grads + vectors<Cell>)*units);
        first_product = false;
        for (int i = 0; i < d.directions; ++i)
            if (layer.direction[i].grad_h0 && !is_diagonal<Cell>) first_product = true;
        const int64_t most_rows = cpu::backward_rows(s.batch);
        chunk = s.batch < most_rows ? minimum(s.steps, most_rows / s.batch) : 1;
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
            p.hh = space.take<typename P::Packed>(
                unpacked_step || is_diagonal<Cell> ? 0 : copies * hh.size());
            p.hr = space.take<T>(copies * hr.size());
            p.dgates = space.take<D>(rows * stride);
            p.after = space.take<D>(chunks > 1 ? s.batch * stride : 0);
            p.dh = space.take<T>(s.batch * d.recurrent);
            p.dc = space.take<T>(c_states<Cell> * s.batch * d.hidden);
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

    // Whether grad_input starts from zeros, to which both directions add: they reach the same rows
    // in different chunks.
    bool starts_from_zeros(const BackwardTask& layer) const {
        return layer.size.directions == 2 && chunks > 1;
    }

    // The i-th chunk of a direction, from the end of its sequence.
    Chunk chunk_at(const Sequence& s, int64_t i, bool reverse) const {
        const int64_t count = minimum(chunk, s.steps - i * chunk);
        const int64_t first = reverse ? i * chunk : s.steps - i * chunk - count;
        return {first, count, s.offsets[first], s.offsets[first + count] - s.offsets[first]};
    }
};

// The values of the step before a row's: in the row of that step, in the initial state, or zeros.
template <class S>
struct PreviousRows {
    const Sequence& sequence;
    bool reverse;
    const S* rows;
    int64_t rows_stride;
    const S* initial;
    int64_t initial_stride;

    bool from_rows(int64_t t, int64_t b) const {
        if (!reverse) return t > 0;
        return t + 1 < sequence.steps && b < sequence.batch_sizes[t + 1] &&
               !(sequence.events && sequence.entering(t, true)[b] == past_end);
    }
    const S* row(int64_t t, int64_t b) const {
        return rows + (sequence.offsets[t + (reverse ? 1 : -1)] + b) * rows_stride;
    }
    const S* start(int64_t b) const { return initial + b * initial_stride; }

    const S* values(int64_t t, int64_t b) const {
        if (is_reset(sequence, t, b, reverse)) return static_cast<const S*>(sequence.zeros);
        return from_rows(t, b) ? row(t, b) : start(b);
    }

    template <class T>
    FASTRNN_INLINE Vec<T> load_at(int64_t t, int64_t b, int64_t unit, int n) const {
        return load<T>(values(t, b) + unit, n);
    }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
