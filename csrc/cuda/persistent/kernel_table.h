// What each kernels_*.cu defines: the kernels of one type for all cells.
#pragma once
#include "../../cells/registry.h"
#include "kernel.h"

// Defines persistent_<suffix>[cell][pass], in the order of the registry. M: the type that is
// multiplied; backward: the function that describes the backward kernel of a cell.
#define FASTRNN_ENTRY(name, Cell) {forward_kernel<Cell, Multiplied>(), backward_of<Cell>()},
#define FASTRNN_DEFINE_PERSISTENT(suffix, M, backward)                                        \
    namespace fastrnn::cuda {                                                                 \
    namespace {                                                                               \
    using Multiplied = M;                                                                     \
    template <class Cell>                                                                     \
    PersistentKernel backward_of() {                                                          \
        return backward<Cell, Multiplied>();                                                  \
    }                                                                                         \
    }                                                                                         \
    extern const PersistentKernel persistent_##suffix[cell_count][2];                         \
    const PersistentKernel persistent_##suffix[][2] = {FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)}; \
    }
