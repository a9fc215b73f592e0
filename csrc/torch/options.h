// What a network is, besides its tensors. This list is the only one: the operators' schemas and
// arguments, the state of autograd's nodes, vmap's rules and compiled autograd follow from it.
// CONTRIBUTING.md says what else a new option touches.
#pragma once
#include <stdint.h>

#include <string>

// type, name
#define FASTRNN_FOR_EACH_OPTION(X) \
    X(bool, has_biases)            \
    X(int64_t, num_layers)         \
    X(bool, bidirectional)         \
    X(double, dropout)             \
    X(bool, return_states)

namespace fastrnn {

struct Options {
    std::string cell;
#define FASTRNN_MEMBER(type, name) type name{};
    FASTRNN_FOR_EACH_OPTION(FASTRNN_MEMBER)
#undef FASTRNN_MEMBER

    int64_t directions() const { return bidirectional ? 2 : 1; }
};

// Calls visit(name, value) for each option but the cell, in the order of the schemas.
template <class AnyOptions, class Visitor>
void for_each_option(AnyOptions& options, Visitor&& visit) {
#define FASTRNN_VISIT(type, name) visit(#name, options.name);
    FASTRNN_FOR_EACH_OPTION(FASTRNN_VISIT)
#undef FASTRNN_VISIT
}

}  // namespace fastrnn
