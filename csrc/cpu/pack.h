// Packing of matrices into panels (panels.h). Columns after the last unit are zeros.
#pragma once
#include <utility>

#include "panels.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// One stage of a transposition: exchanges the off-diagonal blocks of `Width` lanes of a pair of
// rows. Width = 2, 4 lanes:
//
//     a:  | a0 a1 | a2 a3 |        a:  | a0 a1 | b0 b1 |
//     b:  | b0 b1 | b2 b3 |   ->   b:  | a2 a3 | b2 b3 |
template <class V, int Width, size_t... Lane>
FASTRNN_INLINE void exchange(V& a, V& b, std::index_sequence<Lane...>) {
    constexpr int n = sizeof...(Lane);
    const V first = __builtin_shufflevector(a, b, (Lane & Width ? n + Lane - Width : Lane)...);
    const V second = __builtin_shufflevector(a, b, (Lane & Width ? n + Lane : Lane + Width)...);
    a = first;
    b = second;
}

template <class T, int Width = lanes<T> / 2>
FASTRNN_INLINE void transpose(Vec<T>* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i)
        if ((i & Width) == 0)
            exchange<Vec<T>, Width>(rows[i], rows[i + Width], std::make_index_sequence<lanes<T>>());
    if constexpr (Width > 1) transpose<T, Width / 2>(rows);
}

// rows[k] gets the k-th values of `lanes` rows that are `stride` apart.
template <class T>
FASTRNN_INLINE void load_transposed(const T* from, int64_t stride, Vec<T>* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) rows[i] = load<T>(from + i * stride, lanes<T>);
    transpose<T>(rows);
}

// Four floats of each fourth row, in the order of the rows:
//
//     | row 0: k to k + 3 | row 4: k to k + 3 | row 8: ... | row 12: ... |
FASTRNN_INLINE Vec<float> load_fours(const float* from, int64_t stride) {
#if defined(__AVX512F__)
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 4 * stride), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(from + 8 * stride), 2);
    return (Vec<float>)_mm512_insertf32x4(v, _mm_loadu_ps(from + 12 * stride), 3);
#elif defined(__AVX2__)
    const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(from));
    return (Vec<float>)_mm256_insertf128_ps(v, _mm_loadu_ps(from + 4 * stride), 1);
#else
    return load<float>(from, 4);
#endif
}

// Of every four lanes, the lower or the upper two of a and of b, alternating. Lower:
//
//     a: | a0 a1 a2 a3 | ...    b: | b0 b1 b2 b3 | ...    ->    | a0 b0 a1 b1 | ...
template <bool Upper, size_t... Lane>
FASTRNN_INLINE Vec<float> interleave(Vec<float> a, Vec<float> b, std::index_sequence<Lane...>) {
    constexpr size_t first = Upper ? 2 : 0, n = sizeof...(Lane);
    return __builtin_shufflevector(a, b,
                                   (Lane / 4 * 4 + first + Lane % 4 / 2 + (Lane % 2 ? n : 0))...);
}

// For floats, loads of four values do half of the transposition.
template <>
FASTRNN_INLINE void load_transposed<float>(const float* from, int64_t stride, Vec<float>* rows) {
    constexpr auto all = std::make_index_sequence<lanes<float>>();
#pragma GCC unroll 4
    for (int k = 0; k < lanes<float>; k += 4) {
        Vec<float> r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) r[i] = load_fours(from + i * stride + k, stride);
        const Vec<float> low02 = interleave<false>(r[0], r[2], all),
                         low13 = interleave<false>(r[1], r[3], all),
                         high02 = interleave<true>(r[0], r[2], all),
                         high13 = interleave<true>(r[1], r[3], all);
        rows[k] = interleave<false>(low02, low13, all);
        rows[k + 1] = interleave<true>(low02, low13, all);
        rows[k + 2] = interleave<false>(high02, high13, all);
        rows[k + 3] = interleave<true>(high02, high13, all);
    }
}

using cpu::staged;

