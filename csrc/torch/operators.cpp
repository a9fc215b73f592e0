// The operators torch.ops.fastrnn.forward and .backward: their registration, and the kernels of all
// devices.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "models.h"
#include "network.h"
#include "schema.h"

namespace fastrnn {
namespace {

using at::Tensor;

TORCH_LIBRARY(fastrnn, m) {
    m.def(torch::schema(ForwardCall::schema().c_str()),
          {at::Tag::nondeterministic_seeded, at::Tag::pt2_compliant_tag});
    m.def(torch::schema(BackwardCall::schema().c_str()), {at::Tag::pt2_compliant_tag});
}

// Only a call of fast_path.cpp may leave out the states, on a GPU.
void check_defined(const Tensor& h0) {
    TORCH_CHECK(h0.defined(), "fastrnn: the hidden tensor is undefined");
}

void forward(const c10::OperatorHandle&, Stack* stack) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const ForwardCall call = ForwardCall::pop(*stack);
    check_defined(call.h0);
    const Arguments arguments = call.arguments();
    const Keep kept = !call.keep ? Keep::nothing : call.recompute ? Keep::outputs : Keep::gates;
    ForwardResult r = are_of_models(call.weights)
                          ? forward_models(arguments, call.train, kept)
                          : fastrnn::forward(arguments, check(arguments), call.train, kept);
    const auto empty = [&](at::ScalarType dtype) {
        return at::empty({0}, call.input.options().dtype(dtype));
    };
    if (!r.c_n.defined()) r.c_n = empty(call.input.scalar_type());
    if (!call.keep) {
        for (Tensor* t : {&r.hidden, &r.saved, &r.c}) *t = empty(call.input.scalar_type());
        r.dropout_mask = empty(at::kByte);
    }
    push(*stack, r);
}

// The operator returns tensors: empty ones for gradients that are not wanted.
BackwardResult without_undefined(BackwardResult result, const Tensor& input) {
    const auto fill = [&](Tensor& g) {
        if (!g.defined()) g = at::empty({0}, input.options());
    };
    auto& [grad_input, grad_h0, grad_c0, grad_weights] = result;
    for (Tensor* g : {&grad_input, &grad_h0, &grad_c0}) fill(*g);
    for (Tensor& g : grad_weights) fill(g);
    return result;
}

void backward(const c10::OperatorHandle&, Stack* stack) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const BackwardCall call = BackwardCall::pop(*stack);
    check_defined(call.h0);
    const Arguments arguments = call.arguments();
    const Kept kept = call.kept();
    const OutputGradients gradients = call.gradients();
    TORCH_CHECK_VALUE(call.wanted.size() == 3 + call.weights.size(), "wanted has ",
                      call.wanted.size(), " elements, expected ", 3 + call.weights.size(),
                      ": one for input, h0, c0 and each weight");
    const auto push_all = [&](BackwardResult result) {
        push(*stack, without_undefined(std::move(result), call.input));
    };
    if (are_of_models(call.weights)) {
        push_all(backward_models(arguments, kept, gradients, call.wanted));
        return;
    }
    const Problem problem = check(arguments);
    check_kept(arguments, problem, kept);
    check_gradients(arguments, problem, gradients);
    push_all(fastrnn::backward(arguments, problem, kept, gradients, call.wanted));
}

// For all devices: the checks come first, and then an error names a device without kernels.
TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
    m.impl("forward", torch::CppFunction::makeFromBoxedFunction<&forward>());
    m.impl("backward", torch::CppFunction::makeFromBoxedFunction<&backward>());
}

}  // namespace
}  // namespace fastrnn
