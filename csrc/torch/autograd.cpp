#include "autograd.h"

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

#include "compat.h"
#include "dispatch_keys.h"
#include "double_backward.h"
#include "models.h"
#include "schema.h"

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

// Calls a function of fastrnn/higher_order.py: derivatives by the formulas of reference.py.
template <class... Args>
variable_list by_formulas(const char* name, const Options& o, const Tensor& batch_sizes,
                          const Tensor& dropout_mask, const Args&... args) {
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
    for_each_option(o, [&](const char* option, const auto& value) { options[option] = value; });
    const py::tuple found =
        py::module_::import("fastrnn.higher_order")
            .attr(name)(options, wrap(batch_sizes), wrap(dropout_mask), object(args)...);
    variable_list result;
    for (const py::handle t : found)
        result.push_back(t.is_none() ? Tensor() : THPVariable_Unpack(t.ptr()));
    return result;
}

// What a node computes gradients from, besides the incoming gradients.
struct State {
    Options options;
    std::vector<bool> wanted;  // of `backward`, else empty
    variable_list in, kept;    // what gradients are of; what forward kept for backward
    Tensor sizes;
};

// What a node computes: the gradients of `in`. Those that are not `needed` are discarded.
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

// as_step for any tensor, also in double backward and in a compiled graph.
Tensor any_as_step(Tensor t) {
    if (!t.defined()) return t;
    if (!at::GradMode::is_enabled() && only_default_keys_active() && has_only_default_keys(t))
        return as_step(t);
    while (t.dim() < 3) t = t.unsqueeze(0);
    return t;
}

// The gradients without the dispatcher, where no mode or transform has to see a call of the
// operator. A call of fast_path.cpp may have undefined states, which the operator refuses. Autocast
// has no rule for the operator.
std::optional<BackwardResult> without_dispatch(const BackwardCall& call) {
    bool ordinary =
        !at::GradMode::is_enabled() && only_default_keys_active() && !are_of_models(call.weights);
    for (const Tensor* t : {&call.input, &call.hidden, &call.saved, &call.c, &call.dropout_mask})
        ordinary = ordinary && has_only_default_keys(*t);
    for (const OptionalTensor* t : {&call.grad_output, &call.grad_h_n, &call.grad_c_n})
        ordinary = ordinary && (!*t || has_only_default_keys(**t));
    for (const Tensor& weight : call.weights) ordinary = ordinary && has_only_default_keys(weight);
    if (!ordinary) return std::nullopt;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    RECORD_FUNCTION("fastrnn::backward", std::vector<c10::IValue>());
    const Arguments arguments = call.arguments();
    const Kept kept = call.kept();
    const OutputGradients gradients = call.gradients();
    const Problem problem = check(arguments);
    check_kept(arguments, problem, kept);
    check_gradients(arguments, problem, gradients);
    return fastrnn::backward(arguments, problem, kept, gradients, call.wanted);
}

