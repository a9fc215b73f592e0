// Small layers run in a few microseconds; torch's dispatcher takes as long, its layers' Python three
// times and an autograd Function in Python ten times that. A module therefore calls the kernels from
// here where nobody else is to see the call: with plain tensors on the CPU or a GPU, without autocast,
// tracing, mode or transform. In every other case, and for everything that is wrong, these functions return
// None, and the module goes the long way.
#include "direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include "cpu/choices.h"
#include "network.h"
#include "node.h"

namespace fastrnn {
namespace {

namespace py = pybind11;
using at::Tensor;

bool only(c10::DispatchKeySet keys, c10::DispatchKeySet usual) {
    return (keys.raw_repr() & ~usual.raw_repr()) == 0;
}

// A torch.Tensor or Parameter itself, and plain. Where a GPU has no kernels in this build, the module's
// long way calls torch's layer.
bool is_plain(PyObject* object) {
    return object && THPVariable_CheckExact(object) &&
           fastrnn::is_plain(THPVariable_Unpack(object));
}

// Attributes' names as Python's strings, made once: one of C would be copied and hashed at every search.
struct Name {
    PyObject* object;
    explicit Name(const char* text) : object(PyUnicode_InternFromString(text)) {}
};
struct Names {
    Name batch_first{"batch_first"}, bias{"bias"}, bias_hh{"bias_hh"}, bias_ih{"bias_ih"},
        bidirectional{"bidirectional"}, dropout{"dropout"},
        flat_weights_names{"_flat_weights_names"}, hidden_size{"hidden_size"},
        input_size{"input_size"}, num_layers{"num_layers"}, parameters{"_parameters"},
        proj_size{"proj_size"}, recompute{"recompute"}, training{"training"},
        weight_hh{"weight_hh"}, weight_ih{"weight_ih"};
};
const Names& names() {
    static const Names all;
    return all;
}

PyObject* found(PyObject* dict, const Name& name) { return PyDict_GetItem(dict, name.object); }

// A module's attributes, without the search through its classes.
class Attributes {
public:
    explicit Attributes(py::handle module)
        : all_(py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr))) {
        PyErr_Clear();
    }

    // Null if there is none, and then they are not `complete`.
    PyObject* get(const Name& name) {
        PyObject* value = all_ ? found(all_.ptr(), name) : nullptr;
        if (!value) complete_ = false;
        return value;
    }
    // Whatever Python takes for true, as torch's `if self.batch_first` does.
    bool flag(const Name& name) {
        PyObject* value = get(name);
        const int truth = value ? PyObject_IsTrue(value) : 0;
        if (truth < 0) {
            PyErr_Clear();
            complete_ = false;
        }
        return truth == 1;
    }
    // Of an attribute that an instance need not have.
    bool is_set(const Name& name) {
        const bool complete = complete_;
        const bool truth = flag(name);
        complete_ = complete;
        return truth;
    }
    int64_t number(const Name& name) {
        PyObject* value = get(name);
        const int64_t number = value && PyLong_Check(value) ? PyLong_AsLongLong(value) : -1;
        if (number < 0) {
            PyErr_Clear();
            complete_ = false;
        }
        return number;
    }
    // Whether all that was asked for was there, and what it was asked for as.
    bool complete() const { return complete_; }

private:
    py::object all_;
    bool complete_ = true;
};

// The state hx: h, or (h, c) for a cell that has c. False if it is something else.
bool read_states(py::handle hx, bool has_c, Tensor& h, std::optional<Tensor>& c) {
    PyObject *first = hx.ptr(), *second = nullptr;
    if (has_c) {
        if (!PyTuple_CheckExact(first) || PyTuple_GET_SIZE(first) != 2) return false;
        second = PyTuple_GET_ITEM(hx.ptr(), 1);
        first = PyTuple_GET_ITEM(hx.ptr(), 0);
        if (!is_plain(second)) return false;
        c = THPVariable_Unpack(second);
    }
    if (!is_plain(first)) return false;
    h = THPVariable_Unpack(first);
    return true;
}

// Whether it takes no longer than it takes to let other threads of Python run meanwhile.
bool is_short(const Problem& p) {
    const int64_t sizes = p.layer_input(0) + p.recurrent;
    return p.device.is_cpu() && p.layers == 1 && p.directions == 1 &&
           p.rows * p.cell.gates * p.hidden * sizes < cpu::worth_a_thread;
}

