// A register tile of a product (panels.h): a few rows times one or two panels, with all sums in
// registers. With 7 rows, a panel of 4 vectors and 16 lanes:
//
//                  w[k], one step of the panel
//                 | vector 0 | vector 1 | vector 2 | vector 3 |     loaded once a k
//     a[0][k]  x  |   sum    |   sum    |   sum    |   sum    |
//     a[1][k]  x  |   sum    |   sum    |   sum    |   sum    |     28 vector registers of sums
//      ...            ...
//     a[6][k]  x  |   sum    |   sum    |   sum    |   sum    |
#pragma once
#include <utility>

#include "operands.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Rows of `a` and one panel, or two that are `pair_stride` apart, for k in [first, last).
template <class P>
struct TileArguments {
    const typename P::Row* a;
    int64_t a_stride;
    const typename P::Packed* w;
    int64_t pair_stride, first, last, sum_length;
    const typename P::T* bias;  // the sums' initial values, or null for zeros
    Vec<typename P::T>* sums;   // `rows` of them
    int64_t sums_stride;
    int rows;
    // With a single panel: what to prefetch into the L2 cache, a line a step of k, or null.
    const typename P::Packed* next;
};

// `steps_by_lane` steps of a tile (operands.h).
template <class P, int Vectors, int Pair, int Rows, int... Step>
FASTRNN_INLINE void add_by_lane(const TileArguments<P>& t, const typename P::Row* a,
                                const typename P::Packed* w, const char*& next, int64_t next_step,
                                Vec<typename P::T> (&acc)[Rows][Vectors * Pair],
                                std::integer_sequence<int, Step...>) {
    constexpr int width = lanes<typename P::T> * P::step, total = Vectors * Pair;
    // Else a vector of weights is loaded where it is used.
    constexpr bool weights_fit = Rows * (total + 1) + total <= vector_registers;
    decltype(P::values(a)) values[Rows];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) values[r] = P::values(a + r * t.a_stride);
    const auto add = [&](auto step) __attribute__((always_inline)) {
        constexpr int i = decltype(step)::value;
        const auto* line = w + i * Vectors * width;
        const auto load = [&](int j) __attribute__((always_inline)) {
            return P::weights(line + (j / Vectors) * t.pair_stride + (j % Vectors) * width);
        };
        if (Pair == 1) {  // a step is at most one line
            __builtin_prefetch(line + cpu::prefetch_steps * Vectors * width);
            __builtin_prefetch(next, 0, 2);
            next += next_step;
        }
        decltype(load(0)) weights[total];
#pragma GCC unroll 16
        for (int j = 0; weights_fit && j < total; ++j) weights[j] = load(j);
#pragma GCC unroll 16
        for (int j = 0; j < total; ++j) {
            const auto vector = weights_fit ? weights[j] : load(j);
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r)
                acc[r][j] = P::template add_by_lane<i>(acc[r][j], values[r], vector);
        }
    };
    (add(std::integral_constant<int, Step>()), ...);
}

