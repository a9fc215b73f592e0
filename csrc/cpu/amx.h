// A tile of a product (panels.h) of pairs of bfloat16, by AMX (Intel's SDM, volume 2, TDPBF16PS):
// up to 32 rows times a panel, in eight tile registers of up to 16 rows of 64 bytes. Two vectors of
// a panel at a time:
//
//                            weights, 32 values of k
//                           | 6: vector 0 | 7: vector 1 |
//     4: rows 0 to 15    x  | 0: sums     | 1: sums     |
//     5: rows 16 to 31   x  | 2: sums     | 3: sums     |
//
// For every 32 values of k the even and the odd products are summed separately, then both sums are
// added to the total: the same order for any number of rows and columns.
#pragma once
#include <utility>

#include "tile.h"

#if defined(__AMX_BF16__)
namespace fastrnn {
namespace FASTRNN_ISA {

// The operand of LDTILECFG.
struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The tile registers of a thread, which it may use while an object of this class lives. Other code
// sets them too, so they are set up again for each call.
class TileRegisters {
public:
    TileRegisters() { set = 0; }
    ~TileRegisters() { asm volatile("tilerelease"); }
    TileRegisters(const TileRegisters&) = delete;

    // Registers 0, 1 and 4 get `upper` rows, 2, 3 and 5 get `lower`; 6 and 7 are full.
    static void set_rows(int upper, int lower) {
        const int requested = upper * 32 + lower;
        if (set == requested) return;
        set = requested;
        TileShapes shapes;
        const int each[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
        for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = each[i];
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }

private:
    static inline thread_local int set;
};

template <int Register>
FASTRNN_INLINE void load_tile(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(Register) : "memory");
}
template <int Register>
FASTRNN_INLINE void store_tile(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(Register) : "memory");
}
template <int Register>
FASTRNN_INLINE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}
template <int Sums, int Rows, int Weights>
FASTRNN_INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Weights));
}

// The sums' initial values: those of the k block before, the bias, or zeros.
template <int Register>
FASTRNN_INLINE void start_tile(const TileArguments<BFloat16Tiles>& t, const Vec<float>* sums,
                               int column) {
    if (t.first > 0)
        load_tile<Register>(sums, t.sums_stride * sizeof(*sums));
    else if (t.bias)
        load_tile<Register>(t.bias + column * lanes<float>, 0);
    else
        clear_tile<Register>();
}

// The columns from `first` on of a panel of `Vectors`, for one or two registers of rows. Four
// registers of sums wherever possible: a multiplication takes 52 cycles, and another may begin
// every 16.
template <int Vectors, bool Two, int... Column>
FASTRNN_INLINE void multiply_columns(const TileArguments<BFloat16Tiles>& t, int first,
                                     std::integer_sequence<int, Column...>) {
    constexpr int64_t values = 32, line = values * sizeof(BFloat16);
    const int rows = Two ? (t.rows + 1) / 2 : t.rows;
    const int64_t sums_stride = t.sums_stride * sizeof(*t.sums);
    const int64_t a_stride = t.a_stride * sizeof(BFloat16);
    Vec<float>* const sums = t.sums + first;
    Vec<float>* const lower = sums + rows * t.sums_stride;
    (start_tile<Column>(t, sums + Column, first + Column), ...);
    if constexpr (Two) (start_tile<Column + 2>(t, lower + Column, first + Column), ...);
    const BFloat16 *a = t.a, *b = t.a + rows * t.a_stride, *w = t.w + first * values;
    for (int64_t k = t.first; k < t.last; k += values) {
        load_tile<4>(a, a_stride);
        if constexpr (Two) load_tile<5>(b, a_stride);
        (
            [&] {
                constexpr int weights = 6 + Column % 2;
                load_tile<weights>(w + Column * values, Vectors * line);
                multiply_tiles<Column, 4, weights>();
                if constexpr (Two) multiply_tiles<Column + 2, 5, weights>();
            }(),
            ...);
        a += values;
        b += values;
        w += values / 2 * Vectors * values;
    }
    (store_tile<Column>(sums + Column, sums_stride), ...);
    if constexpr (Two) (store_tile<Column + 2>(lower + Column, sums_stride), ...);
}

template <int Vectors>
void tile_by_amx(const TileArguments<BFloat16Tiles>& t) {
    if (t.rows <= 16) {
        TileRegisters::set_rows(t.rows, t.rows);
        multiply_columns<Vectors, false>(t, 0, std::make_integer_sequence<int, Vectors>());
        return;
    }
    TileRegisters::set_rows((t.rows + 1) / 2, t.rows / 2);
    constexpr int pairs = Vectors / 2 * 2;
    for (int column = 0; column < pairs; column += 2)
        multiply_columns<Vectors, true>(t, column, std::make_integer_sequence<int, 2>());
    if constexpr (Vectors > pairs)
        multiply_columns<Vectors, true>(t, pairs, std::make_integer_sequence<int, 1>());
}

template <>
inline Tile<BFloat16Tiles> tile_for<BFloat16Tiles, false>(int vectors, bool, int) {
    switch (vectors) {
        case 1: return tile_by_amx<1>;
        case 2: return tile_by_amx<2>;
        case 3: return tile_by_amx<3>;
        default: return tile_by_amx<4>;
    }
}

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
#endif
