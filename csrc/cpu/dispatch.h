// The choice of an instruction set's kernels for this CPU.
#pragma once
#include <vector>

#include "../api.h"
#include "../cells/registry.h"
#include "dual_kernel.h"
#include "layer.h"

namespace fastrnn::cpu {

// The kernel of the cell with this index (../cells/known.h), for the instruction set in use.
const Kernel& kernel(int cell, Storage storage);

// Adds kernels of the user's own cell of that name, and the cell if it is not yet known. They stay
// for the rest of the process. False if there are already too many cells.
FASTRNN_API bool add_cell(const char* name, const CellInfo& info, Storage storage,
                          const Kernel& kernel, const DualKernel<float>& dual);
FASTRNN_API bool add_cell(const char* name, const CellInfo& info, Storage storage,
                          const Kernel& kernel, const DualKernel<double>& dual);

// The added kernels of a cell (own_cells.cpp).
bool has_own_kernel(int cell, Storage storage);
const Kernel& own_kernel(int cell, Storage storage);
template <class T>
const DualKernel<T>& own_dual_kernel(int cell);
template <>
const DualKernel<float>& own_dual_kernel(int cell);
template <>
const DualKernel<double>& own_dual_kernel(int cell);

// The name of the widest instruction set that was compiled, that the CPU has, and that is not wider
// than the one named by the environment variable FASTRNN_ISA, which is read once. Throws
// std::invalid_argument if the variable is not the name of one, or if the CPU has none of them.
FASTRNN_API const char* isa_in_use();
FASTRNN_API std::vector<const char*> isa_compiled();
FASTRNN_API std::vector<const char*> isa_supported();  // those that this CPU has

}  // namespace fastrnn::cpu
