// The fast path. A small layer runs in a few microseconds. torch's dispatcher takes as long, the
// Python code of torch's layers three times as long, and an autograd Function in Python ten times
// as long. A module therefore calls the kernels from here if the tensors are ordinary ones on the
// CPU or a GPU and no tracer, mode or transform is active; a layer only without autocast.
// Otherwise, and for all invalid arguments, these functions return None. The module then runs
// torch's forward code, which calls fastrnn.functional. Its functions try the fast path once more
// before they call the operator: for packed data, and for layers with parametrized weights and
// under autocast.
#include "fast_path.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include "../cpu/choices.h"
#include "autograd.h"
#include "dispatch_keys.h"
#include "network.h"

namespace fastrnn {
namespace {

namespace py = pybind11;
using at::Tensor;

// Whether an object is a torch.Tensor or Parameter, no subclass, with only default dispatch keys.
// In a build without CUDA kernels a CUDA tensor is not.
bool is_ordinary_tensor(PyObject* object) {
    return object && THPVariable_CheckExact(object) &&
           has_only_default_keys(THPVariable_Unpack(object));
}

// Attribute names as Python strings, created once: a C string would be copied and hashed at every
// lookup.
struct Name {
    PyObject* object;
    explicit Name(const char* text) : object(PyUnicode_InternFromString(text)) {}
};
struct Names {
    Name batch_first{"batch_first"}, bias{"bias"}, bias_hh{"bias_hh"}, bias_ih{"bias_ih"},
        bidirectional{"bidirectional"}, dropout{"dropout"}, flat_weight_refs{"_flat_weight_refs"},
        flat_weights{"_flat_weights"}, flat_weights_names{"_flat_weights_names"},
        hidden_size{"hidden_size"}, input_size{"input_size"}, num_layers{"num_layers"},
        parameters{"_parameters"}, proj_size{"proj_size"}, recompute{"_fastrnn_recompute"},
        training{"training"}, update_flat_weights{"_update_flat_weights"}, weight_hh{"weight_hh"},
        weight_ih{"weight_ih"};
    const Name* of_a_cell[4] = {&weight_ih, &weight_hh, &bias_ih, &bias_hh};
};
const Names& names() {
    static const Names all;
    return all;
}

// Borrowed, or null. PyDict_GetItem would also save and restore the exception of the thread.
PyObject* found(PyObject* dict, PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(dict, key);
    if (!value && PyErr_Occurred()) PyErr_Clear();
    return value;
}
PyObject* found(PyObject* dict, const Name& name) { return found(dict, name.object); }

// The attributes in a module's __dict__, without a lookup in its classes.
class Attributes {
public:
    explicit Attributes(py::handle module)
        : all_(py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr))) {
        PyErr_Clear();
    }

    // Null if there is none; then the attributes are not `complete`.
    PyObject* get(const Name& name) {
        PyObject* value = all_ ? found(all_.ptr(), name) : nullptr;
        if (!value) complete_ = false;
        return value;
    }
    // The truth value of an attribute, as in torch's `if self.batch_first`.
    bool flag(const Name& name) {
        PyObject* value = get(name);
        const int truth = value ? PyObject_IsTrue(value) : 0;
        if (truth < 0) {
            PyErr_Clear();
            complete_ = false;
        }
        return truth == 1;
    }
    // The same for an attribute that need not exist.
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
    // Whether all attributes that were read exist and have the expected types.
    bool complete() const { return complete_; }

    // Whether a method that torch's forward calls is set on the instance (_STEPS of modules.py).
    bool override_a_step() const {
        static const Name steps[] = {Name("check_input"),
                                     Name("get_expected_hidden_size"),
                                     Name("get_expected_cell_size"),
                                     Name("check_hidden_size"),
                                     Name("check_forward_args"),
                                     Name("permute_hidden"),
                                     Name("_update_flat_weights")};
        for (const Name& step : steps)
            if (all_ && found(all_.ptr(), step)) return true;
        return false;
    }

private:
    py::object all_;
    bool complete_ = true;
};

