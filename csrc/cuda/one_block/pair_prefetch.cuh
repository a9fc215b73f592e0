// A lane's two units: their values as pairs, and what they need besides their product, prefetched
// two steps ahead.
#pragma once
#include <string.h>

#include "../common/math.cuh"
#include "kernel.h"

namespace fastrnn::cuda {

// The values of two neighbouring units.
template <class S>
struct alignas(2 * sizeof(S)) UnitPair {
    S of[2];
};
template <class S>
using UnitPairBits = std::conditional_t<sizeof(S) == 4, uint2, uint32_t>;

// In one access: from an assignment the compiler makes two.
template <class S>
__device__ __forceinline__ UnitPair<S> load_pair(const void* from) {
    const auto bits = *static_cast<const UnitPairBits<S>*>(from);
    UnitPair<S> pair;
    memcpy(&pair, &bits, sizeof pair);
    return pair;
}
template <class S>
__device__ __forceinline__ void store_pair(void* to, const UnitPair<S>& pair) {
    UnitPairBits<S> bits;
    memcpy(&bits, &pair, sizeof pair);
    *static_cast<UnitPairBits<S>*>(to) = bits;
}

// Whether pairs of S are aligned to their size in an array of rows that are `stride` apart. Also
// true if there is no array.
template <class S>
__device__ __forceinline__ bool has_pairs(const void* array, int64_t stride) {
    return reinterpret_cast<uintptr_t>(array) % sizeof(UnitPair<S>) == 0 && stride % 2 == 0;
}

// A lane's two units, neighbours in the rows of arrays. The second, or both, may not exist.
class LaneUnits {
public:
    // paired: whether all arrays have aligned pairs (has_pairs). Then both units exist, or none.
    __device__ __forceinline__ LaneUnits(int first, int hidden, bool paired)
        : first_(first), count_(max(0, min(hidden - first, 2))), paired_(paired) {}

    __device__ __forceinline__ int first() const { return first_; }
    __device__ __forceinline__ int count() const { return count_; }
    __device__ __forceinline__ bool paired() const { return paired_; }

    // row: the values of all units, or null for zeros.
    template <class S>
    __device__ __forceinline__ UnitPair<S> load(const S* row) const {
        UnitPair<S> pair;
#pragma unroll
        for (int u = 0; u < 2; ++u) pair.of[u] = row && u < count_ ? row[first_ + u] : narrow<S>(0);
        return pair;
    }
    template <class S>
    __device__ __forceinline__ void store(S* row, const UnitPair<S>& pair) const {
        if (paired_)
            store_pair(row + first_, pair);
        else
            store_each(row, pair);
    }
    // To an array that need not have aligned pairs.
    template <class S>
    __device__ __forceinline__ void store_each(S* row, const UnitPair<S>& pair) const {
#pragma unroll
        for (int u = 0; u < 2; ++u)
            if (u < count_) row[first_ + u] = pair.of[u];
    }

private:
    int first_, count_;
    bool paired_;
};

// Values of several kinds for the thread's two rows and units:
// [prefetch_stages][2][kinds][threads]. Only the thread itself writes and reads them, so that no
// barrier is needed.
template <class S, int kinds, int threads>
class PairPrefetch {
public:
    __device__ __forceinline__ explicit PairPrefetch(void* memory)
        : memory_(static_cast<UnitPair<S>*>(memory) + threadIdx.x) {}

    // Starts copying the values of a kind to a stage, or stores zeros if they are not there. row:
    // the values of all units.
    __device__ __forceinline__ void prefetch(int stage, int i, int kind, const S* row, bool there,
                                             const LaneUnits& units) const {
        UnitPair<S>* to = address(stage, i, kind);
        if (units.paired() && there)
            copy(to, row + units.first());
        else
            store_pair(to, units.load(there ? row : nullptr));
    }
    // Ends the copies of a step. `wait` waits for all copies but those of the last two steps.
    __device__ __forceinline__ void commit() const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_group 2;" ::: "memory");
#endif
    }

    __device__ __forceinline__ UnitPair<S> values(int stage, int i, int kind) const {
        return load_pair<S>(address(stage, i, kind));
    }

private:
    static __device__ __forceinline__ void copy(UnitPair<S>* to, const S* from) {
#if __CUDA_ARCH__ >= 800
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], %2;" ::"l"(__cvta_generic_to_shared(to)),
            "l"(from), "n"(sizeof(UnitPair<S>))
            : "memory");
#else
        store_pair(to, load_pair<S>(from));
#endif
    }

    __device__ __forceinline__ UnitPair<S>* address(int stage, int i, int kind) const {
        return memory_ + stage * (2 * kinds * threads) + (i * kinds + kind) * threads;
    }

    UnitPair<S>* memory_;
};

}  // namespace fastrnn::cuda
