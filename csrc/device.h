// The interface between a network (torch/network.h) and a device, which csrc/cpu and csrc/cuda
// implement. Nothing of torch.
#pragma once
#include <stdint.h>

#include <array>
#include <string_view>
#include <vector>

#include "api.h"
#include "layer.h"

namespace fastrnn {

// A name and a value of how a pass over a layer is computed (fastrnn.explain).
struct Fact {
    const char* name;
    std::array<char, 160> value{};  // ends with a 0

    Fact(const char* name, std::string_view text) : name(name) {
        text.copy(value.data(), value.size() - 1);
    }
};
using Facts = std::vector<Fact>;

// Several networks of the same sizes, with weights of their own (torch/models.h).
struct Models {
    int64_t count;
    int64_t multiply_adds;      // of one network's forward pass
    int64_t recurrent_weights;  // values of one W_hh
};

struct Device {
    // A pass over one layer. They run on the caller's thread and, on the CPU, on up to
    // layer.threads.
    void (*forward)(const ForwardLayer& layer);
    void (*backward)(const BackwardLayer& layer);

    // Whether there are kernels of the cell with this index for a storage type.
    bool (*has_kernels)(int cell, Storage storage);

    // How such a pass would be computed. Nothing is computed.
    Facts (*explain)(const Layer& layer, Pass pass);

    // Whether models are best computed side by side, one on each of `threads` threads, instead of
    // one after the other. Null: they never are.
    bool (*runs_models_in_parallel)(const Models& models, int threads);

    // Whether gradients are of the storage type, or of the arithmetic type and rounded by the
    // caller.
    bool stores_gradients;

    // Whether the output of a network of one step may be the same memory as h_n.
    bool output_may_be_h_n;
};

}  // namespace fastrnn
