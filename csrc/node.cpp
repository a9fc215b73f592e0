#include "node.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "direct.h"
#include "operators.h"

namespace fastrnn {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// input, h0, c0 (undefined if there is none), weights
variable_list tensors_of(const Arguments& a) {
    variable_list list = {a.input, a.h0, tensor(a.c0)};
    list.insert(list.end(), a.weights.begin(), a.weights.end());
    return list;
}

bool any_requires_grad(const variable_list& list) {
    if (!at::GradMode::is_enabled()) return false;
    for (const Tensor& t : list)
        if (t.defined() && t.requires_grad()) return true;
    return false;
}

bool any_tangent(const variable_list& list) {
    for (const Tensor& t : list)
        if (t.defined() && t._fw_grad(/*level=*/0).defined()) return true;
    return false;
}

// What a network is, beside its tensors.
struct Options {
    std::string cell;
    bool has_biases, bidirectional;
    int64_t num_layers;
    double dropout;

    Options() = default;
    explicit Options(const Arguments& a)
        : cell(a.cell),
          has_biases(a.has_biases),
          bidirectional(a.bidirectional),
          num_layers(a.num_layers),
          dropout(a.dropout) {}
};

// Calls a function of fastrnn/autograd.py: derivatives by the formulas of reference.py.
template <class... Args>
variable_list by_formulas(const char* name, const Options& o, const Tensor& batch_sizes,
                          const Tensor& noise, const Args&... args) {
    py::gil_scoped_acquire gil;
    const auto wrap = [](const Tensor& t) {
        return py::reinterpret_steal<py::object>(THPVariable_Wrap(t));
    };
    const auto object = [&](const auto& list) {
        py::tuple result(list.size());
        for (size_t i = 0; i < list.size(); ++i)
            if constexpr (std::is_same_v<std::decay_t<decltype(list)>, variable_list>)
                result[i] = wrap(list[i]);
            else
                result[i] = py::bool_(list[i]);
        return result;
    };
    py::dict options;
    options["cell"] = o.cell;
    options["has_biases"] = o.has_biases;
    options["num_layers"] = o.num_layers;
    options["bidirectional"] = o.bidirectional;
    options["dropout"] = o.dropout;
    const py::tuple found =
        py::module_::import("fastrnn.autograd")
            .attr(name)(options, wrap(batch_sizes), wrap(noise), object(args)...);
    variable_list result;
    for (const py::handle t : found)
        result.push_back(t.is_none() ? Tensor() : THPVariable_Unpack(t.ptr()));
    return result;
}

// What a node computes gradients from, beside the incoming ones.
struct State {
    Options options;
    std::vector<bool> wanted;  // of `backward`, else empty
    variable_list in, held;    // what gradients are of; what was kept beside
    Tensor sizes;
};

// What a node computes: the gradients of `in`, of which only the `needed` are looked at.
struct Formula {
    const char* name;
    variable_list (*gradients)(const variable_list& grads, const State& state,
                               const std::vector<bool>& needed);
    bool traceable;  // by AOTAutograd, as a call of an operator