// The state hx: h, or (h, c) as a tuple or list for a cell that has c. False if it is something
// else.
bool read_states(py::handle hx, bool has_c, Tensor& h, std::optional<Tensor>& c) {
    PyObject* first = hx.ptr();
    if (has_c) {
        if (!(PyTuple_Check(first) || PyList_Check(first)) || PySequence_Fast_GET_SIZE(first) != 2)
            return false;
        PyObject* second = PySequence_Fast_GET_ITEM(hx.ptr(), 1);
        first = PySequence_Fast_GET_ITEM(hx.ptr(), 0);
        if (!is_ordinary_tensor(second)) return false;
        c = THPVariable_Unpack(second);
    }
    if (!is_ordinary_tensor(first)) return false;
    h = THPVariable_Unpack(first);
    return true;
}

using WeightList = c10::SmallVector<Tensor, 8>;

// Reads the tensors of a list or tuple. False if one is not ordinary. Two None at the end stand for
// the biases of a cell without biases.
bool read_weights(PyObject* list, WeightList& weights) {
    if (!PyList_Check(list) && !PyTuple_Check(list)) return false;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(list);
    if (count == 4 && PySequence_Fast_GET_ITEM(list, 2) == Py_None &&
        PySequence_Fast_GET_ITEM(list, 3) == Py_None)
        count = 2;
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* weight = PySequence_Fast_GET_ITEM(list, i);
        if (!is_ordinary_tensor(weight)) return false;
        weights.push_back(THPVariable_Unpack(weight));
    }
    return true;
}

// The list _flat_weights that a layer computes with, brought up to date; null where a weight is no
// parameter. modules.py's _update_flat_weights has the rule: the list counts, until an attribute is
// no longer the tensor that its weak reference in _flat_weight_refs points to. It need not be
// called where parameters, list and references agree.
PyObject* flat_weights(py::handle module, Attributes& attributes) {
    const Names& name = names();
    PyObject *listed = attributes.get(name.flat_weights_names),
             *parameters = attributes.get(name.parameters),
             *flat = attributes.get(name.flat_weights),
             *refs = attributes.get(name.flat_weight_refs);
    if (!attributes.complete() || !PyList_CheckExact(listed) || !PyDict_Check(parameters) ||
        !PyList_CheckExact(flat) || !PyList_CheckExact(refs))
        return nullptr;
    const Py_ssize_t count = PyList_GET_SIZE(listed);
    bool agree = PyList_GET_SIZE(flat) == count && PyList_GET_SIZE(refs) == count;
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* weight = found(parameters, PyList_GET_ITEM(listed, i));
        if (!weight) return nullptr;
        if (!agree) continue;
        PyObject* ref = PyList_GET_ITEM(refs, i);
        agree = PyList_GET_ITEM(flat, i) == weight && PyWeakref_CheckRef(ref) &&
                PyWeakref_GetObject(ref) == weight;
    }
    if (agree) return flat;
    PyObject* done = PyObject_CallMethodNoArgs(module.ptr(), name.update_flat_weights.object);
    if (!done) throw py::error_already_set();
    Py_DECREF(done);
    return attributes.get(name.flat_weights);
}

// Whether a call takes less time than releasing and acquiring the GIL.
bool is_short(const Problem& p) {
    const int64_t sizes = p.layer_input(0) + p.recurrent;
    return p.device.is_cpu() && p.layers == 1 && p.directions == 1 &&
           p.rows * p.cell.gates * p.hidden * sizes < cpu::worth_a_thread;
}

