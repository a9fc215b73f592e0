// The product of unpacked.h for many rows: they are transposed, so that a lane is a row, and
// multiplied with one weight at a time.
//
//     unpacked.h: a lane is a k                   here: a lane is a row
//     | k = 0 | k = 1 | k = 2 | k = 3 |           | row 0 | row 1 | row 2 | row 3 |
//
// Every sum has the same bits as in unpacked.h. There a lane sums every L-th product, and the lanes
// are then added in pairs. Here every L-th product is summed on its own, and these sums are added
// in the same pairs.
#pragma once
#include "pack.h"

namespace fastrnn {
namespace FASTRNN_ISA {

constexpr int lane_vectors = cpu::lane_vectors(vector_registers);
template <class T>
constexpr int lane_units = cpu::lane_units(vector_registers, lanes<T>);

constexpr int log2_of(int n) { return n == 1 ? 0 : 1 + log2_of(n / 2); }

// Lanes are added in pairs, at first those L / 2 apart. In this order the two lanes of a pair
// follow each other; L = 8:
//
//     0 4 2 6 1 5 3 7        (0+4) + (2+6), (1+5) + (3+7), then their sum
//
// Returns the lane after j, and 0 after the last.
template <int L>
constexpr int lane_after(int j) {
    int bit = L / 2;
    for (; j & bit; bit /= 2) j ^= bit;
    return j | bit;
}

// Transposes `rows` <= L rows: to[i * to_stride] gets one value of each row, and zeros for the
// missing rows. First come all k of the first lane (k % L == 0), then those of the lane after it
// (lane_after). L = 8:
//
//     i:  0  1  2  ...     depth / 8  ...
//     k:  0  8  16 ...     4  12  20  ...    2  10  18  ...
template <class T, class A>
void transpose_to_lanes(const A* a, int64_t a_stride, int rows, int64_t depth, T* to,
                        int64_t to_stride) {
    constexpr int L = lanes<T>;
    T* lane[L];
    int j = 0;
    do {
        lane[j] = to;
        to += (depth / L + (j < depth % L)) * to_stride;
        j = lane_after<L>(j);
    } while (j);
    for (int64_t k = 0; k < depth; k += L) {
        const int n = static_cast<int>(minimum(L, depth - k));
        Vec<T> values[L];
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r)
            values[r] = r < rows ? load<T>(a + r * a_stride + k, n) : Vec<T>{};
        transpose<T>(values);
        for (int i = 0; i < n; ++i) store<T>(lane[i] + k / L * to_stride, values[i], L);
    }
}

// out[u * out_stride + v * L], for `units` <= lane_units units, gets the sums of a unit and Vectors
// * L transposed rows. Prefetches what is multiplied next into the L2 cache, `next_bytes` for each
//   k.
template <class T, int Vectors>
void lane_tile(const T* transposed, const T* w, int64_t depth, int units, const char* next,
               int next_bytes, T* out, int64_t out_stride) {
    constexpr int L = lanes<T>, Units = lane_units<T>, levels = log2_of(L);
    const T* weights[Units];
    for (int u = 0; u < Units; ++u) weights[u] = w + (u < units ? u : units - 1) * depth;
    // The first sum of each pair, by level of the pairs; the last level has the result.
    Vec<T> waiting[levels + 1][Units][Vectors];
    int lane = 0;
    do {
        Vec<T> sums[Units][Vectors];
#pragma GCC unroll 8
        for (int u = 0; u < Units; ++u)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sums[u][v] = Vec<T>{};
        for (int64_t k = lane; k < depth; k += L, transposed += Vectors * L) {
            __builtin_prefetch(next, 0, 2);
            next += next_bytes;
#pragma GCC unroll 8
            for (int u = 0; u < Units; ++u) {
                const Vec<T> weight = broadcast(weights[u][k]);
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v)
                    sums[u][v] = multiply_add(sums[u][v], load<T>(transposed + v * L, L), weight);
            }
        }
        int level = 0;
        for (int bit = L / 2; lane & bit; bit /= 2, ++level)
#pragma GCC unroll 8
            for (int u = 0; u < Units; ++u)
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) sums[u][v] += waiting[level][u][v];
#pragma GCC unroll 8
        for (int u = 0; u < Units; ++u)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) waiting[level][u][v] = sums[u][v];
        lane = lane_after<L>(lane);
    } while (lane);
    for (int u = 0; u < units; ++u)
        for (int v = 0; v < Vectors; ++v)
            store<T>(out + u * out_stride + v * L, waiting[levels][u][v], L);
}

