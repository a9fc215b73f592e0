// The operands of a product (panels.h): the type of its rows, the type of its packed matrix, and
// how they are multiplied. T is the type of the sums. `step` values of k are adjacent in a packed
// column, and the depth of a product is a multiple of `depth_step`:
//
//     a vector of packed weights, one cell for each lane; w(k, column)
//
//     step = 1   | w(0, 0) | w(0, 1) | w(0, 2) | ...              T, or 16 bits (Compact)
//     step = 2   | w(0, 0) w(1, 0) | w(0, 1) w(1, 1) | ...        pairs of bfloat16
//
// By lane (multiplies_by_lane), a tile loads a vector of each row's values, for `steps_by_lane`
// steps, and multiplies the weights of a step by one of its lanes:
//
//     | a(0) | a(1) | a(2) | a(3) |    step = 1, 4 lanes: weights of k = 2 times lane 2
#pragma once
#include <type_traits>

#include "choices.h"
#include "simd.h"

namespace fastrnn {
namespace FASTRNN_ISA {

using cpu::max_panel_vectors;

constexpr int64_t depth_of_all = int64_t(1) << 40;

// The smallest multiple of `step` that is not below n.
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class T_>
struct Plain {
    using T = T_;
    using Row = T;
    using Packed = T;
    static constexpr int step = 1, depth_step = 1;
    static constexpr int64_t chunk_rows = cpu::chunk_rows;
    static constexpr int64_t forward_sum = cpu::forward_sum, backward_sum = cpu::backward_sum;
    static constexpr const char* name = "packed weights";
    struct Registers {};  // registers that a thread must set up for as long as it multiplies

    static constexpr int tile_rows(int vectors) {
        return cpu::tile_rows(vector_registers, vectors, multiplies_by_lane);
    }
    static constexpr int paired_rows(int vectors) {
        return cpu::paired_rows(vector_registers, vectors);
    }

    static constexpr int steps_by_lane = multiplies_by_lane ? lanes<T> : 0;

    static FASTRNN_INLINE Vec<T> weights(const T* p) { return load<T>(p, lanes<T>); }
    static FASTRNN_INLINE Vec<T> value(const T* p) { return broadcast(*p); }
    static FASTRNN_INLINE Vec<T> add(Vec<T> sum, Vec<T> value, Vec<T> weights) {
        return multiply_add(sum, value, weights);
    }
#if defined(FASTRNN_NEON)
    static FASTRNN_INLINE Vec<T> values(const T* p) { return load<T>(p, lanes<T>); }
    template <int Step>
    static FASTRNN_INLINE Vec<T> add_by_lane(Vec<T> sum, Vec<T> values, Vec<T> weights) {
        return multiply_add_lane<Step>(sum, weights, values);
    }
#endif
    // The k block of a panel that several tiles read: a multiple of the length of a sum.
    static int64_t k_block(int64_t sum_length, int64_t rows, int64_t tiles) {
        if (tiles == 1) return depth_of_all;
        return sum_length < cpu::k_block ? cpu::k_block / sum_length * sum_length : sum_length;
    }
    // Stores `step` vectors as `weights` reads them.
    static FASTRNN_INLINE void pack(T* p, const Vec<T>* v) { store<T>(p, v[0], lanes<T>); }
};

// Weights packed as 16 bits, which halves the bytes to read: faster where a step is bound by
// reading them, slower where many rows would share one conversion while packing. The same bits as
// Plain.
template <class T_, class S>
struct Compact : Plain<T_> {
    using T = T_;
    using Packed = S;
    static constexpr const char* name = "packed weights of 16 bits";

    static FASTRNN_INLINE Vec<T> weights(const S* p) { return load<T>(p, lanes<T>); }
    static FASTRNN_INLINE void pack(S* p, const Vec<T>* v) { store<T>(p, v[0], lanes<T>); }
};

// Two values of k in each lane, the first in the lower half.
FASTRNN_INLINE void pack_pairs(BFloat16* p, const Vec<float>* v) {
    const UInt32Vec pair = ((UInt32Vec)v[0] >> 16) | ((UInt32Vec)v[1] & 0xffff0000);
    memcpy(p, &pair, sizeof pair);
}

// With pairs, two instructions convert the values of two vectors to float; without, four.
template <>
struct Compact<float, BFloat16> : Plain<float> {
    using Packed = BFloat16;
    struct Pair {
        Vec<float> first, second;
    };
    static constexpr int step = 2, depth_step = 2;
    static constexpr int steps_by_lane = Plain<float>::steps_by_lane / step;
    static constexpr const char* name = "packed weights of 16 bits";