// The network's results, or nothing if an argument is wrong: the long way says what. states_alone:
// whether the output, where nobody else will, may have the place of h_n.
std::optional<ForwardResult> run(const Arguments& arguments, bool train, bool recompute,
                                 bool states_alone = false) {
    const bool differentiable = needs_gradient(arguments);
    ForwardResult result;
    {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        RECORD_FUNCTION("fastrnn::forward", std::vector<c10::IValue>());
        Problem problem;
        try {
            problem = check(arguments);
        } catch (const std::exception&) {
            return std::nullopt;
        }
        std::optional<py::gil_scoped_release> no_gil;
        if (!is_short(problem)) no_gil.emplace();
        result = states_alone && !differentiable ? forward_step(arguments, problem)
                                                 : forward(arguments, problem, train,
                                                           !differentiable ? Keep::nothing
                                                           : recompute     ? Keep::outputs
                                                                           : Keep::gates);
    }
    if (differentiable) attach_backward(arguments, result);
    return result;
}

// The same values in another shape: without gradients at a fraction of reshape's time.
Tensor reshaped(const Tensor& t, at::IntArrayRef shape) {
    if (!t.is_contiguous() || at::GradMode::is_enabled()) return t.reshape(shape);
    auto impl = t.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(), false);
    impl->set_sizes_contiguous(shape);
    return Tensor(std::move(impl));
}

py::object wrap(Tensor t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

// RNN, LSTM or GRU: output and the last states, as their forward returns them, or None.
py::object layer(const std::string& cell, py::handle module, py::handle input, py::handle hx) {
    const CellInfo* info = find_info(cell);
    const Names& name = names();
    Attributes attributes(module);
    if (!info || !nobody_listens() || !is_plain(input.ptr())) return py::none();
    PyObject *listed = attributes.get(name.flat_weights_names),
             *parameters = attributes.get(name.parameters), *dropout = attributes.get(name.dropout);
    const int64_t inputs = attributes.number(name.input_size),
                  hidden = attributes.number(name.hidden_size),
                  proj = attributes.number(name.proj_size),
                  layers = attributes.number(name.num_layers);
    const bool bias = attributes.flag(name.bias),
               bidirectional = attributes.flag(name.bidirectional),
               train = attributes.flag(name.training),
               wants_batch_first = attributes.flag(name.batch_first),
               recompute = attributes.is_set(name.recompute);
    if (!attributes.complete() || !PyList_CheckExact(listed) || !PyDict_Check(parameters) ||
        !PyFloat_CheckExact(dropout))
        return py::none();
    c10::SmallVector<Tensor, 8> weights;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(listed); ++i) {
        PyObject* weight = PyDict_GetItem(parameters, PyList_GET_ITEM(listed, i));
        if (!is_plain(weight)) return py::none();
        weights.push_back(THPVariable_Unpack(weight));
    }

    Tensor x = THPVariable_Unpack(input.ptr()), h0;
    std::optional<Tensor> c0;
    const bool batched = x.dim() == 3, batch_first = wants_batch_first && batched;
    if (x.dim() < 2 || x.dim() > 3 || x.size(-1) != inputs) return py::none();
    if (batch_first) x = x.transpose(0, 1);
    if (!batched) x = x.unsqueeze(1);
    const int64_t recurrent = proj > 0 ? proj : hidden;
    if (hx.is_none() && x.is_cuda()) {
        // Undefined: nobody fills memory with zeros, and the first step multiplies none. The sizes
        // are then those of the weights.
        if (weights.size() < 2 ||
            weights[1].sizes() != at::IntArrayRef{info->gates * hidden, recurrent})
            return py::none();
    } else if (hx.is_none()) {
        const auto zeros = [&](int64_t width) {
            return at::zeros({layers * (bidirectional ? 2 : 1), x.size(1), width}, x.options());
        };
        h0 = zeros(recurrent);
        if (info->has_c) c0 = proj > 0 ? zeros(hidden) : h0;
    } else {
        if (!read_states(hx, info->has_c, h0, c0) || h0.dim() != x.dim() - !batched)
            return py::none();
        if (!batched) {
            h0 = h0.unsqueeze(1);
            if (c0) c0 = c0->unsqueeze(1);
        }
    }
    if ((h0.defined() && h0.size(-1) != recurrent) || (c0 && c0->size(-1) != hidden))
        return py::none();

    const OptionalTensor no_batch_sizes;
    auto r = run({cell, x, h0, c0, weights, no_batch_sizes, bias, layers, bidirectional,
                  PyFloat_AS_DOUBLE(dropout)},
                 train, recompute);
    if (!r) return py::none();
    if (batch_first) r->output = r->output.transpose(0, 1);
    if (!batched)
        for (Tensor* t : {&r->output, &r->h_n, &r->c_n})
            if (t->defined()) *t = t->squeeze(1);
    if (!info->has_c) return py::make_tuple(wrap(r->output), wrap(r->h_n));
    return py::make_tuple(wrap(r->output), py::make_tuple(wrap(r->h_n), wrap(r->c_n)));
}