template <class T>
auto lane_tile_for(int64_t vectors) {
    if constexpr (lane_vectors > 2)
        if (vectors == 3) return lane_tile<T, 3>;
    return vectors == 2 ? lane_tile<T, 2> : lane_tile<T, 1>;
}

// Whether any of so many rows are transposed. With vectors of 16 bytes it is not faster.
constexpr bool is_transposed(int64_t rows) {
    return vector_bytes > 16 && rows >= cpu::transposed_rows;
}

// The values of scratch memory that a product of so many rows needs.
template <class T>
constexpr int64_t lane_scratch(int64_t rows, int64_t depth) {
    constexpr int L = lanes<T>;
    if (!is_transposed(rows)) return 0;
    return round_up((minimum(round_up(rows, L), cpu::transposed_at_once) + lane_units<T>)*depth, L);
}

// Of at most cpu::transposed_at_once rows, those that are transposed: all that fill vectors, the
// last vector to 5/8 or more.
template <class T>
class TransposedRows {
    static constexpr int L = lanes<T>, Units = lane_units<T>;
    static_assert(L % Units == 0 && cpu::transposed_at_once % L == 0);

public:
    // They are stored in `scratch`, of lane_scratch values.
    template <class A>
    TransposedRows(const A* a, int64_t a_stride, int64_t rows, int64_t depth, T* scratch)
        : rows_(rows),
          depth_(depth),
          vectors_(is_transposed(rows) ? (rows + L * 3 / 8) / L : 0),
          transposed_(scratch),
          weights_(scratch + vectors_ * L * depth) {
        for (int64_t i = 0; i < tiles(); ++i) {
            const Span mine = tile(i);
            for (int64_t v = mine.first; v < mine.last; ++v)
                transpose_to_lanes<T>(a + v * L * a_stride, a_stride,
                                      static_cast<int>(minimum(L, rows - v * L)), depth,
                                      transposed_ + (mine.first * depth + v - mine.first) * L,
                                      mine.size() * L);
        }
    }

    // How many are transposed, from the first on.
    int64_t count() const { return minimum(rows_, vectors_ * L); }

    // dot_block of unpacked.h, for these rows.
    template <class W>
    void block(const W* w, int units, Vec<T>* sums, int64_t stride) const {
        if (vectors_ == 0) return;
        alignas(64) T results[L * cpu::transposed_at_once];
        for (int first = 0; first < units; first += Units) {
            const int some = units - first < Units ? units - first : Units;
            const T* weights = as_values(w + first * depth_, some * depth_);
            for (int64_t i = 0; i < tiles(); ++i) {
                const Span mine = tile(i);
                lane_tile_for<T>(mine.size())(
                    transposed_ + mine.first * depth_ * L, weights, depth_, some,
                    reinterpret_cast<const char*>(w + (first + some) * depth_), Units * sizeof(W),
                    results + first * cpu::transposed_at_once + mine.first * L,
                    cpu::transposed_at_once);
            }
        }
        for (int64_t v = 0; v < vectors_; ++v) {
            Vec<T> columns[L];
#pragma GCC unroll 16
            for (int u = 0; u < L; ++u)
                columns[u] = u < units ? load<T>(results + u * cpu::transposed_at_once + v * L, L)
                                       : Vec<T>{};
            transpose<T>(columns);
            for (int64_t r = v * L; r < minimum(rows_, (v + 1) * L); ++r)
                sums[r * stride] = columns[r - v * L];
        }
    }

private:
    int64_t tiles() const { return (vectors_ + lane_vectors - 1) / lane_vectors; }
    Span tile(int64_t i) const { return Span{0, vectors_}.part(i, tiles()); }

    const T* as_values(const T* w, int64_t) const { return w; }
    template <class W>
    const T* as_values(const W* w, int64_t n) const {
        for (int64_t i = 0; i < n; i += L) {
            const int left = static_cast<int>(minimum(L, n - i));
            store<T>(weights_ + i, load<T>(w + i, left), left);
        }
        return weights_;
    }

    const int64_t rows_, depth_, vectors_;
    T *const transposed_, *const weights_;  // weights_: a tile's 16-bit weights as T
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
