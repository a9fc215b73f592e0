// Packed matrices and their product:
//   for every row m and column n:  sum over k of a[m][k] * w[k][n]
//
// A packed matrix is a list of panels. A panel has all k of a few columns, [K][vectors][lanes], so
// that a step of k is one short contiguous read. Its columns are `blocks` blocks of `lanes` units,
// each with all gates of its units, so that a tile of the product has in registers all that the
// cell needs. Two gates, two blocks a panel, 4 lanes; one step of k:
//
//     |        block 0: units 0 to 3        |        block 1: units 4 to 7        |
//     | gate 0: 0 1 2 3 | gate 1: 0 1 2 3   | gate 0: 4 5 6 7 | gate 1: 4 5 6 7   |
//     |    vector 0     |    vector 1       |    vector 2     |    vector 3       |
//
//     memory of a panel:  | k = 0 | k = 1 | k = 2 | ... | k = K - 1 |    then the next panel
//
// Every sum runs over k in the same order, for any tile, panel and thread: a row's result has the
// same bits in any batch, for any number of threads (batch invariance).
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
    // So many products are summed before the sum is added to the total: a sum of short sums loses
    // less to rounding than one long sum, and takes longer.
    int64_t sum_length;

    Panels() = default;
    // `share` > 1: panels are narrow enough for each of so many threads to get some.
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

// The number of tiles of so many rows, for panels of so many vectors.
template <class P>
int64_t tile_count(int vectors, int64_t rows) {
    return (rows + P::tile_rows(vectors) - 1) / P::tile_rows(vectors);
}

// Divides the product of `rows` rows with a span of panels into tiles. Row m of a is at a + m *
// a_stride, or a is Tiled: packed by pack_tiles (pack.h). Successive products take the panels in
// alternating order (`backwards`), so that each begins with the panels that the last one left in
// the cache (LSTM, B = 1, H = 512, one core of an Intel Xeon: 33 GFLOP/s instead of 25). body(tile,
// arguments, panel, row, rows, vectors) sets where the sums go, `vectors` for each row, and runs
// the tile.
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
        const int64_t block = Tiled ? panels.depth : P::k_block(panels.sum_length, rows, tiles);
        for (t.first = 0; t.first < panels.depth; t.first = t.last) {
            t.last = minimum(panels.depth, t.first + block);
            t.w = w + t.first * vectors * lanes<typename P::T>;
            // What is multiplied next: another k block of this panel, or another panel.
            const auto* following = t.last < panels.depth
                                        ? w + t.last * vectors * lanes<typename P::T>
                                    : next != panel ? packed + next * t.pair_stride
                                                    : nullptr;
            const int64_t size =
                minimum(block, t.last < panels.depth ? panels.depth - t.last : panels.depth) *
                panels.width();
            for (int64_t i = 0; i < tiles; ++i) {
                const Span mine = Span{0, rows}.part(i, tiles);
                const int count = static_cast<int>(mine.size());
                t.rows = count;
                t.a = a + (Tiled ? mine.first * panels.depth : mine.first * a_stride + t.first);
                // Each tile prefetches its share of that: the first tile also reads its own panel
                // into the cache. LSTM, H = 1024, the product of a step on one core of an Intel
                // Xeon: 107 GFLOP/s at B = 16 if the first tile prefetches all, 135 so; 132 and 168
                // at B = 32.
                const int64_t prefetched = i * ((t.last - t.first) / P::step) * cpu::cache_line /
                                           int64_t(sizeof(typename P::Packed));
                t.next = following && prefetched < size ? following + prefetched : nullptr;
                body(tile_for<P, Tiled>(vectors, pair, count), t, panel, mine.first, count,
                     vectors * (1 + pair));
            }
        }
    };
    const bool in_pairs = rows <= P::paired_rows(full);
    const int64_t step = 1 + in_pairs, groups = (span.size() + step - 1) / step;
    for (int64_t i = 0; i < groups; ++i) {
        const int64_t group = backwards ? groups - 1 - i : i, panel = span.first + group * step;
        // After the last panel comes the one that the next product begins with.
        const int64_t after = i + 1 == groups ? panel : panel + (backwards ? -step : step);
        const bool pair = in_pairs && panel + 1 < span.last &&
                          panels.blocks_of(panel + 1) == panels.blocks_of(panel);
        run(panel, pair, after);
        if (in_pairs && !pair && panel + 1 < span.last) run(panel + 1, false, after);
    }
}

// Prefetches rows that other threads have just written, as where threads share units. The lines
// come from other cores' caches; together, instead of one after the other as the product reads
// them.
template <class T>
FASTRNN_INLINE void prefetch_rows(const T* rows, int64_t stride, int64_t count, int64_t width) {
    for (int64_t row = 0; row < minimum(count, cpu::exchanged_rows); ++row)
        for (int64_t i = 0; i < width; i += cpu::cache_line / int64_t(sizeof(T)))
            prefetch(rows + row * stride + i);
}

// Nothing to prefetch before a tile.
struct NoPrefetch {
    template <class... A>
    void operator()(const A&...) const {}
};

// The product of `rows` rows with a span of panels. For every row and block of units, epilogue(row,
// block, sums) gets the sums, one vector a gate. Their initial values are bias, one value a packed
// column, or zeros. Before a tile's products, prefetch_tile(row, rows, panel) may prefetch what its
// epilogue reads.
template <class P, bool Tiled = false, class Epilogue, class Prefetch = NoPrefetch>
FASTRNN_INLINE void product(const Panels& panels, Span span, bool backwards,
                            const typename P::Packed* packed, const typename P::T* bias,
                            const typename P::Row* a, int64_t a_stride, int64_t rows,
                            const Epilogue& epilogue, const Prefetch& prefetch_tile = {}) {
    // With several k blocks, the sums of all rows are stored from one block to the next.
    Vec<typename P::T> sums[cpu::k_block_rows * max_panel_vectors];
    const bool k_blocks = !Tiled && panels.depth > P::k_block(panels.sum_length, rows, 2);
    const int64_t groups = k_blocks ? (rows + cpu::k_block_rows - 1) / cpu::k_block_rows : 1;
    for (int64_t group = 0; group < groups; ++group) {
        const Span mine = Span{0, rows}.part(group, groups);
        for_each_tile<P, Tiled>(
            panels, span, backwards, packed, bias, a + mine.first * a_stride, a_stride, mine.size(),
            [&](Tile<P> tile, TileArguments<P>& t, int64_t panel, int64_t row, int count,
                int vectors) {
                auto* s = sums + (k_blocks ? row * vectors : 0);
                t.sums = s;
                t.sums_stride = vectors;
                if (t.last == panels.depth) prefetch_tile(mine.first + row, count, panel);
                tile(t);
                if (t.last < panels.depth) return;
                // Copies: the epilogue's stores could change what is read through references. AVX2,
                // backward of one step of an RNN, B = 2, H = 400: 455 us without, 330 us so.
                const Epilogue apply = epilogue;
                const int64_t first_row = mine.first + row, first_block = panel * panels.blocks;
                const int gates = panels.gates, blocks = vectors / gates;
                for (int r = 0; r < count; ++r)
                    for (int block = 0; block < blocks; ++block, s += gates)
                        apply(first_row + r, first_block + block, s);
            });
    }
}

// The same product, stored in rows of packed columns: row m of all panels is at out + m *
// out_stride. `out` is 64-byte aligned, out_stride a multiple of a vector.
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
