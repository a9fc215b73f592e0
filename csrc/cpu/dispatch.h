// The choice of an instruction set's kernels for this CPU.
#pragma once
#include <vector>

#include "../api.h"
#include "dual_kernel.h"
#include "layer.h"

namespace fastrnn::cpu {

// The kernel of the cell with index `cell` in the registry, for the instruction set in use.
const Kernel& kernel(int cell, Storage storage);

// The name of the widest instruction set that was compiled, that the CPU has, and that is not wider
// than the one named by the environment variable FASTRNN_ISA, which is read once. Throws
// std::invalid_argument if the variable is not the name of one, or if the CPU has none of them.
FASTRNN_API const char* isa_in_use();
FASTRNN_API std::vector<const char*> isa_compiled();
FASTRNN_API std::vector<const char*> isa_supported();  // those that this CPU has

}  // namespace fastrnn::cpu