// The derivative of `forward`. in: input, h0, c0, weights. kept: hidden, saved, c, dropout_mask.
// The node of a cell has the cell's input, states and gradients (attach_backward).
constexpr Formula of_forward{
    "FastrnnBackward",
    [](const variable_list& grads, const State& s, const std::vector<bool>& needed) {
        const bool of_cell = !s.sizes.defined() && s.in[0].dim() < 3;
        const auto shaped = [&](const Tensor& t) { return of_cell ? any_as_step(t) : t; };
        BackwardCall call{.grad_output = optional(grads[0]),
                          .grad_h_n = optional(shaped(grads[1])),
                          .grad_c_n = optional(shaped(grads[2])),
                          .input = shaped(s.in[0]),
                          .h0 = shaped(s.in[1]),
                          .c0 = optional(shaped(s.in[2])),
                          .weights = {s.in.begin() + 3, s.in.end()},
                          .batch_sizes = optional(s.sizes),
                          .options = s.options,
                          .hidden = s.kept[0],
                          .saved = s.kept[1],
                          .c = s.kept[2],
                          .dropout_mask = s.kept[3],
                          .wanted = needed};
        std::optional<BackwardResult> found = without_dispatch(call);
        const bool dispatched = !found;
        if (dispatched) {
            if (!call.h0.defined()) {
                const auto zeros = [&](int64_t width) {
                    return at::zeros(
                        {s.options.num_layers * s.options.directions(), call.input.size(1), width},
                        call.input.options());
                };
                const CellInfo& cell = *find_info(s.options.cell);
                call.h0 = zeros(call.weights[1].size(1));
                if (cell.has_c)
                    call.c0 = zeros(call.weights[1].size(0) / cell.gates * cell.c_states);
            }
            found = call();
        }
        auto& [grad_input, grad_h0, grad_c0, grad_weights] = *found;
        variable_list result = {grad_input, grad_h0, grad_c0};
        result.insert(result.end(), grad_weights.begin(), grad_weights.end());
        for (size_t i = 0; of_cell && i < 3; ++i) {
            if (!needed[i]) continue;
            if (!dispatched)  // a new tensor, nobody else's
                result[i].unsafeGetTensorImpl()->set_sizes_contiguous(s.in[i].sizes());
            while (result[i].dim() > s.in[i].dim()) result[i] = result[i].squeeze(0);
        }
        return result;
    },
    /*traceable=*/true};

// Whether kernels of dual numbers can compute with these tensors, with or without tangents, and no
// mode or transform has to see the operations.
bool may_be_dual(const Arguments& a, std::initializer_list<const variable_list*> lists,
                 bool tangents) {
    bool may = only_default_keys_active() && has_dual_kernels(a.options) && !a.has_events() &&
               !are_of_models(a.weights);
    for (const variable_list* list : lists)
        for (const Tensor& t : *list)
            may = may && (!t.defined() || (t.is_cpu() && has_only_default_keys(t, tangents)));
    return may;
}

// The derivative of `backward` by kernels, where no other derivative follows.
std::optional<variable_list> by_kernels(const variable_list& grads, const State& s,
                                        const std::vector<bool>& needed) {
    const OptionalTensor c0 = optional(s.in[5]), sizes = optional(s.sizes);
    const std::vector<Tensor> weights(s.in.begin() + 6, s.in.end());
    const Arguments arguments{s.options, s.in[3], s.in[4], c0, weights, sizes};
    if (at::GradMode::is_enabled() ||
        !may_be_dual(arguments, {&grads, &s.in, &s.kept}, /*tangents=*/false))
        return std::nullopt;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    RECORD_FUNCTION("fastrnn::double_backward", std::vector<c10::IValue>());
    const Problem problem = check(arguments);
    if (problem.batch == 0) return std::nullopt;
    const OptionalTensor output = optional(s.in[0]), h_n = optional(s.in[1]),
                         c_n = optional(s.in[2]);
    return double_backward(arguments, problem, s.kept[0], {output, h_n, c_n}, grads, needed);
}

// The derivative of `backward`. in: grad_output, grad_h_n, grad_c_n, input, h0, c0, weights. kept:
// dropout_mask.
constexpr Formula of_backward{
    "FastrnnBackwardBackward",
    [](const variable_list& grads, const State& s, const std::vector<bool>& needed) {
        if (auto found = by_kernels(grads, s, needed)) return *found;
        return by_formulas("second_gradients", s.options, s.sizes, s.kept[0], s.wanted, needed,
                           s.in, grads);
    },
    /*traceable=*/false};

