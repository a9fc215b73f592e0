// The module fastrnn._C: what was built, what the cells are, how a call would be computed, and the
// fast path.
#include <ATen/core/Tensor.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "../cpu/busy.h"
#include "../cpu/dispatch.h"
#include "fast_path.h"
#include "network.h"
#ifdef FASTRNN_HAS_CUDA
#include "../cuda/own_cell.h"
#endif

namespace fastrnn {
namespace {

using at::Tensor;
using c10::SymInt;

pybind11::dict registered_cells() {
    pybind11::dict result;
    for (int i = 0; i < known_cells(); ++i) {
        const CellInfo& cell = info_of(i);
        pybind11::dict info;
        info["gates"] = cell.gates;
        info["states"] = 1 + cell.c_states;
        info["vectors"] = cell.vectors;
        info["diagonal"] = cell.diagonal;
        info["saved"] = cell.saved;
        info["allows_projection"] = cell.allows_projection;
        result[cell.name] = info;
    }
    return result;
}

// The facts of every layer, forward and backward, by their names.
pybind11::list explain_network(const pybind11::tuple& network, const Tensor& input,
                               const Tensor& h0, const OptionalTensor& c0,
                               const std::vector<Tensor>& weights,
                               const OptionalTensor& batch_sizes) {
    const Options options = read_network(network).options;
    const Arguments arguments{options, input, h0, c0, weights, batch_sizes};
    const Problem problem = check(arguments);
    const auto as_dict = [](const Facts& facts) {
        pybind11::dict result;
        for (const Fact& fact : facts) result[fact.name] = fact.value.data();
        return result;
    };
    pybind11::list result;
    for (int64_t layer = 0; layer < problem.layers; ++layer) {
        const auto [forward, backward] = fastrnn::explain(arguments, problem, layer);
        result.append(pybind11::make_tuple(as_dict(forward), as_dict(backward)));
    }
    return result;
}

// What the fake kernels of fastrnn/fake.py check, and the sizes B, N, H, R of a call and the width
// of its output.
std::tuple<SymInt, SymInt, SymInt, SymInt, SymInt> check_fake_forward(
    const pybind11::tuple& network, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
    const std::vector<Tensor>& weights, const OptionalTensor& batch_sizes) {
    const Options options = read_network(network).options;
    const Sizes<SymInt> s = check_fake({options, input, h0, c0, weights, batch_sizes});
    return {s.batch, s.rows, s.hidden, s.recurrent, s.width};
}

void check_fake_backward(const pybind11::tuple& network, const OptionalTensor& grad_output,
                         const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                         const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                         const std::vector<Tensor>& weights, const OptionalTensor& batch_sizes) {
    const Options options = read_network(network).options;
    const Arguments arguments{options, input, h0, c0, weights, batch_sizes};
    check_fake_gradients(arguments, check_fake(arguments), {grad_output, grad_h_n, grad_c_n});
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

// The file that a function was loaded from.
template <class Function>
std::string library_of(Function* function) {
    Dl_info found{};
    TORCH_CHECK(dladdr(reinterpret_cast<const void*>(function), &found));
    return found.dli_fname;
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
          "The cells of this process: name -> gates, states, values kept for backward.");
    m.def("build_info", &build_info, "What was built, and what is in use.");
    m.def(
        "kernels_library", [] { return library_of(&cpu::isa_in_use); },
        "The file of the CPU's kernels, which were loaded.");
#ifdef FASTRNN_HAS_CUDA
    m.def(
        "cuda_kernels_library", [] { return library_of(&cuda::own_kernels); },
        "The file of the CUDA kernels.");
#endif
    m.def("without_lost_threads", &without_lost_threads,
          "In a forked child that lost its parent's OpenMP threads: torch.set_num_threads(1).");
    m.def("adapt_threads", &cpu::adapt_threads,
          "Whether calls may use fewer CPU threads than torch.get_num_threads(). For tests.");
    m.def("explain", torch::wrap_pybind_function(explain_network),
          "How each layer of a network would be computed, forward and backward.");
    m.def("check_fake_forward", torch::wrap_pybind_function(check_fake_forward),
          "Checks the arguments of the operator forward, of tensors without values: B, N, H, R.");
    m.def("check_fake_backward", torch::wrap_pybind_function(check_fake_backward),
          "Checks the arguments of the operator backward, of tensors without values.");
    bind_fast_path(m);
}

}  // namespace fastrnn