// The results of a network, not yet differentiable, or nothing: if an argument is invalid, for
// which the operator raises the error, or if a cell of one's own is not yet compiled for the dtype.
// states_alone: whether the caller reads only the states, so that the output may share h_n's
// memory.
std::optional<ForwardResult> computed(const Arguments& arguments, bool train, Keep keep,
                                      bool states_alone = false) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    RECORD_FUNCTION("fastrnn::forward", std::vector<c10::IValue>());
    Problem problem;
    try {
        problem = check(arguments);
    } catch (const std::exception&) {
        return std::nullopt;
    }
    if (!has_kernels(problem)) return std::nullopt;
    std::optional<py::gil_scoped_release> no_gil;
    if (!is_short(problem)) no_gil.emplace();
    return states_alone && keep == Keep::nothing ? forward_step(arguments, problem)
                                                 : forward(arguments, problem, train, keep);
}

// The results of a network, or nothing if an argument is invalid.
std::optional<ForwardResult> run(const Arguments& arguments, bool train, bool recompute) {
    const bool differentiable = needs_gradient(arguments);
    auto result = computed(arguments, train,
                           !differentiable ? Keep::nothing
                           : recompute     ? Keep::outputs
                                           : Keep::gates);
    if (result && differentiable) attach_backward(arguments, *result);
    return result;
}

py::object wrap(Tensor t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

// The results of a network as Python has them: output, h_n and c_n if there is one.
py::object results(const CellInfo& info, const ForwardResult& r, bool states_in_a_tuple) {
    if (!info.has_c) return py::make_tuple(wrap(r.output), wrap(r.h_n));
    if (!states_in_a_tuple) return py::make_tuple(wrap(r.output), wrap(r.h_n), wrap(r.c_n));
    return py::make_tuple(wrap(r.output), py::make_tuple(wrap(r.h_n), wrap(r.c_n)));
}

// RNN, LSTM or GRU: output and the last states, as their forward returns them, or None. The output
// is that of the operator: with return_states each row ends with c_t. events: [T, B], or None.
py::object layer(const std::string& cell, py::handle module, py::handle input, py::handle hx,
                 bool return_states, py::handle events) {
    const CellInfo* info = find_info(cell);
    const Names& name = names();
    Attributes attributes(module);
    if (!info || info->c_states > 1 || !only_default_keys_active() || autocast_enabled() ||
        !is_ordinary_tensor(input.ptr()) || attributes.override_a_step())
        return py::none();
    PyObject* dropout = attributes.get(name.dropout);
    const int64_t inputs = attributes.number(name.input_size),
                  hidden = attributes.number(name.hidden_size),
                  proj = attributes.number(name.proj_size);
    Options o;
    o.cell = cell;
    o.num_layers = attributes.number(name.num_layers);
    o.has_biases = attributes.flag(name.bias);
    o.bidirectional = attributes.flag(name.bidirectional);
    const bool train = attributes.flag(name.training);
    const bool wants_batch_first = attributes.flag(name.batch_first),
               recompute = attributes.is_set(name.recompute);
    if (!attributes.complete() || !PyFloat_CheckExact(dropout)) return py::none();
    o.dropout = PyFloat_AS_DOUBLE(dropout);
    o.return_states = return_states;
    PyObject* flat = flat_weights(module, attributes);
    WeightList weights;
    if (!flat || !read_weights(flat, weights)) return py::none();

    Tensor x = THPVariable_Unpack(input.ptr()), h0;
    std::optional<Tensor> c0;
    const bool batched = x.dim() == 3, batch_first = wants_batch_first && batched;
    if (x.dim() < 2 || x.dim() > 3 || x.size(-1) != inputs) return py::none();
    // A copy, as torch's: the user's tensor may be overwritten before backward.
    if (batch_first) x = x.transpose(0, 1).contiguous();
    if (!batched) x = x.unsqueeze(1);
    const int64_t recurrent = proj > 0 ? proj : hidden;
    OptionalTensor batch_sizes;
    if (!events.is_none()) {
        if (!is_ordinary_tensor(events.ptr())) return py::none();
        batch_sizes = THPVariable_Unpack(events.ptr());
    }
    if (hx.is_none() && x.is_cuda() && !batch_sizes) {
        // Undefined states stand for zeros: no memory is filled, and the first step needs no
        // product. The sizes are read from the weights.
        if (weights.size() < 2 ||
            weights[1].sizes() != at::IntArrayRef{info->gates * hidden, recurrent})
            return py::none();
    } else if (hx.is_none()) {
        const auto zeros = [&](int64_t width) {
            return at::zeros({o.num_layers * o.directions(), x.size(1), width}, x.options());
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

    auto r = run({o, x, h0, c0, weights, batch_sizes}, train, recompute);
    if (!r) return py::none();
    // In place, as torch's: the output is no view, which detach_() would refuse.
    if (batch_first) r->output.transpose_(0, 1);
    if (!batched)
        for (Tensor* t : {&r->output, &r->h_n, &r->c_n})
            if (t->defined()) *t = t->squeeze(1);
    return results(*info, *r, /*states_in_a_tuple=*/true);
}

// A tensor in the dtype that autocast gives it, from its cache of weights where that has it.
Tensor autocast_to(const Tensor& t, at::ScalarType dtype) {
    return at::autocast::cached_cast(dtype, t, t.device().type());
}

std::vector<Tensor> all_autocast_to(std::vector<Tensor> tensors, at::ScalarType dtype) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast_dispatch_keyset);
    for (Tensor& t : tensors) t = autocast_to(t, dtype);
    return tensors;
}

// The tensors of a call of fastrnn.functional.
struct Given {
    Tensor x, h0;
    OptionalTensor c0;
    WeightList weights;

    // dtype: the dtype of the tensors under autocast, or None if it is off. False if the call needs
    // the operator.
    bool read(const CellInfo& info, py::handle input, py::handle hx, py::handle params,
              py::handle dtype) {
        if (!only_default_keys_active() || (dtype.is_none() && autocast_enabled()) ||
            !is_ordinary_tensor(input.ptr()) || !read_states(hx, info.has_c, h0, c0) ||
            !read_weights(params.ptr(), weights))
            return false;
        x = THPVariable_Unpack(input.ptr());
        if (dtype.is_none()) return true;
        const auto type = py::cast<at::ScalarType>(dtype);
        c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast_dispatch_keyset);
        x = autocast_to(x, type), h0 = autocast_to(h0, type);
        if (c0) c0 = autocast_to(*c0, type);
        // torch caches no weights of a layer with a projection.
        const bool projected = c0 && c0->size(-1) != h0.size(-1);
        for (Tensor& weight : weights)
            weight = projected ? weight.to(type) : autocast_to(weight, type);
        return true;
    }
};