// to[k * to_stride + i] = from[i * from_stride + k] for `rows` <= lanes values of i and `depth` <=
// staged values of k, as P packs them; zeros for the other i. Whole: rows is lanes, and depth is
// staged.
template <class P, bool Whole, class S>
FASTRNN_INLINE void transpose_to(const S* from, int64_t from_stride, int64_t rows, int64_t depth,
                                 typename P::Packed* to, int64_t to_stride) {
    using T = typename P::T;
    constexpr int L = lanes<T>;
    constexpr int64_t row = staged + L;
    alignas(64) T buffer[L * row];
    if (Whole) rows = L, depth = staged;
    for (int64_t i = 0; i < L; ++i)
        for (int64_t k = 0; k < depth; k += L) {
            const int n = Whole || depth - k >= L ? L : static_cast<int>(depth - k);
            store<T>(buffer + i * row + k,
                     i < rows ? load<T>(from + i * from_stride + k, n) : Vec<T>{}, L);
        }
    for (int64_t k = 0; k < depth; k += L) {
        Vec<T> columns[L];
        load_transposed<T>(buffer + k, row, columns);
        const int64_t n = Whole || depth - k >= L ? L : depth - k;
        for (int64_t i = 0; i < n; i += P::step) P::pack(to + (k + i) * to_stride, columns + i);
    }
}

// Packs w [gates * units, depth], row-major, for W x: packed column (unit, gate) is row gate *
// units + unit. The panels of the span follow one another, the first at `packed`. Values from
// `depth` to panels.depth are zeros.
template <class P, class S>
void pack_rows(const Panels& panels, Span span, int64_t depth, const S* w,
               typename P::Packed* packed) {
    constexpr int L = lanes<typename P::T>;
    for (int64_t panel = span.first; panel < span.last; ++panel) {
        const int blocks = panels.blocks_of(panel);
        const int64_t stride = int64_t(blocks) * panels.gates * L;
        for (int64_t k = 0; k < depth; k += staged) {
            const int64_t left = depth - k;
            auto* to = packed + k * stride;
            for (int block = 0; block < blocks; ++block) {
                const int64_t unit = (panel * panels.blocks + block) * L;
                const int64_t rows = panels.units - unit;
                for (int gate = 0; gate < panels.gates; ++gate, to += L * P::step) {
                    const S* from = w + (gate * panels.units + unit) * depth + k;
                    if (rows >= L && left >= staged)
                        transpose_to<P, true>(from, depth, L, staged, to, stride);
                    else
                        transpose_to<P, false>(from, depth, rows, left < staged ? left : staged, to,
                                               stride);
                }
            }
        }
        const int64_t done = round_up(depth, P::step);
        memset(packed + done * stride, 0, (panels.depth - done) * stride * sizeof(*packed));
        packed += panels.width() * panels.depth;
    }
}

// Packs rows without transposing them, for products with W transposed and for sums over rows of the
// data. row(k) points to the `units` values of row k, or is null for zeros; k increases from call
// to call, but for the row that is prefetched, `distance` later, if that is not 0.
template <class P, class Row>
FASTRNN_INLINE void pack_columns(const Panels& panels, Span span, const Row& row,
                                 typename P::Packed* packed, int64_t distance = 0) {
    using T = typename P::T;
    constexpr int L = lanes<T>;
    for (int64_t k = 0; k < panels.depth; k += P::step) {
        decltype(row(k)) from[P::step];
        for (int i = 0; i < P::step; ++i) from[i] = row(k + i);
        const auto* next = distance && k + distance < panels.depth ? row(k + distance) : nullptr;
        for (int64_t panel = span.first; panel < span.last; ++panel) {
            const int blocks = panels.blocks_of(panel);
            auto* to = packed + panels.offset(panel) + k * blocks * L;
            for (int block = 0; block < blocks; ++block, to += L * P::step) {
                const int64_t unit = (panel * panels.blocks + block) * L;
                const int64_t left = panels.units - unit;
                const int n = left < L ? static_cast<int>(left) : L;
                if (next) prefetch(next + unit);
                Vec<T> values[P::step];
                for (int i = 0; i < P::step; ++i)
                    values[i] = from[i] ? load<T>(from[i] + unit, n) : Vec<T>{};
                P::pack(to, values);
            }
        }
    }
}

