// Packed matrices and the one product that everything here is made of:
//   for every row m and column n:  sum over k of a[m][k] * w[k][n]
//
// A packed matrix is a list of panels. A panel holds all k of a few columns, [K][vectors][lanes],
// so that a step of k is one short contiguous read. The columns of a panel are `blocks` blocks of
// `lanes` units, each with all its gates: a tile of the product ends with whatever the cell needs
// of those units in registers.
//
// Every sum runs over k in the same order, whatever the tile, the panel or the thread: the result of
// a row has the same bits alone or in any batch, for any number of threads.
#pragma once
#include "amx.h"
#include "tile.h"

namespace fastrnn {
namespace FASTRNN_ISA {

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

struct Panels {
    int64_t depth;  // K
    int64_t units;
    int gates;  // vectors per block
    int lanes;
    int blocks;  // blocks per panel
    // So many products are summed in a row before the sum is added to the total: a sum of short sums
    // loses less to rounding than one long sum, and takes longer.
    int64_t sum_length;

    Panels() = default;
    // `share` > 1 asks for panels narrow enough that so many threads get some each.
    Panels(int64_t depth, int64_t units, int gates, int lanes, int64_t sum_length, int share = 1)
        : depth(depth),
          units(units),
          gates(gates),
          lanes(lanes),
          blocks(max_panel_vectors / gates),
          sum_length(sum_length) {
        const int64_t per_thread = (block_count() + share - 1) / share;
        if (blocks > per_thread) blocks = per_thread < 1 ? 1 : static_cast<int>(per_thread);
    }

    int64_t block_count() const { return (units + lanes - 1) / lanes; }
    int64_t count() const { return (block_count() + blocks - 1) / blocks; }
    int64_t width() const { return int64_t(blocks) * gates * lanes; }  // columns of a full panel
    int64_t columns() const { return count() * width(); }
    int64_t offset(int64_t panel) const { return panel * width() * depth; }
    int blocks_of(int64_t panel) const {
        const int64_t left = block_count() - panel * blocks;
        return left < blocks ? static_cast<int>(left) : blocks;
    }
    int64_t size() const { return count() * width() * depth; }
};

// A span of panels [first, last) or of rows.
struct Span {
    int64_t first, last;

