// The choice of an instruction set's kernels for this CPU.
#pragma once
#include <string>
#include <vector>

#include "layer.h"

namespace fastrnn::cpu {

// The kernel of the cell with index `cell` in the registry, for the instruction set in use.
const Kernel& kernel(int cell, Storage storage);

// The name of the last instruction set of setup.py's list that was compiled, that the CPU has,
// and that is not after the one named by the environment variable FASTRNN_ISA, which is read once.
// Throws std::invalid_argument if the variable is not the name of one.
const char* isa_in_use();
std::vector<std::string> isa_compiled();
std::vector<std::string> isa_supported();  // those that this CPU has

}  // namespace fastrnn::cpu
