// The schemas of the operators torch.ops.fastrnn.forward and .backward: the names and the order of
// their arguments, and the conversion between a struct of them and the stack of torch's dispatcher.
// All kernels of the operators are boxed (they take that stack), so the order is defined only here.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <string>
#include <vector>

#include "network.h"

namespace fastrnn {

using Stack = torch::jit::Stack;

struct ForwardCall {
    at::Tensor input, h0;
    OptionalTensor c0;
    std::vector<at::Tensor> weights;
    OptionalTensor batch_sizes;
    Options options;
    bool train;      // whether dropout is applied
    bool keep;       // whether backward will follow
    bool recompute;  // and compute the gates again: keep the outputs alone

    // Calls visit(name, value) for each argument in the schema's order.
    template <class Call, class Visitor>
    static void for_each_argument(Call& call, Visitor&& visit) {
        visit("cell", call.options.cell);
        visit("input", call.input);
        visit("h0", call.h0);
        visit("c0", call.c0);
        visit("weights", call.weights);
        visit("batch_sizes", call.batch_sizes);
        for_each_option(call.options, visit);
        visit("train", call.train);
        visit("keep", call.keep);
        visit("recompute", call.recompute);
    }
    static std::string schema();
    // Takes the arguments off the stack.
    static ForwardCall pop(Stack& stack);

    Arguments arguments() const { return {options, input, h0, c0, weights, batch_sizes}; }
    // Calls the operator; or its kernel for the first of these dispatch keys.
    ForwardResult operator()() const;
    ForwardResult redispatch(c10::DispatchKeySet keys) const;
};

struct BackwardCall {
    OptionalTensor grad_output, grad_h_n, grad_c_n;
    at::Tensor input, h0;
    OptionalTensor c0;
    std::vector<at::Tensor> weights;
    OptionalTensor batch_sizes;
    Options options;
    at::Tensor hidden, saved, c, dropout_mask;  // what forward kept
    std::vector<bool> wanted;                   // gradients: of input, h0, c0 and each weight

    template <class Call, class Visitor>
    static void for_each_argument(Call& call, Visitor&& visit) {
        visit("cell", call.options.cell);
        visit("grad_output", call.grad_output);
        visit("grad_h_n", call.grad_h_n);
        visit("grad_c_n", call.grad_c_n);
        visit("input", call.input);
        visit("h0", call.h0);
        visit("c0", call.c0);
        visit("weights", call.weights);
        visit("batch_sizes", call.batch_sizes);
        for_each_option(call.options, visit);
        visit("hidden", call.hidden);
        visit("saved", call.saved);
        visit("c", call.c);
        visit("dropout_mask", call.dropout_mask);
        visit("wanted", call.wanted);
    }
    static std::string schema();
    static BackwardCall pop(Stack& stack);

    Arguments arguments() const { return {options, input, h0, c0, weights, batch_sizes}; }
    Kept kept() const { return {hidden, saved, c, dropout_mask}; }
    OutputGradients gradients() const { return {grad_output, grad_h_n, grad_c_n}; }
    BackwardResult operator()() const;
    BackwardResult redispatch(c10::DispatchKeySet keys) const;
};

// Push the results on the stack.
void push(Stack& stack, const ForwardResult& result);
void push(Stack& stack, const BackwardResult& result);

// In lists of tensors, an undefined tensor stands for None.
inline OptionalTensor optional(const at::Tensor& t) {
    return t.defined() ? OptionalTensor(t) : std::nullopt;
}
inline at::Tensor tensor(const OptionalTensor& t) { return t ? *t : at::Tensor(); }

}  // namespace fastrnn