    variable_list operator()(const variable_list& grads, const State& state,
                             const std::vector<bool>& needed) const {
        bool none = true;
        for (const Tensor& g : grads) none &= !g.defined();
        if (none) return variable_list(state.in.size());
        variable_list result = gradients(grads, state, needed);
        for (size_t i = 0; i < result.size(); ++i)
            if (!needed[i]) result[i] = Tensor();
        return result;
    }
};

// The gradients of a plain call that had no initial states (direct.cpp), where nobody is to see one of
// the operator: that takes tensors.
std::optional<BackwardResult> without_states(const Arguments& a, const Kept& kept,
                                             const OutputGradients& grads,
                                             const std::vector<bool>& wanted) {
    bool plain = !at::GradMode::is_enabled() && unobserved() && !autocast_enabled();
    for (const Tensor* t : {&a.input, &kept.hidden, &kept.saved, &kept.c, &kept.noise})
        plain = plain && is_plain(*t);
    for (const OptionalTensor* t : {&grads.output, &grads.h_n, &grads.c_n})
        plain = plain && (!*t || is_plain(**t));
    for (const Tensor& weight : a.weights) plain = plain && is_plain(weight);
    if (!plain) return std::nullopt;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    RECORD_FUNCTION("fastrnn::backward", std::vector<c10::IValue>());
    const Problem p = check(a);
    check_kept(a, p, kept);
    check_gradients(a, p, grads);
    return fastrnn::backward(a, p, kept, grads, wanted);
}

// Of `forward`: `in` are input, h0, c0 and the weights; hidden, saved, c and noise are held.
constexpr Formula of_forward{
    "FastrnnBackward",
    [](const variable_list& grads, const State& s, const std::vector<bool>& needed) {
        const Options& o = s.options;
        Tensor h0 = s.in[1];
        OptionalTensor c0 = optional(s.in[2]);
        const OptionalTensor sizes = optional(s.sizes), output = optional(grads[0]),
                             h_n = optional(grads[1]), c_n = optional(grads[2]);
        const at::TensorList weights = at::TensorList(s.in).slice(3);
        std::optional<BackwardResult> found;
        if (!h0.defined()) {
            found = without_states({o.cell, s.in[0], h0, c0, weights, sizes, o.has_biases,
                                    o.num_layers, o.bidirectional, o.dropout},
                                   {s.held[0], s.held[1], s.held[2], s.held[3]}, {output, h_n, c_n},
                                   needed);
            if (!found) {
                const auto zeros = [&](int64_t width) {
                    return at::zeros(
                        {o.num_layers * (o.bidirectional ? 2 : 1), s.in[0].size(1), width},
                        s.in[0].options());
                };
                const CellInfo& cell = *find_info(o.cell);
                h0 = zeros(weights[1].size(1));
                if (cell.has_c) c0 = zeros(weights[1].size(0) / cell.gates);
            }
        }
        if (!found) {
            c10::List<bool> wanted;
            for (const bool yes : needed) wanted.push_back(yes);
            found =
                backward_operator().call(o.cell, output, h_n, c_n, s.in[0], h0, c0, weights, sizes,
                                         o.has_biases, o.num_layers, o.bidirectional, o.dropout,
                                         s.held[0], s.held[1], s.held[2], s.held[3], wanted);
        }
        auto& [grad_input, grad_h0, grad_c0, grad_weights] = *found;
        variable_list result = {grad_input, grad_h0, grad_c0};
        result.insert(result.end(), grad_weights.begin(), grad_weights.end());
        return result;
    },
    /*traceable=*/true};

// Of `backward`: `in` are grad_output, grad_h_n, grad_c_n and then as above; noise is held.
constexpr Formula of_backward{
    "FastrnnBackwardBackward",
    [](const variable_list& grads, const State& s, const std::vector<bool>& needed) {
        return by_formulas("second_gradients", s.options, s.sizes, s.held[0], s.wanted, needed,
                           s.in, grads);
    },
    /*traceable=*/false};

using MaybeTensors = std::vector<std::optional<Tensor>>;

MaybeTensors maybe(const variable_list& list) {
    MaybeTensors result;
    for (const Tensor& t : list) result.push_back(optional(t));
    return result;
}

variable_list certain(const MaybeTensors& list) {
    variable_list result;
    for (const auto& t : list) result.push_back(tensor(t));
    return result;
}

// Which of tensors_of(a) a first derivative reads the values of. One that it does not read may be
// overwritten between forward and backward: frozen weights need no input, no gradient needs a bias.
std::vector<bool> read_by_backward(const Arguments& a, bool recompute) {
    const CellInfo& cell = *find_info(a.cell);
    const auto trained = [&](size_t i) { return a.weights[i].requires_grad(); };
    const int64_t directions = a.bidirectional ? 2 : 1;
    const size_t each = a.weights.size() / (a.num_layers * directions);
    bool trains_ih = false, trains_hh = false;  // of the first layer; of any
    for (size_t i = 0; i < a.weights.size(); i += each) {
        trains_ih = trains_ih || (i < each * directions && trained(i));
        trains_hh = trains_hh || trained(i + 1);
    }
    std::vector<bool> read = {recompute || trains_ih, recompute || trains_hh || cell.needs_h_prev,
                              true};
    for (size_t i = 0; i < a.weights.size(); ++i) {
        const size_t kind = i % each;
        const bool first_ih = kind == 0 && i < each * directions,
                   bias = a.has_biases && (kind == 2 || kind == 3);
        read.push_back(recompute || !(bias || (first_ih && !a.input.requires_grad())));
    }
    return read;
}

// A node with tensors that it keeps, and an edge for each that it is to give a gradient of.
struct NetworkNode : public torch::autograd::Node {
    NetworkNode(const Arguments& a, const Formula& formula, std::vector<bool> wanted = {})
        : formula_(formula),
          options_(a),
          wanted_(std::move(wanted)),
          sizes_(tensor(a.batch_sizes), false) {}

    std::string name() const override { return formula_.name; }

    // What is not `read` by a first derivative is kept without a check of its version as well. Under
    // hooks for saved tensors it is not: these decide where a tensor lies.
    void connect(const variable_list& variables, const std::vector<bool>& read = {}) {
        const bool hooked = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
        torch::autograd::edge_list edges;
        for (size_t i = 0; i < variables.size(); ++i) {
            const Tensor& t = variables[i];
            unread_.push_back(read.empty() || read[i] || hooked ? Tensor() : t);
            edges.push_back(t.defined() && t.requires_grad()
                                ? torch::autograd::impl::gradient_edge(t)
                                : torch::autograd::Edge());
            in_.emplace_back(t, /*is_output=*/false);
        }
        set_next_edges(std::move(edges));
    }

