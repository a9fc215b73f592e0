// One instruction set's kernels, for one storage type. Included by kernels_*.cpp, which setup.py
// compiles once an instruction set, with FASTRNN_ISA as the name of the set.
#pragma once
#include "../cells/registry.h"
#include "gradients.h"

#define FASTRNN_KERNEL(name, Cell)                                                       \
    {forward_workspace<Cell, Arithmetic, Storage>,  forward<Cell, Arithmetic, Storage>,  \
     backward_workspace<Cell, Arithmetic, Storage>, backward<Cell, Arithmetic, Storage>, \
     forward_tile<Cell, Arithmetic, Storage>,       backward_tile<Cell, Arithmetic, Storage>},

// Defines `kernels_<suffix>`: a kernel for each cell of the registry, in its order.
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

// The tiles of `arithmetic` values as they are: kernels_float32.cpp compiles them for the types of 16 bits
// too, which declare them `extern`.
#define FASTRNN_TILES(where, arithmetic)                                                       \
    namespace fastrnn {                                                                        \
    namespace FASTRNN_ISA {                                                                    \
    where template Tile<Plain<arithmetic>> tile_for<Plain<arithmetic>, false>(int, bool, int); \
    where template Tile<Plain<arithmetic>> tile_for<Plain<arithmetic>, true>(int, bool, int);  \
    }                                                                                          \
    }
