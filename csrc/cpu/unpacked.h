// The product of panels.h with unpacked weights, in torch's order in memory: for a network of one
// step, where packing them would take longer than the product.
//
// A sum runs along the vectors of a row of weights, then over their lanes:
//
//     a[row]:   | 0 1 2 3 | 4 5 6 7 | ...
//     w[unit]:  | 0 1 2 3 | 4 5 6 7 | ...
//
//     sums[lane] = sum of a[row][k] * w[unit][k] over k % lanes == lane
//     result     = sum of sums over the lanes, in pairs
//
// The order is the same for every tile: a row's result has the same bits in any batch, for any
// number of threads (batch invariance). It is not the order of packed products. Many rows are
// transposed first (row_lanes.h).
#pragma once
#include "row_lanes.h"

namespace fastrnn {
namespace FASTRNN_ISA {

// Adds the two halves of every 2 * Width lanes of a, and of b, with one blend and one shuffle.
// Width = 2, 4 lanes:
//
//     a: | a0 a1 | a2 a3 |      stay: | a0 a1 | b2 b3 |
//     b: | b0 b1 | b2 b3 |      move: | a2 a3 | b0 b1 |      ->  | a0+a2 a1+a3 | b2+b0 b3+b1 |
template <class V, int Width, size_t... Lane>
FASTRNN_INLINE V sum_of_halves(V a, V b, std::index_sequence<Lane...>) {
    constexpr int n = sizeof...(Lane);
    const V stay = __builtin_shufflevector(a, b, (Lane & Width ? n + Lane : Lane)...);
    const V move =
        __builtin_shufflevector(a, b, (Lane & Width ? n + Lane - Width : Lane + Width)...);
    return stay + move;
}

// Lane i of the result is the sum over all lanes of sums[i]. Overwrites sums.
template <class T, int Width = lanes<T> / 2>
FASTRNN_INLINE Vec<T> sum_lanes(Vec<T>* sums) {
    constexpr auto all = std::make_index_sequence<lanes<T>>();
#pragma GCC unroll 16
    for (int i = 0; i < Width; ++i)
        sums[i] = sum_of_halves<Vec<T>, Width>(sums[i], sums[i + Width], all);
    if constexpr (Width > 1)
        return sum_lanes<T, Width / 2>(sums);
    else
        return sums[0];
}

// Lane r * Units + u of the result is the sum over k of a[r][k] * w[u][k]; Rows * Units = lanes.
// Only the first `units` of the Units exist.
template <class T, int Rows, class A, class W>
FASTRNN_INLINE Vec<T> dot_tile(const A* a, int64_t a_stride, const W* w, int64_t w_stride,
                               int64_t depth, int units) {
    constexpr int L = lanes<T>, Units = L / Rows;
    Vec<T> sums[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) sums[i] = Vec<T>{};
    const auto add = [&](int64_t k, int n, int u_count) __attribute__((always_inline)) {
        Vec<T> values[Rows];
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) values[r] = load<T>(a + r * a_stride + k, n);
#pragma GCC unroll 16
        for (int u = 0; u < Units; ++u) {
            if (u >= u_count) break;
            const Vec<T> weights = load<T>(w + u * w_stride + k, n);
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r)
                sums[r * Units + u] = multiply_add(sums[r * Units + u], values[r], weights);
        }
    };
    int64_t k = 0;
    if (units == Units)
        for (; k + L <= depth; k += L) add(k, L, Units);
    else
        for (; k + L <= depth; k += L) add(k, L, units);
    if (k < depth) add(k, static_cast<int>(depth - k), units);
    return sum_lanes<T>(sums);
}

// The sums of `rows` rows and one gate of a block of `count` <= lanes units: sums[r * stride] gets
// those of row r, and zeros from `count` on. Not inlined, because inlining made it half of the
// 16-bit types' code.
template <class T, class A, class W>
[[gnu::noinline]] void dot_block(const A* a, int64_t a_stride, int64_t rows, const W* w,
                                 int64_t depth, int count, Vec<T>* sums, int64_t stride) {
    constexpr int L = lanes<T>, Rows = L >= 4 ? L / 4 : 1, Units = L / Rows;
    const int64_t together = rows / Rows * Rows;
    for (int64_t r = 0; count < L && r < together; ++r) sums[r * stride] = Vec<T>{};
    for (int first = 0; first < count; first += Units)
        for (int64_t r = 0; r < together; r += Rows) {
            const Vec<T> tile =
                dot_tile<T, Rows>(a + r * a_stride, a_stride, w + first * depth, depth, depth,
                                  count - first < Units ? count - first : Units);
            for (int i = 0; i < Rows; ++i)
                memcpy(reinterpret_cast<T*>(sums + (r + i) * stride) + first,
                       reinterpret_cast<const T*>(&tile) + i * Units, Units * sizeof(T));
        }
    for (int64_t r = together; r < rows; ++r)
        sums[r * stride] = dot_tile<T, 1>(a + r * a_stride, a_stride, w, depth, depth, count);
}

