// The arguments of a call, and the problem that they describe once they have been checked: the code
// that gets a Problem checks nothing again.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "../cells/known.h"
#include "../layer.h"
#include "options.h"

namespace fastrnn {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments that forward and backward share, as the user gave them.
struct Arguments {
    const Options& options;
    const at::Tensor& input;            // [T, B, I], or packed [N, I]
    const at::Tensor& h0;               // [L * D, B, H or P]; undefined for zeros (fast_path.cpp),
                                        // where input is padded and on a GPU
    const OptionalTensor& c0;           // [L * D, B, C] for a cell that has c, if there is h0
    at::TensorList weights;             // per layer and direction: w_ih, w_hh, (b_ih, b_hh), its
                                        // vectors [H], (w_hr)
    const OptionalTensor& batch_sizes;  // [T] int64 on the CPU, for packed input; or for padded
                                        // input, where its device is, [T, B] uint8 of Event

    bool has_events() const {
        return batch_sizes && batch_sizes->defined() && batch_sizes->dim() > 1;
    }
    bool packed() const { return batch_sizes && !has_events(); }
};

// The sizes of a call. Int: int64_t, or c10::SymInt where some may be known only at run time.
template <class Int>
struct Sizes {
    Int steps, batch, rows;        // T, B, N
    Int input, hidden, recurrent;  // I, H, and H or P
    int64_t layers, directions;    // L, D
    Int width;  // of a row of the output: D * R, and D * C more with return_states
    bool projected, has_biases;
    int weights_per_layer;  // tensors per layer and direction

    Int layer_input(int64_t layer) const { return layer == 0 ? input : directions * recurrent; }
};

struct Problem : Sizes<int64_t> {
    int cell_index;
    CellInfo cell;
    at::ScalarType dtype;
    at::ScalarType arithmetic;  // float, or double for double
    Storage storage;            // dtype, as the kernels call it
    at::Device device = at::kCPU;
};

// Throws c10::Error, or the error that torch's layer raises where that has one, naming what is
// wrong and what was expected.
Problem check(const Arguments& arguments);

// The same checks for tensors without values, and for sizes that may be known only at run time.
Sizes<c10::SymInt> check_fake(const Arguments& arguments);

// What forward returns besides the results, and backward takes.
struct Kept {
    const at::Tensor& hidden;  // [L, N, D * (H or P)]: outputs of the layers
    const at::Tensor& saved;   // [L, D, N, saved * H], or empty, and c too: compute both again
    const at::Tensor& c;       // [L, D, N, C]
    // [L - 1, N, D * (H or P)] uint8: which outputs dropout kept; or empty
    const at::Tensor& dropout_mask;
};

struct OutputGradients {
    const OptionalTensor& output;  // of the width of the output
    const OptionalTensor& h_n;
    const OptionalTensor& c_n;
};

inline bool recomputes(const Kept& kept) { return kept.saved.dim() == 1; }

void check_kept(const Arguments& arguments, const Problem& problem, const Kept& kept);
void check_gradients(const Arguments& arguments, const Problem& problem,
                     const OutputGradients& gradients);
void check_fake_gradients(const Arguments& arguments, const Sizes<c10::SymInt>& sizes,
                          const OutputGradients& gradients);

}  // namespace fastrnn