// Packs the first `rows` columns of panels.depth rows as the rows of the tiles of a product with
// `panels`. A tile is [K][rows of the tile], and one tile follows another:
//
//     from: | k = 0: 0 1 2 3 4 5 |    packed: | k = 0: 0 1 2 | k = 1: 0 1 2 | ... |  tile 0
//           | k = 1: 0 1 2 3 4 5 |            | k = 0: 3 4 5 | k = 1: 3 4 5 | ... |  tile 1
//
// Reads row by row, with a prefetch; reading the columns of one tile after the other takes twice as
// long. Copies whole vectors where it can: what a vector has beyond its rows of the tile lands in
// the places of the next k, which are stored later. Zen 5 limited to AVX2, LSTM, backward, in ms,
// copying only the rows of a tile and so: 2.06 and 1.80 at B = 16, H = 64; 18.9 and 17.2 at B = 16,
// H = 256; 9.9 and 9.1 at B = 32, H = 128.
template <class T>
void pack_tiles(const Panels& panels, const T* from, int64_t stride, int64_t rows, T* packed) {
    const int64_t tiles = tile_count<Plain<T>>(panels.blocks * panels.gates, rows);
    constexpr int64_t line = cpu::cache_line / int64_t(sizeof(T));
    int64_t borders[cpu::tiles_at_once + 1];
    for (int64_t i = 0; i < tiles; ++i) borders[i] = Span{0, rows}.part(i, tiles).first;
    borders[tiles] = rows;
    for (int64_t k = 0; k < panels.depth; ++k) {
        const T* row = from + k * stride;
        const int64_t left = panels.depth - k;
        if (k + cpu::prefetch_distance < panels.depth)
            for (int64_t i = 0; i < rows; i += line)
                prefetch(row + cpu::prefetch_distance * stride + i);
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t first = borders[i], size = borders[i + 1] - first;
            T* to = packed + first * panels.depth + k * size;
            for (int64_t done = 0; done < size; done += lanes<T>) {
                // So many values follow in the tile, and at least as many in `from`.
                const bool whole = left * size - done >= lanes<T>;
                const int n = static_cast<int>(whole ? lanes<T> : minimum(size - done, lanes<T>));
                store<T>(to + done, load<T>(row + first + done, n), n);
            }
        }
    }
}

// Transposes the first `rows` columns of `depth` rows, to rows of panels.depth values, with zeros
// from `depth` on.
FASTRNN_INLINE void transpose_rows(const Panels& panels, const BFloat16* from, int64_t stride,
                                   int64_t depth, int64_t rows, BFloat16* to) {
    constexpr int L = lanes<float>;
    for (int64_t k = 0; k < panels.depth; k += L) {
        const int left = static_cast<int>(minimum(L, panels.depth - k));
        for (int64_t row = 0; row < rows; row += L) {
            const int count = static_cast<int>(minimum(L, rows - row));
            Vec<float> values[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i)
                values[i] = k + i < depth ? load<float>(from + (k + i) * stride + row, count)
                                          : Vec<float>{};
            transpose<float>(values);
            for (int i = 0; i < count; ++i) {
                store_bits(to + (row + i) * panels.depth + k, narrowed((UInt32Vec)values[i] >> 16),
                           left);
            }
        }
    }
}

// One value for each packed column: the bias, or zeros if there is none.
template <class T, class S>
void pack_bias(const Panels& panels, Span span, const S* bias, T* packed) {
    constexpr int L = lanes<T>;
    const int64_t last = span.last * panels.blocks < panels.block_count()
                             ? span.last * panels.blocks
                             : panels.block_count();
    for (int64_t block = span.first * panels.blocks; block < last; ++block) {
        const int64_t left = panels.units - block * L;
        const int n = left < L ? static_cast<int>(left) : L;
        for (int gate = 0; gate < panels.gates; ++gate)
            store<T>(packed + (block * panels.gates + gate) * L,
                     bias ? load<T>(bias + gate * panels.units + block * L, n) : Vec<T>{}, L);
    }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