// The derivative of the tangents of `forward`. in: the tangents of input, h0, c0 and the weights,
// and then these. kept: dropout_mask.
constexpr Formula of_tangents{
    "FastrnnTangentsBackward",
    [](const variable_list& grads, const State& s, const std::vector<bool>& needed) {
        return by_formulas("tangent_gradients", s.options, s.sizes, s.kept[0], needed, s.in, grads);
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

// Which of tensors_of(a) the first derivative reads. The user may overwrite the others between
// forward and backward: the input if weight_ih is frozen, for example, and a bias always.
std::vector<bool> read_by_backward(const Arguments& a, bool recompute) {
    const CellInfo& cell = *find_info(a.options.cell);
    const auto trained = [&](size_t i) { return a.weights[i].requires_grad(); };
    const int64_t directions = a.options.directions();
    const size_t each = a.weights.size() / (a.options.num_layers * directions);
    // W_hh takes gradients from a step to the one before it, or to h0.
    const bool one_step =
        !a.packed() &&
        (a.input.dim() < 3 ||
         (a.input.dim() == 3 && a.input.sym_size(0).maybe_as_int() == std::optional<int64_t>(1)));
    const bool needs_hh = !one_step || (a.h0.defined() && a.h0.requires_grad());
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
                   bias = a.options.has_biases && (kind == 2 || kind == 3),
                   unread_hh = kind == 1 && !needs_hh;
        read.push_back(recompute || !(bias || unread_hh || (first_ih && !a.input.requires_grad())));
    }
    return read;
}

// A node of autograd's graph: its saved tensors, and an edge for each tensor that gets a gradient.
struct NetworkNode : public torch::autograd::Node {
    NetworkNode(const Arguments& a, const Formula& formula, std::vector<bool> wanted = {})
        : formula_(formula),
          options_(a.options),
          wanted_(std::move(wanted)),
          sizes_(tensor(a.batch_sizes), false) {}

    std::string name() const override { return formula_.name; }

    // A tensor that is not `read` by the first derivative is also saved without a check of its
    // version, unless saved-tensor hooks are active: these decide where a saved tensor is stored.
    void connect(const variable_list& variables, const std::vector<bool>& read = {}) {
        const bool hooked = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
        torch::autograd::edge_list edges;
        edges.reserve(variables.size());
        in_.reserve(variables.size());
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
        kept_.reserve(tensors.size());
        for (const Tensor& t : tensors) kept_.emplace_back(t, /*is_output=*/false);
    }

    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto* list : {&in_, &kept_})
            for (SavedVariable& variable : *list) variable.reset_data();
        for (Tensor& t : unread_) t.reset();
        sizes_.reset_data();
    }

    variable_list apply(variable_list&& grads) override {
        // Gradients with a tangent or inside a transform are differentiated as well.
        bool differentiable = at::GradMode::is_enabled() || !only_default_keys_active();
        for (const Tensor& g : grads)
            differentiable = differentiable || (g.defined() && !has_only_default_keys(g));
        return formula_(grads, state(differentiable), needed());
    }

    // Compiled autograd: the values that a compiled graph is specialised on, and this node in it.
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args)
        FASTRNN_COMPILED_ARGS_CONST override {
        args.collect(name());
        args.collect(options_.cell);
        for_each_option(options_, [&](const char*, const auto& value) { args.collect(value); });
        args.collect(wanted_);
        args.collect(in_, false);
        args.collect(kept_, false);
        args.collect(sizes_, false);
    }

    variable_list apply_with_saved(const variable_list& grads,
                                   torch::dynamo::autograd::SwapSavedVariables& saved) override {
        saved.before(in_);
        saved.before(kept_);
        saved.before(sizes_);
        variable_list result = traced(grads, state(/*differentiable=*/true), saved);
        saved.after(in_);
        saved.after(kept_);
        saved.after(sizes_);
        return result;
    }

