// What a thread's two units need beside their product, copied to shared memory two steps ahead.
#pragma once
#include <string.h>

#include "math.cuh"
#include "one_block_kernel.h"

namespace fastrnn::cuda {

// Values of two units.
template <class S>
struct alignas(2 * sizeof(S)) Pair {
    S of[2];
};
template <class S>
using PairBits = std::conditional_t<sizeof(S) == 4, uint2, uint32_t>;

// At once: from an assignment the compiler makes two accesses.
template <class S>
__device__ __forceinline__ Pair<S> load_pair(const void* from) {
    const auto bits = *static_cast<const PairBits<S>*>(from);
    Pair<S> pair;
    memcpy(&pair, &bits, sizeof pair);
    return pair;
}
template <class S>
__device__ __forceinline__ void store_pair(void* to, const Pair<S>& pair) {
    PairBits<S> bits;
    memcpy(&bits, &pair, sizeof pair);
    *static_cast<PairBits<S>*>(to) = bits;
}

// Whether pairs of S lie at addresses of their size, in rows from `array` on (or no array) that are
// `stride` apart.
template <class S>
__device__ __forceinline__ bool has_pairs(const void* array, int64_t stride) {
    return reinterpret_cast<uintptr_t>(array) % sizeof(Pair<S>) == 0 && stride % 2 == 0;
}

// A thread's two units, side by side in the rows of arrays. The second, or both, may not exist.
class TwoUnits {
public:
    // at_once: all arrays of S have pairs. Then both units exist, or none.
    __device__ __forceinline__ TwoUnits(int first, int hidden, bool at_once)
        : first_(first), count_(max(0, min(hidden - first, 2))), at_once_(at_once) {}

    __device__ __forceinline__ int first() const { return first_; }
    __device__ __forceinline__ int count() const { return count_; }
    __device__ __forceinline__ bool at_once() const { return at_once_; }

    // row: where the values of unit 0 are, or null for zeros.
    template <class S>
    __device__ __forceinline__ Pair<S> load(const S* row) const {
        Pair<S> pair;
#pragma unroll
        for (int u = 0; u < 2; ++u) pair.of[u] = row && u < count_ ? row[first_ + u] : narrow<S>(0);
        return pair;
    }
    template <class S>
    __device__ __forceinline__ void store(S* row, const Pair<S>& pair) const {
        if (at_once_)
            store_pair(row + first_, pair);
        else
            store_apart(row, pair);
    }
    // Of an array that may have no pairs.
    template <class S>
    __device__ __forceinline__ void store_apart(S* row, const Pair<S>& pair) const {
#pragma unroll
        for (int u = 0; u < 2; ++u)
            if (u < count_) row[first_ + u] = pair.of[u];
    }

private:
    int first_, count_;
    bool at_once_;
};

// Values of some kinds, of the thread's two rows: [ahead_stages][2][kinds][threads]. The thread alone
// writes and reads them, so that no barrier is needed.
template <class S, int kinds, int threads>
class Ahead {
public:
    __device__ __forceinline__ explicit Ahead(void* memory)
        : memory_(static_cast<Pair<S>*>(memory) + threadIdx.x) {}

    // Asks for values that are there, or for zeros, of a stage that has been read. row: where the
    // values of unit 0 are.
    __device__ __forceinline__ void ask(int stage, int i, int kind, const S* row, bool there,
                                        const TwoUnits& units) const {
        Pair<S>* to = place(stage, i, kind);
        if (units.at_once() && there)
            copy(to, row + units.first());
        else
            store_pair(to, units.load(there ? row : nullptr));
    }
    // Ends what is asked for at a time: `arrived` waits for all but the last two of these.
    __device__ __forceinline__ void asked() const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    __device__ __forceinline__ void arrived() const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_group 2;" ::: "memory");
#endif
    }

    __device__ __forceinline__ Pair<S> values(int stage, int i, int kind) const {
        return load_pair<S>(place(stage, i, kind));
    }

private:
    static __device__ __forceinline__ void copy(Pair<S>* to, const S* from) {
#if __CUDA_ARCH__ >= 800
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], %2;" ::"l"(__cvta_generic_to_shared(to)),
            "l"(from), "n"(sizeof(Pair<S>))
            : "memory");
#else
        store_pair(to, load_pair<S>(from));
#endif
    }

    __device__ __forceinline__ Pair<S>* place(int stage, int i, int kind) const {
        return memory_ + stage * (2 * kinds * threads) + (i * kinds + kind) * threads;
    }

    Pair<S>* memory_;
};

}  // namespace fastrnn::cuda