// torch.lstm and its like: output and the last states, or None. hx: h0 or (h0, c0).
py::object network(const py::tuple& network, py::handle input, py::handle hx, py::handle params,
                   py::handle batch_sizes, py::handle dtype) {
    const NetworkValues values = read_network(network);
    const CellInfo* info = find_info(values.options.cell);
    Given given;
    OptionalTensor sizes;
    if (!info || !given.read(*info, input, hx, params, dtype)) return py::none();
    if (!batch_sizes.is_none()) {
        if (!is_ordinary_tensor(batch_sizes.ptr())) return py::none();
        sizes = THPVariable_Unpack(batch_sizes.ptr());
    }
    const auto r = run({values.options, given.x, given.h0, given.c0, given.weights, sizes},
                       values.train, values.recompute);
    return r ? results(*info, *r, /*states_in_a_tuple=*/false) : py::none();
}

// A step of rows [B, I] or of one [I], from states of the same form: the new h, or (h, c), or None.
py::object run_step(const std::string& cell, const CellInfo& info, const Tensor& x,
                    const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                    bool has_biases) {
    if (x.dim() < 1 || x.dim() > 2 || h0.dim() != x.dim() || (c0 && c0->dim() != x.dim()))
        return py::none();
    const Options options{.cell = cell, .has_biases = has_biases, .num_layers = 1};
    const OptionalTensor no_batch_sizes, c0_step = c0 ? OptionalTensor(as_step(*c0)) : c0;
    const Arguments arguments{options, x, h0, c0, weights, no_batch_sizes};
    const bool differentiable = needs_gradient(arguments);
    auto r = computed({options, as_step(x), as_step(h0), c0_step, weights, no_batch_sizes},
                      /*train=*/false, differentiable ? Keep::gates : Keep::nothing,
                      /*states_alone=*/true);
    if (!r) return py::none();
    // New tensors, nobody else's. No views to autograd, as torch's cells return none.
    for (Tensor* t : {&r->h_n, &r->c_n})
        if (t->defined()) t->unsafeGetTensorImpl()->set_sizes_contiguous(h0.sizes());
    if (differentiable) {
        r->output.reset();
        attach_backward(arguments, *r);
    }
    if (!info.has_c) return wrap(r->h_n);
    return py::make_tuple(wrap(r->h_n), wrap(r->c_n));
}