// P is one of operands.h. Tiled: the rows are packed by pack_tiles (pack.h).
template <class P, int Vectors, int Pair, int Rows, bool Tiled>
void tile(const TileArguments<P>& t) {
    using T = typename P::T;
    constexpr int L = lanes<T>, width = L * P::step;
    constexpr int total = Vectors * Pair;
    const auto* a = t.a;
    const auto* w = t.w;
    // Without another panel, the same line at every step: a branch would cost more.
    const char* next = reinterpret_cast<const char*>(t.next ? t.next : w);
    const int64_t next_step = t.next ? cpu::cache_line : 0;
    for (int64_t start = t.first; start < t.last; start += t.sum_length) {
        const int64_t left = t.last - start, count = left < t.sum_length ? left : t.sum_length;
        Vec<T> acc[Rows][total];
#pragma GCC unroll 16
        for (int j = 0; j < total; ++j) {
            const Vec<T> first = t.bias && start == 0 ? load<T>(t.bias + j * L, L) : Vec<T>{};
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r) acc[r][j] = first;
        }
        int64_t k = 0;
        if constexpr (P::steps_by_lane > 0 && !Tiled)
            for (; k + P::steps_by_lane * P::step <= count; k += P::steps_by_lane * P::step) {
                add_by_lane<P, Vectors, Pair>(t, a, w, next, next_step, acc,
                                              std::make_integer_sequence<int, P::steps_by_lane>());
                a += P::steps_by_lane * P::step;
                w += P::steps_by_lane * Vectors * width;
            }
        for (; k < count; k += P::step) {
            const auto load_weights = [&](int j) __attribute__((always_inline)) {
                return P::weights(w + (j / Vectors) * t.pair_stride + (j % Vectors) * width);
            };
            const auto load_value = [&](int r) __attribute__((always_inline)) {
                return P::value(a + (Tiled ? r : r * t.a_stride));
            };
            if (Pair == 1) {  // with two panels the CPU's own prefetcher is enough
                if constexpr (cpu::prefetches_panel(vector_bytes)) {
                    // A step of short vectors is at most one line.
                    constexpr int lines = vector_bytes > 16 ? Vectors : 1;
#pragma GCC unroll 4
                    for (int j = 0; j < lines; ++j)
                        __builtin_prefetch(w + (cpu::prefetch_steps * Vectors + j) * width);
                }
                __builtin_prefetch(next, 0, 2);
                next += next_step;
            }
            // In registers: all weights of the step and a value, or all values and a vector of
            // weights, which leaves room for the sums where there are 16 registers.
            if constexpr (vector_registers == 16 && Rows < total) {
                decltype(P::value(a)) values[Rows];
#pragma GCC unroll 16
                for (int r = 0; r < Rows; ++r) values[r] = load_value(r);
#pragma GCC unroll 16
                for (int j = 0; j < total; ++j) {
                    auto weights = load_weights(j);
                    if constexpr (Rows > 1) load_once(weights);
#pragma GCC unroll 16
                    for (int r = 0; r < Rows; ++r)
                        acc[r][j] = P::add(acc[r][j], values[r], weights);
                }
            } else {
                decltype(P::weights(w)) weights[total];
#pragma GCC unroll 16
                for (int j = 0; j < total; ++j) weights[j] = load_weights(j);
#pragma GCC unroll 16
                for (int r = 0; r < Rows; ++r) {
                    const auto value = load_value(r);
#pragma GCC unroll 16
                    for (int j = 0; j < total; ++j)
                        acc[r][j] = P::add(acc[r][j], value, weights[j]);
                }
            }
            a += Tiled ? Rows : P::step;
            w += Vectors * width;
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
            for (int j = 0; j < total; ++j) {
                Vec<T>& sum = t.sums[r * t.sums_stride + j];
                sum = start == 0 ? acc[r][j] : sum + acc[r][j];
            }
    }
}

template <class P>
using Tile = void (*)(const TileArguments<P>&);

template <class P, int Vectors, int Pair, bool Tiled>
Tile<P> tile_for(int rows) {
    constexpr int most = Pair == 1 ? P::tile_rows(Vectors) : P::paired_rows(Vectors);
    // clang-format off
    switch (rows) {
        case 1: return tile<P, Vectors, Pair, 1, Tiled>;
        case 2: if constexpr (most >= 2) return tile<P, Vectors, Pair, 2, Tiled>; break;
        case 3: if constexpr (most >= 3) return tile<P, Vectors, Pair, 3, Tiled>; break;
        case 4: if constexpr (most >= 4) return tile<P, Vectors, Pair, 4, Tiled>; break;
        case 5: if constexpr (most >= 5) return tile<P, Vectors, Pair, 5, Tiled>; break;
        case 6: if constexpr (most >= 6) return tile<P, Vectors, Pair, 6, Tiled>; break;
        case 7: if constexpr (most >= 7) return tile<P, Vectors, Pair, 7, Tiled>; break;
        case 8: if constexpr (most >= 8) return tile<P, Vectors, Pair, 8, Tiled>; break;
        case 9: if constexpr (most >= 9) return tile<P, Vectors, Pair, 9, Tiled>; break;
    }
    // clang-format on
    return nullptr;
}

template <class P, bool Tiled>
Tile<P> tile_for(int vectors, bool pair, int rows) {
    switch (vectors) {
        case 1: return pair ? tile_for<P, 1, 2, Tiled>(rows) : tile_for<P, 1, 1, Tiled>(rows);
        case 2: return pair ? tile_for<P, 2, 2, Tiled>(rows) : tile_for<P, 2, 1, Tiled>(rows);
        case 3: return pair ? tile_for<P, 3, 2, Tiled>(rows) : tile_for<P, 3, 1, Tiled>(rows);
        default: return pair ? tile_for<P, 4, 2, Tiled>(rows) : tile_for<P, 4, 1, Tiled>(rows);
    }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