// `product` of panels.h, for weights [gates * units, depth] and a span of blocks of `lanes` units.
// `scratch` has room for lane_scratch values.
template <class T, class A, class W, class Epilogue>
FASTRNN_INLINE void unpacked_product(const Panels& panels, Span blocks, const W* w, int64_t depth,
                                     const T* bias, const A* a, int64_t a_stride, int64_t rows,
                                     T* scratch, const Epilogue& epilogue) {
    constexpr int L = lanes<T>;
    const int gates = panels.gates;
    Vec<T> sums[cpu::transposed_at_once * max_panel_vectors];
    const int64_t parts = (rows + cpu::transposed_at_once - 1) / cpu::transposed_at_once;
    for (int64_t i = 0; i < parts; ++i) {
        const Span part = Span{0, rows}.part(i, parts, L);
        const A* of_part = a + part.first * a_stride;
        const TransposedRows<T> transposed(of_part, a_stride, part.size(), depth, scratch);
        for (int64_t block = blocks.first; block < blocks.last; ++block) {
            const int count = static_cast<int>(minimum(L, panels.units - block * L));
            for (int g = 0; g < gates; ++g) {
                const W* of_block = w + (g * panels.units + block * L) * depth;
                transposed.block(of_block, count, sums + g, gates);
                dot_block<T>(of_part + transposed.count() * a_stride, a_stride,
                             part.size() - transposed.count(), of_block, depth, count,
                             sums + transposed.count() * gates + g, gates);
            }
            for (int64_t r = 0; r < part.size(); ++r) {
                Vec<T>* of_row = sums + r * gates;
                for (int g = 0; bias && g < gates; ++g)
                    of_row[g] += load<T>(bias + (block * gates + g) * L, L);
                epilogue(part.first + r, block, of_row);
            }
        }
    }
}

// `product` of panels.h, of one gate, for few rows and unpacked weights: row k, [panels.units]
// values, is at w(k). Every sum has the same bits as in the packed product, because it adds the
// same terms in the same order. `scratch` has room for 2 * rows values a column.
template <class T, class W, class Epilogue>
void unpacked_columns_product(const Panels& panels, Span blocks, const W& w, const T* a,
                              int64_t a_stride, int64_t rows, T* scratch,
                              const Epilogue& epilogue) {
    constexpr int L = lanes<T>, most = cpu::unpacked_columns_step;
    const int64_t first = blocks.first * L, width = blocks.size() * L;
    T *const acc = scratch, *const total = scratch + rows * width;
    const auto add = [&](int64_t k, auto count, bool fresh) __attribute__((always_inline)) {
        constexpr int Count = decltype(count)::value;
        decltype(w(0)) row[Count];
        for (int i = 0; i < Count; ++i) row[i] = w(k + i) + first;
        for (int64_t at = 0; at < width; at += L) {
            const int64_t left = panels.units - first - at;
            const int n = left < L ? static_cast<int>(left) : L;
            Vec<T> weights[Count];
#pragma GCC unroll 8
            for (int i = 0; i < Count; ++i) weights[i] = load<T>(row[i] + at, n);
            for (int64_t r = 0; r < rows; ++r) {
                const T* values = a + r * a_stride + k;
                T* to = acc + r * width + at;
                Vec<T> sum = fresh ? Vec<T>{} : load<T>(to, L);
#pragma GCC unroll 8
                for (int i = 0; i < Count; ++i)
                    sum = multiply_add(sum, broadcast(values[i]), weights[i]);
                store<T>(to, sum, L);
            }
        }
    };
    for (int64_t start = 0; start < panels.depth; start += panels.sum_length) {
        const int64_t left = panels.depth - start,
                      end = start + (left < panels.sum_length ? left : panels.sum_length);
        int64_t k = start;
        for (; k + most <= end; k += most) add(k, std::integral_constant<int, most>(), k == start);
        for (; k < end; ++k) add(k, std::integral_constant<int, 1>(), k == start);
        for (int64_t i = 0; i < rows * width; i += L) {
            const Vec<T> part = load<T>(acc + i, L);
            store<T>(total + i, start == 0 ? part : load<T>(total + i, L) + part, L);
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t block = blocks.first; block < blocks.last; ++block) {
            const Vec<T> sum = load<T>(total + r * width + (block - blocks.first) * L, L);
            epilogue(r, block, &sum);
        }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
