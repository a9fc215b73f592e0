// Which compiled set of kernels runs on this machine.
#pragma once
#include <string>
#include <vector>

#include "layer.h"

namespace fastrnn::cpu {

// The kernel of the cell at `cell` in the registry, for the instruction set in use.
const Kernel& kernel(int cell, Storage storage);

// "generic", "avx2" or "avx512": the widest that was compiled, that the CPU has, and that the
// environment variable FASTRNN_ISA (read once) allows. Throws std::invalid_argument if the variable
// holds anything else.
const char* isa_in_use();
std::vector<std::string> isa_compiled();
std::vector<std::string> isa_supported();  // compiled, and this CPU has it

}  // namespace fastrnn::cpu