    static FASTRNN_INLINE Pair weights(const BFloat16* p) {
        UInt32Vec v;
        memcpy(&v, p, sizeof v);
        return {(Vec<float>)(v << 16), (Vec<float>)(v & 0xffff0000)};
    }
    static FASTRNN_INLINE Pair value(const float* p) { return {broadcast(p[0]), broadcast(p[1])}; }
    static FASTRNN_INLINE Vec<float> add(Vec<float> sum, const Pair& value, const Pair& weights) {
        return multiply_add(multiply_add(sum, value.first, weights.first), value.second,
                            weights.second);
    }
#if defined(FASTRNN_NEON)
    template <int Step>
    static FASTRNN_INLINE Vec<float> add_by_lane(Vec<float> sum, Vec<float> values,
                                                 const Pair& weights) {
        return multiply_add_lane<2 * Step + 1>(
            multiply_add_lane<2 * Step>(sum, weights.first, values), weights.second, values);
    }
#endif
    static FASTRNN_INLINE void pack(BFloat16* p, const Vec<float>* v) { pack_pairs(p, v); }
};

#if defined(FASTRNN_BFLOAT16_PAIRS)
// Pairs of bfloat16, by the instruction that multiplies and adds two at a time: exact products,
// float sums.
struct BFloat16Pairs : Plain<float> {
    using Row = BFloat16;
    using Packed = BFloat16;
    static constexpr int step = 2, depth_step = 2;
    static constexpr int64_t forward_sum = cpu::bfloat16_sum, backward_sum = cpu::bfloat16_sum;
    static constexpr const char* name = "packed pairs of bfloat16";

    static FASTRNN_INLINE Vec<float> weights(const BFloat16* p) {
        Vec<float> v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static FASTRNN_INLINE Vec<float> value(const BFloat16* p) {
        float pair;
        memcpy(&pair, p, sizeof pair);
#if defined(FASTRNN_NEON)
        return (Vec<float>)vdupq_n_f32(pair);
#else
        return (Vec<float>)_mm512_set1_ps(pair);
#endif
    }
    static FASTRNN_INLINE Vec<float> add(Vec<float> sum, Vec<float> value, Vec<float> weights) {
#if defined(FASTRNN_NEON)
        return (Vec<float>)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)weights,
                                       (bfloat16x8_t)value);
#else
        return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)value, (__m512bh)weights);
#endif
    }
#if defined(FASTRNN_NEON)
    static FASTRNN_INLINE Vec<float> values(const BFloat16* p) { return weights(p); }
    template <int Step>
    static FASTRNN_INLINE Vec<float> add_by_lane(Vec<float> sum, Vec<float> values,
                                                 Vec<float> weights) {
        return (Vec<float>)vbfdotq_laneq_f32((float32x4_t)sum, (bfloat16x8_t)weights,
                                             (bfloat16x8_t)values, Step);
    }
#endif
    static FASTRNN_INLINE void pack(BFloat16* p, const Vec<float>* v) { pack_pairs(p, v); }
};

#if defined(__AMX_BF16__)
class TileRegisters;

// Pairs of bfloat16, by AMX registers of 16 x 16 sums (amx.h): 32 values of k at a time.
struct BFloat16Tiles : BFloat16Pairs {
    static constexpr int depth_step = 32;
    static constexpr int64_t chunk_rows = cpu::amx_chunk_rows;
    static constexpr const char* name = "packed tiles of bfloat16";
    using Registers = TileRegisters;

    static constexpr int tile_rows(int) { return 32; }
    // A k block of 32 rows stays in the L1 cache while the columns of a panel are read.
    static int64_t k_block(int64_t, int64_t rows, int64_t) {
        return rows <= 16 ? depth_of_all : cpu::amx_k_block;
    }
    static constexpr int paired_rows(int) { return 0; }
};
#endif
#endif

// The operands of products with many weights of storage type S.
template <class T, class S>
struct ProductsOf {
    using type = Plain<T>;
};
#if defined(__AMX_BF16__)
template <>
struct ProductsOf<float, BFloat16> {
    using type = BFloat16Tiles;
};
#elif defined(FASTRNN_BFLOAT16_PAIRS)
template <>
struct ProductsOf<float, BFloat16> {
    using type = BFloat16Pairs;
};
#endif
template <class T, class S>
using Products = typename ProductsOf<T, S>::type;

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
