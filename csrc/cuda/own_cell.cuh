// A cell of the user's own on a GPU. fastrnn/codegen writes its header, and compiles it with these
// kernels into a library for one storage type:
//
//     #include "cuda/own_cell.cuh"
//     #include "<the header of the cell>"
//     FASTRNN_OWN_CELL(::fastrnn::Own, float16, __half)
//
// in two halves that take nvcc about as long, side by side: with FASTRNN_PERSISTENT the kernels of
// the persistent path (float64 has none), without it all others. The library exports
// fastrnn_add_cell(name), which adds the cell to those of this process.
#pragma once
#include <type_traits>

#include "../cells/known.h"
#include "own_cell.h"

namespace fastrnn::cuda {

// Those of the persistent path, in the order of Pass.
const PersistentKernel* own_persistent_kernels(bool tf32);

}  // namespace fastrnn::cuda

#ifdef FASTRNN_PERSISTENT
#include "persistent/backward.cuh"
#include "persistent/columns_backward.cuh"
#include "persistent/forward.cuh"

namespace fastrnn::cuda {

template <class Cell, class M>
PersistentKernel persistent_backward_kernel() {
    if constexpr (sizeof(Stored<M>) == 4)
        return columns_backward_kernel<Cell, M>();
    else
        return backward_kernel<Cell, M>();
}

template <class Cell, class M>
const PersistentKernel* persistent_kernels() {
    static const PersistentKernel kernels[] = {forward_kernel<Cell, M>(),
                                               persistent_backward_kernel<Cell, M>()};
    return kernels;
}

// What values stored as S are multiplied as on the tensor cores.
template <class S>
using OnTensorCores = std::conditional_t<sizeof(S) == 4, Tf32, S>;

}  // namespace fastrnn::cuda

#define FASTRNN_OWN_CELL(Cell, suffix, S)                          \
    namespace fastrnn::cuda {                                      \
    const PersistentKernel* own_persistent_kernels(bool tf32) {    \
        return tf32 ? persistent_kernels<Cell, OnTensorCores<S>>() \
                    : persistent_kernels<Cell, S>();               \
    }                                                              \
    }

#else
#include "one_block/kernel_table.h"
#include "stepwise/step.cuh"

namespace fastrnn::cuda {

template <class Cell, class M>
const OneBlockKernel* one_block_kernels() {
    static const OneBlockKernel kernels[] = {one_block_forward_kernel<Cell, M>(),
                                             one_block_backward_kernel<Cell, M>()};
    return kernels;
}

template <class Cell, class S>
const OwnKernels& kernels_of() {
    static const OwnKernels kernels = [] {
        OwnKernels k{.forward_step = forward_step<Cell, S>,
                     .backward_step = backward_step<Cell, S>,
                     .persistent = {},
                     .one_block = {}};
        if constexpr (sizeof(S) < 8)
            for (bool tf32 : {false, true}) k.persistent[tf32] = own_persistent_kernels(tf32);
        if constexpr (sizeof(S) == 4)
            k.one_block[true] = one_block_kernels<Cell, Tf32>();
        else if constexpr (sizeof(S) == 2)
            k.one_block[false] = k.one_block[true] = one_block_kernels<Cell, S>();
        return k;
    }();
    return kernels;
}

}  // namespace fastrnn::cuda

#define FASTRNN_OWN_CELL(Cell, suffix, S)                                          \
    static_assert(::fastrnn::Declared<Cell>::ok);                                  \
    extern "C" FASTRNN_API bool fastrnn_add_cell(const char* name) {               \
        using namespace fastrnn;                                                   \
        static constexpr CellInfo infos[] = {FASTRNN_CELL_INFO(own, Cell)};        \
        const int cell = add_own_cell(name, infos[0]);                             \
        if (cell < 0) return false;                                                \
        cuda::add_own_kernels(cell, Storage::suffix, cuda::kernels_of<Cell, S>()); \
        return true;                                                               \
    }
#endif