    void keep(std::initializer_list<Tensor> tensors) {
        for (const Tensor& t : tensors) held_.emplace_back(t, /*is_output=*/false);
    }

    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto* list : {&in_, &held_})
            for (SavedVariable& variable : *list) variable.reset_data();
        for (Tensor& t : unread_) t.reset();
        sizes_.reset_data();
    }

    variable_list apply(variable_list&& grads) override {
        return formula_(grads, state(/*differentiable=*/at::GradMode::is_enabled()), needed());
    }

    // The next two are compiled autograd's: what a graph depends on, and this node's part of it.
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
        args.collect(name());
        args.collect(options_.cell);
        args.collect(options_.has_biases);
        args.collect(options_.bidirectional);
        args.collect(options_.num_layers);
        args.collect(options_.dropout);
        args.collect(wanted_);
        args.collect(in_, false);
        args.collect(held_, false);
        args.collect(sizes_, false);
    }

    variable_list apply_with_saved(const variable_list& grads,
                                   torch::dynamo::autograd::SwapSavedVariables& saved) override {
        using namespace torch::dynamo::autograd;
        saved.before(in_);
        saved.before(held_);
        saved.before(sizes_);
        const State now = state(/*differentiable=*/true);
        const auto call = [&](const auto&... values) {
            PackedArgs packed;
            (packed.pack(values), ...);
            const auto& python = getPyCompilerInterface();
            const std::string function = python->bind_function(
                saved.get_py_compiler(), name(),
                [formula = formula_](const variable_list& grads,
                                     const std::vector<c10::IValue>& args) {
                    return unpacked(formula, grads, args);
                },
                {IValuePacker<std::decay_t<decltype(values)>>::packed_type()...},
                /*is_custom_function=*/true, formula_.traceable);
            return python->call_function(
                saved.get_py_compiler(), "apply_functional", function, grads, packed.vec(),
                IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
                    get_input_metadata(next_edges())));
        };
        const Options& o = now.options;
        variable_list result =
            call(o.cell, o.has_biases, o.bidirectional, o.num_layers, o.dropout, now.wanted,
                 maybe(now.in), maybe(now.held), optional(now.sizes), needed());
        saved.after(in_);
        saved.after(held_);
        saved.after(sizes_);
        return result;
    }

private:
    // A call of the formula in the compiled graph, of what apply_with_saved packed.
    static variable_list unpacked(const Formula& formula, const variable_list& grads,
                                  const std::vector<c10::IValue>& args) {
        torch::dynamo::autograd::PackedArgs packed(args);
        State s;
        s.options.cell = packed.unpack<std::string>();
        s.options.has_biases = packed.unpack<bool>();
        s.options.bidirectional = packed.unpack<bool>();
        s.options.num_layers = packed.unpack<int64_t>();
        s.options.dropout = packed.unpack<double>();
        s.wanted = packed.unpack<std::vector<bool>>();
        s.in = certain(packed.unpack<MaybeTensors>());
        s.held = certain(packed.unpack<MaybeTensors>());
        s.sizes = tensor(packed.unpack<OptionalTensor>());
        return formula(grads, s, packed.unpack<std::vector<bool>>());
    }

    // A derivative of the gradients reads all of `in`.
    State state(bool differentiable) {
        std::lock_guard<std::mutex> lock(mutex_);
        State now{options_, wanted_, {}, {}, sizes_.unpack()};
        for (size_t i = 0; i < in_.size(); ++i)
            now.in.push_back(unread_[i].defined() && !differentiable ? unread_[i]
                                                                     : in_[i].unpack());
        for (const SavedVariable& variable : held_) now.held.push_back(variable.unpack());
        return now;
    }

    std::vector<bool> needed() const {
        std::vector<bool> flags;
        for (size_t i = 0; i < in_.size(); ++i) flags.push_back(task_should_compute_output(i));
        return flags;
    }

    Formula formula_;
    Options options_;
    std::vector<bool> wanted_;
    SavedVariable sizes_;
    std::vector<SavedVariable> in_, held_;
    variable_list unread_;  // of in_ those whose values no first derivative reads, else undefined
};

c10::DispatchKeySet below_autograd(c10::DispatchKeySet keys) {
    return keys & c10::after_ADInplaceOrView_keyset;
}

auto new_node(const Arguments& a, const Formula& formula, std::vector<bool> wanted = {}) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
    return std::shared_ptr<NetworkNode>(new NetworkNode(a, formula, std::move(wanted)),
                                        torch::autograd::deleteNode);
