// What a tile of rows needs beside its product: copied to shared memory while the tile before it is
// computed, so that nobody waits for memory.
#pragma once
#include "math.cuh"
#include "tiling.h"

namespace fastrnn::cuda {

// Values of some kinds, of a tile of rows and the block's units: [2][kinds][rows][units], for the tile
// at hand and the next.
template <class S, int kinds>
class TileInputs {
public:
    // rows: of a tile that can be asked for.
    __device__ __forceinline__ TileInputs(void* memory, int units, int rows)
        : memory_(static_cast<S*>(memory)), units_(units), values_(rows * units) {
        // A thread copies a piece of the same row and units of every so many kinds: the fewer rows,
        // the fewer kinds in turn.
        const int pieces = units / piece, of_a_kind = rows * pieces;
        const int kind = threadIdx.x / of_a_kind, place = threadIdx.x % of_a_kind;
        const int stride = min(int(blockDim.x) / of_a_kind, kinds);
        part_ = place % pieces * piece << 16 | place / pieces << 12 | stride << 6 |
                (kind < stride ? kind : kinds);
    }

    // Asks for `count` rows of a tile. source(kind, row): where the values of the block's first unit
    // and the `existing - 1` after it are, or null for zeros. The other tile's values may be read
    // meanwhile; this one's, by any thread, after `arrived` and a __syncthreads.
    template <class Source>
    __device__ __forceinline__ void ask(int turn, int count, int existing, Source source) const {
        int part = part_;
        asm volatile("" : "+r"(part));  // as in Part::forget
        const int unit = part >> 16, row = part >> 12 & 15, stride = part >> 6 & 63;
        if (row >= count) return;
#pragma unroll 1
        for (int kind = part & 63; kind < kinds; kind += stride) {
            S* to = place(turn, kind, row) + unit;
            int same_row = row;
            asm volatile("" : "+r"(same_row));  // or the sources of all kinds would be worked out
            const S* from = source(kind, same_row);
            if (from && unit + piece <= existing &&
                reinterpret_cast<uintptr_t>(from + unit) % 16 == 0) {
                copy16(to, from + unit);
            } else {
                alignas(16) S some[piece];
#pragma unroll
                for (int k = 0; k < piece; ++k)
                    some[k] = from && unit + k < existing ? from[unit + k] : narrow<S>(0);
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(some);
            }
        }
    }
    // The thread's own part of what it asked for.
    __device__ __forceinline__ void arrived() const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    }

    __device__ __forceinline__ S value(int turn, int kind, int row, int unit) const {
        return place(turn, kind, row)[unit];
    }

    // What lies behind it.
    __device__ __forceinline__ void* end() const { return place(2, 0, 0); }

private:
    static constexpr int piece = 16 / sizeof(S);
    static_assert(tile_rows <= 16 && kinds < 64);

    static __device__ __forceinline__ void copy16(S* to, const S* from) {
#if __CUDA_ARCH__ >= 800
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16;" ::"l"(__cvta_generic_to_shared(to)),
            "l"(from)
            : "memory");
#else
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#endif
    }

    __device__ __forceinline__ S* place(int turn, int kind, int row) const {
        return memory_ + (turn * kinds + kind) * values_ + row * units_;
    }

    S* memory_;
    int units_;
    int values_;  // of a kind
    int part_;  // of the copying, the thread's: unit, row, stride between kinds, first kind; in one
                // register
};

}  // namespace fastrnn::cuda
