// The kernels of one instruction set and one storage type. Included by kernels_*.cpp, which
// csrc/build.py compiles once for each instruction set, with FASTRNN_ISA as its name.
#pragma once
#include "../cells/registry.h"
#include "backward.h"
#include "dual.h"

#define FASTRNN_KERNEL(name, Cell)                                        \
    {.forward_workspace = forward_workspace<Cell, Arithmetic, Storage>,   \
     .forward = forward<Cell, Arithmetic, Storage>,                       \
     .backward_workspace = backward_workspace<Cell, Arithmetic, Storage>, \
     .backward = backward<Cell, Arithmetic, Storage>,                     \
     .forward_tile = forward_tile<Cell, Arithmetic, Storage>,             \
     .backward_tile = backward_tile<Cell, Arithmetic, Storage>},

// Defines kernels_<suffix>: a Kernel for each cell, in the order of the registry.
#define FASTRNN_DEFINE_KERNELS(suffix, arithmetic, storage)                         \
    namespace fastrnn {                                                             \
    namespace FASTRNN_ISA {                                                         \
    namespace {                                                                     \
    using Arithmetic = arithmetic;                                                  \
    using Storage = storage;                                                        \
    }                                                                               \
    extern const cpu::Kernel kernels_##suffix[];                                    \
    const cpu::Kernel kernels_##suffix[] = {FASTRNN_FOR_EACH_CELL(FASTRNN_KERNEL)}; \
    }                                                                               \
    }

#define FASTRNN_DUAL_KERNEL(name, Cell)          \
    {.forward = dual_forward_of<Cell, Type>(),   \
     .backward = dual_backward_of<Cell, Type>(), \
     .same_gradients = same_gradients<Cell>(),   \
     .packed_size = matrix_size<Type>,           \
     .pack = pack_matrix<Type>,                  \
     .multiply = multiply_matrix<Type>,          \
     .outer_scratch = outer_scratch<Type>,       \
     .add_outer = add_outer<Type>,               \
     .sum_rows = sum_rows<Type>},

// Defines dual_kernels_<suffix>: a DualKernel for each cell.
#define FASTRNN_DEFINE_DUAL_KERNELS(suffix, type)               \
    namespace fastrnn {                                         \
    namespace FASTRNN_ISA {                                     \
    namespace {                                                 \
    using Type = type;                                          \
    }                                                           \
    extern const cpu::DualKernel<type> dual_kernels_##suffix[]; \
    const cpu::DualKernel<type> dual_kernels_##suffix[] = {     \
        FASTRNN_FOR_EACH_CELL(FASTRNN_DUAL_KERNEL)};            \
    }                                                           \
    }

// The tiles of Plain operands. kernels_float32.cpp and kernels_float64.cpp compile them; the files
// of the 16-bit types and the user's own cells, which use the same, declare them `extern`.
#define FASTRNN_TILES(where, arithmetic)                                                        \
    namespace fastrnn {                                                                         \
    namespace FASTRNN_ISA {                                                                     \
    where template FASTRNN_API Tile<Plain<arithmetic>> tile_for<Plain<arithmetic>, false>(int,  \
                                                                                          bool, \
                                                                                          int); \
    where template FASTRNN_API Tile<Plain<arithmetic>> tile_for<Plain<arithmetic>, true>(int,   \
                                                                                         bool,  \
                                                                                         int);  \
    }                                                                                           \
    }
