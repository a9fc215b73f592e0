// A cell of the user's own. fastrnn/codegen writes its header, and compiles it with these kernels
// into a library for one instruction set and one storage type:
//
//     #include "cpu/own_cell.h"
//     #include "<the header of the cell>"
//     FASTRNN_OWN_CELL(::fastrnn::Own, float32, float, float)
//
// The library exports fastrnn_add_cell(name), which adds the cell to those of this process
// (add_cell in dispatch.h).
#pragma once
#include "dispatch.h"
#include "kernels.h"

#ifndef FASTRNN_BFLOAT16_PAIRS  // as in kernels_bfloat16.cpp
FASTRNN_TILES(extern, float)
FASTRNN_TILES(extern, double)
#endif

#define FASTRNN_OWN_CELL(Cell, suffix, arithmetic, storage)                                  \
    namespace fastrnn {                                                                      \
    namespace FASTRNN_ISA {                                                                  \
    namespace {                                                                              \
    static_assert(Declared<Cell>::ok);                                                       \
    using Arithmetic = arithmetic;                                                           \
    using Storage = storage;                                                                 \
    using Type = arithmetic;                                                                 \
    constexpr cpu::Kernel kernels[] = {FASTRNN_KERNEL(own, Cell)};                           \
    constexpr cpu::DualKernel<arithmetic> dual_kernels[] = {FASTRNN_DUAL_KERNEL(own, Cell)}; \
    constexpr CellInfo infos[] = {FASTRNN_CELL_INFO(own, Cell)};                             \
    }                                                                                        \
    }                                                                                        \
    }                                                                                        \
    extern "C" FASTRNN_API bool fastrnn_add_cell(const char* name) {                         \
        using namespace fastrnn;                                                             \
        return cpu::add_cell(name, FASTRNN_ISA::infos[0], ::fastrnn::Storage::suffix,        \
                             FASTRNN_ISA::kernels[0], FASTRNN_ISA::dual_kernels[0]);         \
    }