    int64_t size() const { return last - first; }
    // The i-th of n nearly equal parts, their borders at multiples of `grain`.
    Span part(int64_t i, int64_t n, int64_t grain = 1) const {
        const int64_t grains = (size() + grain - 1) / grain;
        const int64_t a = first + grains * i / n * grain, b = first + grains * (i + 1) / n * grain;
        return {a < last ? a : last, b < last ? b : last};
    }
};

// Into how many tiles rows are cut, for panels of so many vectors.
template <class P>
int64_t tile_count(int vectors, int64_t rows) {
    return (rows + P::tile_rows(vectors) - 1) / P::tile_rows(vectors);
}

// Cuts the product of `rows` rows with a span of panels into tiles. Row m of a is at a + m * a_stride,
// or a is Tiled: what pack_tiles (pack.h) made. The panels come in their order, or `backwards`:
// of two products, the second begins with what the first has left in the cache (LSTM, B = 1, H = 512,
// on one core of an Intel Xeon: 33 GFLOP/s instead of 25). body(tile, arguments, panel, row, rows,
// vectors) runs a tile, of so many vectors a row, when it has said where the sums go.
template <class P, bool Tiled, class Body>
FASTRNN_INLINE void for_each_tile(const Panels& panels, Span span, bool backwards,
                                  const typename P::Packed* packed, const typename P::T* bias,
                                  const typename P::Row* a, int64_t a_stride, int64_t rows,
                                  const Body& body) {
    if (rows <= 0) return;
    const int full = panels.blocks * panels.gates;
    TileArguments<P> t;
    t.a_stride = a_stride;
    t.pair_stride = panels.width() * panels.depth;
    t.sum_length = panels.sum_length;
    const auto run = [&](int64_t panel, bool pair, int64_t next) {
        const int vectors = panels.blocks_of(panel) * panels.gates;
        const int64_t tiles = pair ? 1 : tile_count<P>(Tiled ? full : vectors, rows);
        const auto* w = packed + panel * t.pair_stride;
        t.bias = bias ? bias + panel * panels.width() : nullptr;
        const int64_t part = Tiled ? panels.depth : P::k_block(panels.sum_length, rows, tiles);
        for (t.first = 0; t.first < panels.depth; t.first = t.last) {
            t.last = minimum(panels.depth, t.first + part);
            t.w = w + t.first * vectors * lanes<typename P::T>;
            // What is multiplied next: another part of this panel, or another panel.
            const auto* following = t.last < panels.depth
                                        ? w + t.last * vectors * lanes<typename P::T>
                                    : next != panel ? packed + next * t.pair_stride
                                                    : nullptr;
            const int64_t size =
                minimum(part, t.last < panels.depth ? panels.depth - t.last : panels.depth) *
                panels.width();
            for (int64_t i = 0; i < tiles; ++i) {
                const Span mine = Span{0, rows}.part(i, tiles);
                const int count = static_cast<int>(mine.size());
                t.rows = count;
                t.a = a + (Tiled ? mine.first * panels.depth : mine.first * a_stride + t.first);
                // Each tile brings a part of it: the first is kept busy by its own. LSTM, H = 1024,
                // the product of a step on one core of an Intel Xeon: 107 GFLOP/s at B = 16 where the
                // first tile brings all, 135 so; 132 and 168 at B = 32.
                const int64_t brought = i * ((t.last - t.first) / P::step) * cpu::cache_line /
                                        int64_t(sizeof(typename P::Packed));
                t.next = following && brought < size ? following + brought : nullptr;
                body(tile_for<P, Tiled>(vectors, pair, count), t, panel, mine.first, count,
                     vectors * (1 + pair));
            }
        }
    };
    const bool by_twos = rows <= P::paired_rows(full);
    const int64_t step = 1 + by_twos, groups = (span.size() + step - 1) / step;
    for (int64_t i = 0; i < groups; ++i) {
        const int64_t group = backwards ? groups - 1 - i : i, panel = span.first + group * step;
        // After the last panel the one that the next product begins with.
        const int64_t after = i + 1 == groups ? panel : panel + (backwards ? -step : step);
        const bool pair = by_twos && panel + 1 < span.last &&
                          panels.blocks_of(panel + 1) == panels.blocks_of(panel);
        run(panel, pair, after);
        if (by_twos && !pair && panel + 1 < span.last) run(panel + 1, false, after);
    }
}

// Where a step's threads share units, others have just written a part of the rows that it multiplies. Those
// lines are asked for together: a product that comes to one after the other waits for each.
template <class T>
FASTRNN_INLINE void prefetch_rows(const T* rows, int64_t stride, int64_t count, int64_t width) {
    for (int64_t row = 0; row < minimum(count, cpu::exchanged_rows); ++row)
        for (int64_t i = 0; i < width; i += cpu::cache_line / int64_t(sizeof(T)))
            prefetch(rows + row * stride + i);
}

// Does nothing before a tile.
struct NoPrefetch {
    template <class... A>
    void operator()(const A&...) const {}
};

// The product of `rows` rows with a span of panels. For every row and every block of units,
// epilogue(row, block, sums) gets the sums, one vector a gate; bias (one value a packed column) is
// where they start. Before a tile's products, ahead(row, rows, panel) may bring what its epilogue is to
// read.
template <class P, bool Tiled = false, class Epilogue, class Ahead = NoPrefetch>
FASTRNN_INLINE void product(const Panels& panels, Span span, bool backwards,
                            const typename P::Packed* packed, const typename P::T* bias,
                            const typename P::Row* a, int64_t a_stride, int64_t rows,
                            const Epilogue& epilogue, const Ahead& ahead = {}) {
    // Where panels are read in parts, the sums of all rows wait for the last.
    Vec<typename P::T> sums[cpu::k_block_rows * max_panel_vectors];
    const bool parts = !Tiled && panels.depth > P::k_block(panels.sum_length, rows, 2);
    const int64_t groups = parts ? (rows + cpu::k_block_rows - 1) / cpu::k_block_rows : 1;
    for (int64_t group = 0; group < groups; ++group) {
        const Span mine = Span{0, rows}.part(group, groups);
        for_each_tile<P, Tiled>(
            panels, span, backwards, packed, bias, a + mine.first * a_stride, a_stride, mine.size(),
            [&](Tile<P> tile, TileArguments<P>& t, int64_t panel, int64_t row, int count,
                int vectors) {
                auto* s = sums + (parts ? row * vectors : 0);
                t.sums = s;
                t.sums_stride = vectors;
                if (t.last == panels.depth) ahead(mine.first + row, count, panel);
                tile(t);
                if (t.last < panels.depth) return;
                for (int r = 0; r < count; ++r)
                    for (int v = 0; v < vectors; v += panels.gates, s += panels.gates)
                        epilogue(mine.first + row + r, panel * panels.blocks + v / panels.gates, s);
            });
    }
}

// The same product left in rows of packed columns: row m of all panels is at out + m * out_stride.
// `out` is 64-byte aligned, out_stride a multiple of a vector.
template <class P>
FASTRNN_INLINE void product_to(typename P::T* out, int64_t out_stride, const Panels& panels,
                               Span span, const typename P::Packed* packed,
                               const typename P::T* bias, const typename P::Row* a,
                               int64_t a_stride, int64_t rows) {
    using T = typename P::T;
    for_each_tile<P, false>(
        panels, span, false, packed, bias, a, a_stride, rows,
        [&](Tile<P> tile, TileArguments<P>& t, int64_t panel, int64_t row, int, int) {
            T* to = out + row * out_stride + panel * panels.width();
            t.sums = reinterpret_cast<Vec<T>*>(to);
            t.sums_stride = out_stride / lanes<T>;
            tile(t);
        });
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
