// FASTRNN_API marks what the libraries of kernels (csrc/cpu, csrc/cuda) give to the binding
// (csrc/torch). All else in them is hidden.
//
// The types of these functions are laid out alike in both C++ ABIs of GCC: there is no std::string
// among them. torch 2.6 is built with the old ABI, and so is its binding.
#pragma once

#define FASTRNN_API __attribute__((visibility("default")))
