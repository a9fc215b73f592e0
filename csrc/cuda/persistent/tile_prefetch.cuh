// The values of a tile of rows besides its product: copied to shared memory while the tile before
// is computed, so that no thread waits for memory.
#pragma once
#include "../common/math.cuh"
#include "tiling.h"

namespace fastrnn::cuda {

// Values of several kinds for a tile of rows and the block's units: [2][kinds][rows][units], one
// buffer for the current tile and one for the next.
template <class S, int kinds>
class TilePrefetch {
public:
    // rows: of the largest tile.
    __device__ __forceinline__ TilePrefetch(void* memory, int units, int rows)
        : memory_(static_cast<S*>(memory)), units_(units), values_(rows * units) {
        // A thread always copies the same row and units, of every `stride`-th kind. The fewer rows
        // a tile has, the more threads share the kinds.
        const int pieces = units / piece, of_a_kind = rows * pieces;
        const int kind = threadIdx.x / of_a_kind, place = threadIdx.x % of_a_kind;
        const int stride = min(int(blockDim.x) / of_a_kind, kinds);
        part_ = place % pieces * piece << 16 | place / pieces << 12 | stride << 6 |
                (kind < stride ? kind : kinds);
    }

    // Starts copying `count` rows of a tile to a buffer. source(kind, row): the values of the
    // block's units, the first `existing` of which exist, or null for zeros. The other buffer can
    // be read meanwhile; this one, by all threads, after `wait` and a __syncthreads.
    template <class Source>
    __device__ __forceinline__ void prefetch(int buffer, int count, int existing,
                                             Source source) const {
        int part = part_;
        asm volatile("" : "+r"(part));  // as in Part::rematerialize
        const int unit = part >> 16, row = part >> 12 & 15, stride = part >> 6 & 63;
        if (row >= count) return;
#pragma unroll 1
        for (int kind = part & 63; kind < kinds; kind += stride) {
            S* to = address(buffer, kind, row) + unit;
            int same_row = row;
            asm volatile(
                ""
                : "+r"(same_row));  // or the compiler computes the sources of all kinds first
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
    // Waits for the copies that this thread has started.
    __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    }

    __device__ __forceinline__ S value(int buffer, int kind, int row, int unit) const {
        return address(buffer, kind, row)[unit];
    }

    // The memory after the two buffers.
    __device__ __forceinline__ void* end() const { return address(2, 0, 0); }

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

    __device__ __forceinline__ S* address(int buffer, int kind, int row) const {
        return memory_ + (buffer * kinds + kind) * values_ + row * units_;
    }

    S* memory_;
    int units_;
    int values_;  // of a kind
    int part_;    // what the thread copies: unit, row, stride of kinds, first kind; in one register
};

}  // namespace fastrnn::cuda