// torch.lstm_cell and its like: the new h, or (h, c), or None.
py::object step(const std::string& cell, py::handle input, py::handle hx, py::handle params,
                py::handle dtype) {
    const CellInfo* info = find_info(cell);
    Given given;
    if (!info || !given.read(*info, input, hx, params, dtype)) return py::none();
    if (given.weights.size() != 2 && given.weights.size() != 4) return py::none();
    return run_step(cell, *info, given.x, given.h0, given.c0, given.weights,
                    given.weights.size() == 4);
}

// The dtype that autocast computes a cell in, or None.
py::object autocast_dtype(const std::string& cell, bool has_c, py::handle input, py::handle hx,
                          const py::tuple& weights) {
    static const py::handle dtypes =
        py::object(py::module_::import("fastrnn.autocast").attr("dtypes")).release();
    const auto states =
        has_c ? py::reinterpret_borrow<py::object>(hx) : py::object(py::make_tuple(hx));
    const auto params = py::reinterpret_steal<py::tuple>(
        PyTuple_GetSlice(weights.ptr(), 0, weights[2].is_none() ? 2 : 4));
    return py::tuple(dtypes(cell, /*padded=*/false, input, states, params))[0];
}

// Reads the weights of a cell from its parameters; bias may be None in both places. False if one is
// something else, or not ordinary.
bool read_parameters(PyObject* parameters, WeightList& weights) {
    PyObject* found_in[4];
    for (size_t i = 0; i < 4; ++i) found_in[i] = found(parameters, *names().of_a_cell[i]);
    const size_t count = found_in[2] == Py_None && found_in[3] == Py_None ? 2 : 4;
    for (size_t i = 0; i < count; ++i) {
        if (!is_ordinary_tensor(found_in[i])) return false;
        weights.push_back(THPVariable_Unpack(found_in[i]));
    }
    return true;
}

