// What each kernels_*.cu defines: the kernels of one type for all cells.
#pragma once
#include "../../cells/registry.h"
#include "backward.cuh"
#include "forward.cuh"
#include "kernel.h"

namespace fastrnn::cuda {

template <class Cell, class M>
constexpr int most_units = one_block_chunks(Cell::gates, sizeof(Stored<M>)) * chunk_size;

template <class Cell, class M>
OneBlockKernel one_block_forward_kernel() {
    return {.function = reinterpret_cast<const void*>(&one_block_forward<Cell, M>),
            .most_units = most_units<Cell, M>,
            .inputs = 1,
            .biases = 2 * Cell::gates,
            .kinds = Cell::gates};
}
template <class Cell, class M>
OneBlockKernel one_block_backward_kernel() {
    return {.function = reinterpret_cast<const void*>(&one_block_backward<Cell, M>),
            .most_units = most_units<Cell, M>,
            .inputs = Cell::gates,
            .biases = 0,
            .kinds = BackwardInputs<Cell, Stored<M>>::kinds};
}

}  // namespace fastrnn::cuda

// Defines one_block_<suffix>[cell][pass], in the order of the registry. M: the type that is
// multiplied.
#define FASTRNN_ENTRY(name, Cell) \
    {one_block_forward_kernel<Cell, Multiplied>(), one_block_backward_kernel<Cell, Multiplied>()},
#define FASTRNN_DEFINE_ONE_BLOCK(suffix, M)                                                \
    namespace fastrnn::cuda {                                                              \
    namespace {                                                                            \
    using Multiplied = M;                                                                  \
    }                                                                                      \
    extern const OneBlockKernel one_block_##suffix[cell_count][2];                         \
    const OneBlockKernel one_block_##suffix[][2] = {FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)}; \
    }