#else
    return c10::make_intrusive<NetworkNode>(a, formula, std::move(wanted));
#endif
}

ForwardTensors forward(c10::DispatchKeySet keys, const std::string& cell, const Tensor& input,
                       const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                       const OptionalTensor& batch_sizes, bool has_biases, int64_t num_layers,
                       bool bidirectional, double dropout, bool train, bool keep, bool recompute) {
    const Arguments a{cell,       input,         h0,     c0, weights, batch_sizes, has_biases,
                      num_layers, bidirectional, dropout};
    const variable_list all = tensors_of(a);
    const bool differentiable = any_requires_grad(all), forward_mode = any_tangent(all);
    ForwardTensors tensors;
    {
        at::AutoDispatchBelowADInplaceOrView guard;
        tensors = forward_operator().redispatch(
            below_autograd(keys), cell, input, h0, c0, weights, batch_sizes, has_biases, num_layers,
            bidirectional, dropout, train, keep || differentiable || forward_mode, recompute);
    }
    auto& [output, h_n, c_n, hidden, saved, c, noise] = tensors;
    if (forward_mode) {
        const variable_list found =
            by_formulas("results", Options(a), tensor(batch_sizes), noise, all);
        output = found[0], h_n = found[1];
        if (c0) c_n = found[2];
    } else if (differentiable) {
        ForwardResult r{output, h_n, c0 ? c_n : Tensor(), hidden, saved, c, noise};
        attach_backward(a, r);
    }
    return tensors;
}

BackwardResult backward(c10::DispatchKeySet keys, const std::string& cell,
                        const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& h0,
                        const OptionalTensor& c0, at::TensorList weights,
                        const OptionalTensor& batch_sizes, bool has_biases, int64_t num_layers,
                        bool bidirectional, double dropout, const Tensor& hidden,
                        const Tensor& saved, const Tensor& c, const Tensor& noise,
                        c10::List<bool> wanted) {
    const Arguments a{cell,       input,         h0,     c0, weights, batch_sizes, has_biases,
                      num_layers, bidirectional, dropout};
    const variable_list grads = {tensor(grad_output), tensor(grad_h_n), tensor(grad_c_n)};
    variable_list all = grads;
    for (const Tensor& t : tensors_of(a)) all.push_back(t);
    BackwardResult result;
    {
        at::AutoDispatchBelowADInplaceOrView guard;
        result = backward_operator().redispatch(below_autograd(keys), cell, grad_output, grad_h_n,
                                                grad_c_n, input, h0, c0, weights, batch_sizes,
                                                has_biases, num_layers, bidirectional, dropout,
                                                hidden, saved, c, noise, wanted);
    }
    auto& [grad_input, grad_h0, grad_c0, grad_weights] = result;
    std::vector<Tensor*> found = {&grad_input, &grad_h0, &grad_c0};
    for (Tensor& g : grad_weights) found.push_back(&g);
    const std::vector<bool> flags(wanted.begin(), wanted.end());
    if (any_tangent(all)) {
        const variable_list formulas = by_formulas("gradients", Options(a), tensor(batch_sizes),
                                                   noise, flags, grads, tensors_of(a));
        for (size_t i = 0; i < found.size(); ++i)
            if (formulas[i].defined()) *found[i] = formulas[i];
    } else if (any_requires_grad(all)) {
        const auto node = new_node(a, of_backward, flags);
        node->connect(all);
        node->keep({noise});
        for (size_t i = 0; i < found.size(); ++i)  // the empty ones keep their place
            torch::autograd::set_history(flags[i] && (i != 2 || c0) ? *found[i] : Tensor(), node);
    }
    return result;
}

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
    m.impl("forward", forward);
    m.impl("backward", backward);
}

}  // namespace

// Plain calls come by here: without a list of their tensors.
bool needs_gradient(const Arguments& a) {
    if (!at::GradMode::is_enabled()) return false;
    if (a.input.requires_grad() || (a.h0.defined() && a.h0.requires_grad()) ||
        (a.c0 && a.c0->requires_grad()))
        return true;
    for (const Tensor& weight : a.weights)
        if (weight.requires_grad()) return true;
    return false;
}

void attach_backward(const Arguments& a, ForwardResult& r) {
    const auto node = new_node(a, of_forward);
    node->connect(tensors_of(a),
                  read_by_backward(a, recomputes({r.hidden, r.saved, r.c, r.noise})));
    node->keep({r.hidden, r.saved, r.c, r.noise});
    for (Tensor* t : {&r.output, &r.h_n, &r.c_n}) torch::autograd::set_history(*t, node);
}

}  // namespace fastrnn