// RNNCell, LSTMCell or GRUCell: the new h, or (h, c), or None.
py::object one_step(const std::string& cell, py::handle module, py::handle input, py::handle hx) {
    const CellInfo* info = find_info(cell);
    const Names& name = names();
    Attributes attributes(module);
    if (!info || !nobody_listens() || !is_plain(input.ptr()) || hx.is_none()) return py::none();
    PyObject* parameters = attributes.get(name.parameters);
    const bool bias = attributes.flag(name.bias);
    const int64_t inputs = attributes.number(name.input_size),
                  hidden = attributes.number(name.hidden_size);
    if (!attributes.complete() || !PyDict_Check(parameters)) return py::none();
    c10::SmallVector<Tensor, 4> weights;
    for (const Name* one : {&name.weight_ih, &name.weight_hh, &name.bias_ih, &name.bias_hh}) {
        if (weights.size() == 2 && !bias) break;
        PyObject* weight = found(parameters, *one);
        if (!is_plain(weight)) return py::none();
        weights.push_back(THPVariable_Unpack(weight));
    }
    Tensor x = THPVariable_Unpack(input.ptr()), h0;
    std::optional<Tensor> c0;
    if (!read_states(hx, info->has_c, h0, c0) || x.dim() < 1 || x.dim() > 2 || h0.dim() != x.dim())
        return py::none();
    if (x.size(-1) != inputs || h0.size(-1) != hidden ||
        (c0 && (c0->dim() != x.dim() || c0->size(-1) != hidden)))
        return py::none();
    // As a layer's: [1, B, ...].
    const int64_t batch = x.dim() == 2 ? x.size(0) : 1;
    const auto as_step = [&](const Tensor& t) { return reshaped(t, {1, batch, t.size(-1)}); };
    if (x.dim() == 2 && (h0.size(0) != batch || (c0 && c0->size(0) != batch))) return py::none();
    const at::DimVector shape(h0.sizes());
    x = as_step(x), h0 = as_step(h0);
    if (c0) c0 = as_step(*c0);
    const OptionalTensor no_batch_sizes;
    auto r = run({cell, x, h0, c0, weights, no_batch_sizes, bias, 1, false, 0.0}, false, false,
                 /*states_alone=*/true);
    if (!r) return py::none();
    const auto result = [&](const Tensor& t) {
        // No view to autograd, as torch's cells return none.
        if (t.requires_grad()) return wrap(at::_unsafe_view(t, shape));
        t.unsafeGetTensorImpl()->set_sizes_contiguous(shape);  // a new tensor, nobody else's
        return wrap(t);
    };
    if (!info->has_c) return result(r->h_n);
    return py::make_tuple(result(r->h_n), result(r->c_n));
}

}  // namespace

bool nobody_listens() {
    constexpr c10::DispatchKeySet usual(
        {c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
    const auto included = c10::impl::tls_local_dispatch_key_set().included_;
    return only(included, usual) && !at::impl::torch_function_mode_enabled() &&
           !at::autocast::is_autocast_enabled(at::kCPU) &&
           !at::autocast::is_autocast_enabled(at::kCUDA);
}

bool is_plain(const Tensor& t) {
    constexpr c10::DispatchKeySet usual =
        c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView,
                             c10::DispatchKey::AutogradFunctionality, c10::DispatchKey::AutocastCPU,
                             c10::DispatchKey::AutocastCUDA}) |
#ifdef FASTRNN_HAS_CUDA
        c10::DispatchKeySet(c10::BackendComponent::CUDABit) |
#endif
        c10::DispatchKeySet(c10::BackendComponent::CPUBit);
    return only(t.key_set(), usual) && !t._fw_grad(/*level=*/0).defined();
}

void bind_direct(py::module_& module) {
    module.def("layer", layer,
               "layer(cell, module, input, hx): a layer's forward, or None where the operators are "
               "needed.");
    module.def("cell", one_step,
               "cell(cell, module, input, hx): a cell's forward, or None where the operators are "
               "needed.");
}

}  // namespace fastrnn
