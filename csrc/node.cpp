#include "node.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

namespace fastrnn {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using BackwardOperator = BackwardResult(const std::string&, const OptionalTensor&,
                                        const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                        const Tensor&, const OptionalTensor&, at::TensorList,
                                        const OptionalTensor&, bool, int64_t, bool, double,
                                        const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        c10::List<bool>);

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct NetworkBackward : public torch::autograd::Node {
    std::string cell;
    bool has_biases, bidirectional, train;
    int64_t num_layers;
    double dropout;
    std::vector<SavedVariable> inputs;  // input, h0, c0 (undefined if there is none), weights
    std::vector<SavedVariable> kept;    // hidden, saved, c, noise

    std::string name() const override { return "FastrnnBackward"; }

    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto* list : {&inputs, &kept})
            for (SavedVariable& variable : *list) variable.reset_data();
    }

    variable_list apply(variable_list&& grads) override {
        variable_list in, held;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (const SavedVariable& variable : inputs) in.push_back(variable.unpack());
            for (const SavedVariable& variable : kept) held.push_back(variable.unpack());
        }
        std::vector<bool> wanted;
        for (size_t i = 0; i < in.size(); ++i) wanted.push_back(task_should_compute_output(i));
        bool none = true;
        for (const Tensor& g : grads) none &= !g.defined();
        if (none) return variable_list(in.size());
        return at::GradMode::is_enabled() ? with_graph(grads, in, held, wanted)
                                          : without_graph(grads, in, held, wanted);
    }

private:
    variable_list without_graph(const variable_list& grads, const variable_list& in,
                                const variable_list& held, const std::vector<bool>& wanted) const {
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("fastrnn::backward", "")
                                   .typed<BackwardOperator>();
        c10::List<bool> list;
        for (const bool yes : wanted) list.push_back(yes);
        auto [grad_input, grad_h0, grad_c0, grad_weights] =
            op.call(cell, optional(grads[0]), optional(grads[1]), optional(grads[2]), in[0], in[1],
                    optional(in[2]), at::TensorList(in).slice(3), std::nullopt, has_biases,
                    num_layers, bidirectional, dropout, held[0], held[1], held[2], held[3], list);
        variable_list result = {grad_input, grad_h0, grad_c0};
        result.insert(result.end(), grad_weights.begin(), grad_weights.end());
        for (size_t i = 0; i < result.size(); ++i)
            if (!wanted[i]) result[i] = Tensor();
        return result;
    }

    // A gradient that is itself to be differentiated: by the formulas of reference.py.
    variable_list with_graph(const variable_list& grads, const variable_list& in,
                             const variable_list& held, const std::vector<bool>& wanted) const {
        py::gil_scoped_acquire gil;
        const auto list = [](const variable_list& tensors) {
            py::tuple result(tensors.size());
            for (size_t i = 0; i < tensors.size(); ++i)
                result[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensors[i]));
            return result;
        };
        const py::object module = py::module_::import("fastrnn.autograd");
        const py::object network =
            module.attr("Network")(cell, has_biases, num_layers, dropout, train, bidirectional);
        const py::tuple found = module.attr("gradients")(network, wanted, py::none(), list(held),
                                                         list(grads), list(in));
        variable_list result;
        for (const py::handle g : found)
            result.push_back(g.is_none() ? Tensor() : THPVariable_Unpack(g.ptr()));
        return result;
    }
};

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
std::shared_ptr<NetworkBackward> new_node() {
    return {new NetworkBackward, torch::autograd::deleteNode};
}
#else
c10::intrusive_ptr<NetworkBackward> new_node() { return c10::make_intrusive<NetworkBackward>(); }
#endif

}  // namespace

void attach_backward(const Arguments& a, bool train, ForwardResult& r) {
    const auto node = new_node();
    node->cell = a.cell;
    node->has_biases = a.has_biases;
    node->bidirectional = a.bidirectional;
    node->train = train;
    node->num_layers = a.num_layers;
    node->dropout = a.dropout;
    torch::autograd::edge_list edges;
    const auto add = [&](const Tensor& t) {
        edges.push_back(t.defined() && t.requires_grad() ? torch::autograd::impl::gradient_edge(t)
                                                         : torch::autograd::Edge());
        node->inputs.emplace_back(t, /*is_output=*/false);
    };
    add(a.input);
    add(a.h0);
    add(a.c0 ? *a.c0 : Tensor());
    for (const Tensor& weight : a.weights) add(weight);
    node->set_next_edges(std::move(edges));
    for (const Tensor& t : {r.hidden, r.saved, r.c, r.noise})
        node->kept.emplace_back(t, /*is_output=*/false);
    for (Tensor* t : {&r.output, &r.h_n, &r.c_n}) torch::autograd::set_history(*t, node);
}

}  // namespace fastrnn
