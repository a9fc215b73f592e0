// How matrices get into panels (panels.h). Columns past the last unit are filled with zeros.
#pragma once
#include <utility>

#include "panels.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Exchange the blocks of `width` rows and columns off the diagonal of a pair of rows: one stage of
// a transposition.
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

// w is [gates * units, depth] row-major: packed column (unit, gate) is row gate * units + unit. For
// h = W x.
template <class T, class S>
void pack_rows(const Panels& panels, Span span, const S* w, T* packed) {
    constexpr int L = lanes<T>;
    for (int64_t panel = span.first; panel < span.last; ++panel) {
        const int blocks = panels.blocks_of(panel);
        const int64_t stride = int64_t(blocks) * panels.gates * L;
        for (int block = 0; block < blocks; ++block) {
            const int64_t unit = (panel * panels.blocks + block) * L;
            const int64_t count = panels.units - unit < L ? panels.units - unit : L;
            for (int gate = 0; gate < panels.gates; ++gate) {
                const S* from = w + (gate * panels.units + unit) * panels.depth;
                T* to = packed + panels.offset(panel) + (block * panels.gates + gate) * L;
                for (int64_t k = 0; k < panels.depth; k += L) {
                    const int n = panels.depth - k < L ? static_cast<int>(panels.depth - k) : L;
                    Vec<T> rows[L];
                    for (int i = 0; i < L; ++i)
                        rows[i] = i < count ? load<T>(from + i * panels.depth + k, n) : Vec<T>{};
                    transpose<T>(rows);
                    for (int i = 0; i < n; ++i) store<T>(to + (k + i) * stride, rows[i], L);
                }
            }
        }
    }
}

// row(k) points to the `units` values of row k. For products with W transposed, and for sums over
// rows of the data.
template <class T, class Row>
FASTRNN_INLINE void pack_columns(const Panels& panels, Span span, const Row& row, T* packed) {
    constexpr int L = lanes<T>;
    for (int64_t k = 0; k < panels.depth; ++k) {
        const auto* from = row(k);
        for (int64_t panel = span.first; panel < span.last; ++panel) {
            const int blocks = panels.blocks_of(panel);
            T* to = packed + panels.offset(panel) + k * blocks * L;
            for (int block = 0; block < blocks; ++block) {
                const int64_t unit = (panel * panels.blocks + block) * L;
                const int64_t left = panels.units - unit;
                store<T>(to + block * L,
                         load<T>(from + unit, left < L ? static_cast<int>(left) : L), L);
            }
        }
    }
}

// One value a packed column, or zeros if there is no bias.
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