// RNNCell, LSTMCell or GRUCell: the new h, or (h, c), or None.
py::object one_step(const std::string& cell, py::handle module, py::handle input, py::object hx) {
    const CellInfo* info = find_info(cell);
    const Names& name = names();
    Attributes attributes(module);
    if (!info || info->c_states > 1 || info->vectors > 0 || !only_default_keys_active() ||
        !is_ordinary_tensor(input.ptr()))
        return py::none();
    const auto parameters = py::reinterpret_borrow<py::object>(attributes.get(name.parameters));
    const int64_t inputs = attributes.number(name.input_size),
                  hidden = attributes.number(name.hidden_size);
    if (!attributes.complete() || !PyDict_Check(parameters.ptr())) return py::none();
    const Tensor& x = THPVariable_Unpack(input.ptr());
    if (x.dim() < 1 || x.dim() > 2 || x.size(-1) != inputs) return py::none();
    at::DimVector size(x.sizes());
    size.back() = hidden;
    Tensor h0;
    OptionalTensor c0;
    if (hx.is_none()) {
        h0 = at::zeros(size, x.options());
        if (info->has_c) c0 = h0;
    } else if (!read_states(hx, info->has_c, h0, c0) || h0.sizes() != size ||
               (c0 && c0->sizes() != size)) {
        return py::none();
    }
    WeightList parameters_alone;
    if (!autocast_enabled() && read_parameters(parameters.ptr(), parameters_alone))
        return run_step(cell, *info, x, h0, c0, parameters_alone, parameters_alone.size() == 4);
    if (hx.is_none()) {
        const py::object zeros = wrap(h0);
        hx = info->has_c ? py::make_tuple(zeros, zeros) : zeros;
    }
    // A weight that is no parameter is an attribute. Where it is parametrized, reading it runs the
    // user's code: last, as in torch's forward, and once, so the call can't start again.
    py::tuple weights(4);
    bool ordinary = true, were_computed = false;
    size_t i = 0;
    for (const Name* one : names().of_a_cell) {
        auto weight = py::reinterpret_borrow<py::object>(found(parameters.ptr(), *one));
        if (!weight) {
            weight = py::reinterpret_steal<py::object>(PyObject_GetAttr(module.ptr(), one->object));
            if (!weight) throw py::error_already_set();
            were_computed = true;
        }
        ordinary = ordinary && (weight.is_none() ? i > 1 : is_ordinary_tensor(weight.ptr()));
        weights[i++] = std::move(weight);
    }
    if (ordinary) {
        const py::object dtype =
            autocast_enabled() ? autocast_dtype(cell, info->has_c, input, hx, weights) : py::none();
        py::object result = step(cell, input, hx, weights, dtype);
        if (!result.is_none()) return result;
    }
    if (!were_computed) return py::none();
    return py::module_::import("fastrnn.functional").attr("call_cell")(cell, input, hx, weights);
}

// What torch.overrides.handle_torch_function does for an active function mode.
py::object call_mode(py::handle function, const py::tuple& args, const py::dict& kwargs) {
    return py::reinterpret_steal<py::object>(torch::handle_torch_function_no_python_arg_parser(
        {}, args.ptr(), kwargs.ptr(),
        py::str(function.attr("__name__")).cast<std::string>().c_str(), function.ptr(),
        "fastrnn.functional"));
}

}  // namespace

NetworkValues read_network(const py::tuple& network) {
    NetworkValues values{};
    values.options.cell = network[0].cast<std::string>();
    size_t i = 1;
    for_each_option(values.options, [&](const char*, auto& value) {
        value = network[i++].cast<std::decay_t<decltype(value)>>();
    });
    values.train = network[i++].cast<bool>();
    values.recompute = network[i].cast<bool>();
    return values;
}

void bind_fast_path(py::module_& module) {
    module.def("layer", torch::wrap_pybind_function(layer), py::arg("cell"), py::arg("module"),
               py::arg("input"), py::arg("hx"), py::arg("return_states") = false,
               py::arg("events") = py::none(),
               "layer(cell, module, input, hx, return_states, events): a layer's forward, or None "
               "where the operators are needed. events: [T, B] uint8 of csrc/layer.h's Event.");
    module.def("cell", torch::wrap_pybind_function(one_step),
               "cell(cell, module, input, hx): a cell's forward, or None where the operators are "
               "needed.");
    module.def("network", torch::wrap_pybind_function(network),
               "The arguments of torch.lstm and its like -> their results, or None where the "
               "operators are needed.");
    module.def("step", torch::wrap_pybind_function(step),
               "step(cell, input, hx, params, dtype): a step of torch.lstm_cell and its like, or "
               "None where "
               "the operators are needed.");
    module.def(
        "call_mode", torch::wrap_pybind_function(call_mode),
        "call_mode(function, args, kwargs): a call of a function of fastrnn.functional by the "
        "active function mode.");
    module.def("autocast_to", torch::wrap_pybind_function(all_autocast_to),
               "Tensors in the dtype that autocast gives them, from its cache of weights.");
}

}  // namespace fastrnn