private:
#ifdef FASTRNN_HAS_PACKED_ARGS
    // Adds a call of `unpacked` to the graph.
    variable_list traced(const variable_list& grads, const State& now,
                         torch::dynamo::autograd::SwapSavedVariables& saved) {
        using namespace torch::dynamo::autograd;
        PackedArgs packed;
        std::vector<at::TypePtr> types;
        const auto pack = [&](const auto& value) {
            packed.pack(value);
            types.push_back(IValuePacker<std::decay_t<decltype(value)>>::packed_type());
        };
        pack(now.options.cell);
        for_each_option(now.options, [&](const char*, const auto& value) { pack(value); });
        pack(now.wanted);
        pack(maybe(now.in));
        pack(maybe(now.kept));
        pack(optional(now.sizes));
        pack(needed());
        const auto& python = getPyCompilerInterface();
        const std::string function = python->bind_function(
            saved.get_py_compiler(), name(),
            [formula = formula_](const variable_list& grads, const std::vector<c10::IValue>& args) {
                return unpacked(formula, grads, args);
            },
            std::move(types), /*is_custom_function=*/true, formula_.traceable);
        return python->call_function(
            saved.get_py_compiler(), "apply_functional", function, grads, packed.vec(),
            IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
                get_input_metadata(next_edges())));
    }

    // Runs in the compiled graph, with the values that `traced` has packed.
    static variable_list unpacked(const Formula& formula, const variable_list& grads,
                                  const std::vector<c10::IValue>& args) {
        torch::dynamo::autograd::PackedArgs packed(args);
        State s;
        s.options.cell = packed.unpack<std::string>();
        for_each_option(s.options, [&](const char*, auto& value) {
            value = packed.unpack<std::decay_t<decltype(value)>>();
        });
        s.wanted = packed.unpack<std::vector<bool>>();
        s.in = certain(packed.unpack<MaybeTensors>());
        s.kept = certain(packed.unpack<MaybeTensors>());
        s.sizes = tensor(packed.unpack<OptionalTensor>());
        return formula(grads, s, packed.unpack<std::vector<bool>>());
    }
#else
    // The saved tensors and the gradients are proxies, so the graph gets what the formula calls.
    variable_list traced(const variable_list& grads, const State& now,
                         torch::dynamo::autograd::SwapSavedVariables&) {
        return formula_(grads, now, needed());
    }
#endif

    // A derivative of the gradients reads all of `in`.
    State state(bool differentiable) {
        std::lock_guard<std::mutex> lock(mutex_);
        State now{options_, wanted_, {}, {}, sizes_.unpack()};
        for (size_t i = 0; i < in_.size(); ++i)
            now.in.push_back(unread_[i].defined() && !differentiable ? unread_[i]
                                                                     : in_[i].unpack());
        for (const SavedVariable& variable : kept_) now.kept.push_back(variable.unpack());
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
    std::vector<SavedVariable> in_, kept_;
    variable_list unread_;  // of in_ those whose values no first derivative reads, else undefined
};

c10::DispatchKeySet below_autograd(c10::DispatchKeySet keys) {
    return keys & c10::after_ADInplaceOrView_keyset;
}

auto new_node(const Arguments& a, const Formula& formula, std::vector<bool> wanted = {}) {
#ifdef FASTRNN_HAS_INTRUSIVE_NODES
    return c10::make_intrusive<NetworkNode>(a, formula, std::move(wanted));
#else
    return std::shared_ptr<NetworkNode>(new NetworkNode(a, formula, std::move(wanted)),
                                        torch::autograd::deleteNode);
#endif
}

// Those of tensors_of(a), undefined where there is none.
variable_list tangents_of(const variable_list& all) {
    variable_list result;
    for (const Tensor& t : all) result.push_back(t.defined() ? t._fw_grad(/*level=*/0) : Tensor());
    return result;
}

// Whether kernels compute the tangents of the results.
bool may_have_tangents(const Arguments& a, const variable_list& all) {
    const variable_list tangents = tangents_of(all);
    return a.input.numel() > 0 && may_be_dual(a, {&all, &tangents}, /*tangents=*/true) &&
           !any_tangent(tangents);
}

