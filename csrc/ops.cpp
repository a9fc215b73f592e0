// The operators torch.ops.fastrnn.forward and .backward (their schemas, and the way to a device's
// kernels), and the module fastrnn._C, which says what was built.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/run.h"
#include "direct.h"
#include "models.h"
#include "network.h"
#include "operators.h"

namespace fastrnn {
namespace {

using at::Tensor;

TORCH_LIBRARY(fastrnn, m) {
    m.def(
        "forward(str cell, Tensor input, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? "
        "batch_sizes, bool has_biases, "
        "int num_layers, bool bidirectional, float dropout, bool train, bool keep, "
        "bool recompute=False) -> "
        "(Tensor output, Tensor h_n, Tensor c_n, Tensor hidden, Tensor saved, Tensor c, Tensor "
        "noise)",
        {at::Tag::nondeterministic_seeded, at::Tag::pt2_compliant_tag});
    m.def(
        "backward(str cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
        "Tensor h0, Tensor? c0, "
        "Tensor[] weights, Tensor? batch_sizes, bool has_biases, int num_layers, bool "
        "bidirectional, float dropout, "
        "Tensor hidden, Tensor saved, Tensor c, Tensor noise, bool[] wanted) -> "
        "(Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights)",
        {at::Tag::pt2_compliant_tag});
}

// A call of direct.cpp alone may leave it out, on a GPU: None is an undefined tensor here.
void check_given(const Tensor& h0) {
    TORCH_CHECK(h0.defined(), "fastrnn: the hidden tensor is undefined");
}

ForwardTensors forward(const std::string& cell, const Tensor& input, const Tensor& h0,
                       const OptionalTensor& c0, at::TensorList weights,
                       const OptionalTensor& batch_sizes, bool has_biases, int64_t num_layers,
                       bool bidirectional, double dropout, bool train, bool keep, bool recompute) {
    at::AutoDispatchBelowADInplaceOrView guard;
    check_given(h0);
    const Arguments arguments{
        cell, input, h0, c0, weights, batch_sizes, has_biases, num_layers, bidirectional, dropout};
    const Keep kept = !keep ? Keep::nothing : recompute ? Keep::outputs : Keep::gates;
    ForwardResult r = are_of_models(weights)
                          ? forward_models(arguments, train, kept)
                          : fastrnn::forward(arguments, check(arguments), train, kept);
    const auto empty = [&](at::ScalarType dtype) {
        return at::empty({0}, input.options().dtype(dtype));
    };
    if (!r.c_n.defined()) r.c_n = empty(input.scalar_type());
    if (!keep) {
        for (Tensor* t : {&r.hidden, &r.saved, &r.c}) *t = empty(input.scalar_type());
        r.noise = empty(at::kByte);
    }
    return {r.output, r.h_n, r.c_n, r.hidden, r.saved, r.c, r.noise};
}

BackwardResult backward(const std::string& cell, const OptionalTensor& grad_output,
                        const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                        const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                        at::TensorList weights, const OptionalTensor& batch_sizes, bool has_biases,
                        int64_t num_layers, bool bidirectional, double dropout,
                        const Tensor& hidden, const Tensor& saved, const Tensor& c,
                        const Tensor& noise, c10::List<bool> wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    check_given(h0);
    const Arguments arguments{
        cell, input, h0, c0, weights, batch_sizes, has_biases, num_layers, bidirectional, dropout};
    const Kept kept{hidden, saved, c, noise};
    const OutputGradients gradients{grad_output, grad_h_n, grad_c_n};
    TORCH_CHECK_VALUE(wanted.size() == 3 + weights.size(), "wanted has ", wanted.size(),
                      " elements, expected ", 3 + weights.size(),
                      ": one for input, h0, c0 and each weight");
    const std::vector<bool> flags(wanted.begin(), wanted.end());
    if (are_of_models(weights)) return backward_models(arguments, kept, gradients, flags);
    const Problem problem = check(arguments);
    check_kept(arguments, problem, kept);
    check_gradients(arguments, problem, gradients);
    return fastrnn::backward(arguments, problem, kept, gradients, flags);
}

// For every device: the checks come first, and one without kernels is named by them.
TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
    m.impl("forward", forward);
    m.impl("backward", backward);
}

pybind11::dict registered_cells() {
    pybind11::dict result;
    for (const CellInfo& cell : cells) {
        pybind11::dict info;
        info["gates"] = cell.gates;
        info["states"] = 1 + cell.has_c;
        info["saved"] = cell.saved;
        info["allows_projection"] = cell.allows_projection;
        result[cell.name] = info;
    }
    return result;
}

// The facts of every layer, forward and backward, by their names.
pybind11::list explain_network(const std::string& cell, const Tensor& input, const Tensor& h0,
                               const OptionalTensor& c0, const std::vector<Tensor>& weights,
                               const OptionalTensor& batch_sizes, bool has_biases,
                               int64_t num_layers, bool bidirectional) {
    const Arguments arguments{cell,       input,         h0, c0, weights, batch_sizes, has_biases,
                              num_layers, bidirectional, 0};
    const Problem problem = check(arguments);
    const auto as_dict = [](const Facts& facts) {
        pybind11::dict result;
        for (const auto& [name, value] : facts) result[name.c_str()] = value;
        return result;
    };
    pybind11::list result;
    for (int64_t layer = 0; layer < problem.layers; ++layer) {
        const auto [forward, backward] = fastrnn::explain(arguments, problem, layer);
        result.append(pybind11::make_tuple(as_dict(forward), as_dict(backward)));
    }
    return result;
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["torch"] = FASTRNN_TORCH_VERSION;
    info["isa"] = cpu::isa_in_use();
    info["isa_compiled"] = cpu::isa_compiled();
    info["isa_supported"] = cpu::isa_supported();
#ifdef _OPENMP
    info["openmp"] = _OPENMP;
#else
    info["openmp"] = pybind11::none();
#endif
    info["compiler"] = FASTRNN_COMPILER;
    info["cuda_archs"] = FASTRNN_CUDA_ARCHS;
    info["cuda"] = FASTRNN_CUDA_NOTE;
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled part of fastrnn. The operators are in torch.ops.fastrnn.";
#ifdef FASTRNN_HAS_CUDA
    m.attr("has_cuda") = true;
#else
    m.attr("has_cuda") = false;
#endif
    m.def("cells", &registered_cells,
          "The registered cells: name -> gates, states, values kept for backward.");
    m.def("build_info", &build_info, "What was built, and what is in use.");
    m.def("without_lost_threads", &cpu::without_lost_threads,
          "In a forked child that lost its parent's OpenMP threads: torch.set_num_threads(1).");
    m.def("explain", &explain_network,
          "How each layer of a network would be computed, forward and backward.");
    bind_direct(m);
}

}  // namespace fastrnn