void set_tangents(const Arguments& a, const variable_list& all, ForwardResult& r) {
    variable_list in = tangents_of(all), found;
    {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        RECORD_FUNCTION("fastrnn::tangents", std::vector<c10::IValue>());
        found = tangents(a, check(a), r, in);
    }
    in.insert(in.end(), all.begin(), all.end());
    if (any_requires_grad(in)) {
        const auto node = new_node(a, of_tangents);
        node->connect(in);
        node->keep({r.dropout_mask});
        for (Tensor& t : found) torch::autograd::set_history(t, node);
    }
    Tensor* const results[] = {&r.output, &r.h_n, &r.c_n};
    for (size_t i = 0; i < found.size(); ++i)
        if (results[i]->defined())
            results[i]->_set_fw_grad(found[i], /*level=*/0, /*is_inplace_op=*/false);
}

void forward(const c10::OperatorHandle&, c10::DispatchKeySet keys, Stack* stack) {
    ForwardCall call = ForwardCall::pop(*stack);
    const Arguments a = call.arguments();
    const variable_list all = tensors_of(a);
    const bool differentiable = any_requires_grad(all), forward_mode = any_tangent(all);
    call.keep = call.keep || differentiable || forward_mode;
    ForwardResult r;
    {
        at::AutoDispatchBelowADInplaceOrView guard;
        r = call.redispatch(below_autograd(keys));
    }
    const bool by_kernels = forward_mode && may_have_tangents(a, all);
    if (forward_mode && !by_kernels) {
        const variable_list found =
            by_formulas("results", a.options, tensor(a.batch_sizes), r.dropout_mask, all);
        r.output = found[0], r.h_n = found[1];
        if (a.c0) r.c_n = found[2];
    } else {
        const Tensor empty = r.c_n;
        if (!a.c0) r.c_n = Tensor();  // what is empty gets no gradient
        if (differentiable) attach_backward(a, r);
        if (by_kernels) set_tangents(a, all, r);
        if (!a.c0) r.c_n = empty;
    }
    push(*stack, r);
}

void backward(const c10::OperatorHandle&, c10::DispatchKeySet keys, Stack* stack) {
    const BackwardCall call = BackwardCall::pop(*stack);
    const Arguments a = call.arguments();
    const variable_list grads = {tensor(call.grad_output), tensor(call.grad_h_n),
                                 tensor(call.grad_c_n)};
    variable_list all = grads;
    for (const Tensor& t : tensors_of(a)) all.push_back(t);
    BackwardResult result;
    {
        at::AutoDispatchBelowADInplaceOrView guard;
        result = call.redispatch(below_autograd(keys));
    }
    auto& [grad_input, grad_h0, grad_c0, grad_weights] = result;
    std::vector<Tensor*> found = {&grad_input, &grad_h0, &grad_c0};
    for (Tensor& g : grad_weights) found.push_back(&g);
    if (any_tangent(all)) {
        const variable_list formulas =
            by_formulas("gradients", a.options, tensor(a.batch_sizes), call.dropout_mask,
                        call.wanted, grads, tensors_of(a));
        for (size_t i = 0; i < found.size(); ++i)
            if (formulas[i].defined()) *found[i] = formulas[i];
    } else if (any_requires_grad(all)) {
        const auto node = new_node(a, of_backward, call.wanted);
        node->connect(all);
        node->keep({call.dropout_mask});
        for (size_t i = 0; i < found.size(); ++i)  // the empty ones keep their place
            torch::autograd::set_history(call.wanted[i] && (i != 2 || a.c0) ? *found[i] : Tensor(),
                                         node);
    }
    push(*stack, result);
}

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
    m.impl("forward", torch::CppFunction::makeFromBoxedFunction<&forward>());
    m.impl("backward", torch::CppFunction::makeFromBoxedFunction<&backward>());
}

}  // namespace

// The fast path calls this for every call, so it makes no list of the tensors.
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
                  read_by_backward(a, recomputes({r.hidden, r.saved, r.c, r.dropout_mask})));
    node->keep({r.hidden, r.saved, r.c, r.dropout_mask});
    for (Tensor* t : {&r.output, &r.h_n, &r.c_n}) torch::autograd::set_history(*t, node);
}

}  // namespace fastrnn
