// vmap of the operators: torch.func's, and the older one of torch.autograd.grad(is_grads_batched=True)
// and torch.autograd.functional's vectorize=True. The operator is called once. A dimension of the
// inputs is folded into the batch. Where weights have it, or where each sample is to have gradients of
// the weights of its own, it becomes the operator's own dimension of models (models.h).
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/stack.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "older_vmap.h"
#include "operators.h"

namespace fastrnn {
namespace {

namespace py = pybind11;
using at::Tensor;
using c10::SymInt;
using Tensors = std::vector<Tensor>;
using BatchedList = std::vector<Batched>;

// How many samples there are, if any tensor of the lists has their dimension.
std::optional<SymInt> count_of(std::initializer_list<const BatchedList*> lists) {
    for (const BatchedList* list : lists)
        for (const Batched& b : *list)
            if (b.dim) return b.tensor.sym_size(*b.dim);
    return std::nullopt;
}

Tensors tensors_of(const BatchedList& list) {
    Tensors result;
    for (const Batched& b : list) result.push_back(b.tensor);
    return result;
}

Tensor expanded(const Tensor& t, int64_t new_axis, const SymInt& size) {
    const Tensor result = t.unsqueeze(new_axis);
    auto sizes = result.sym_sizes().vec();
    sizes[new_axis] = size;
    return result.expand_symint(sizes);
}

// That of torch.func which is the innermost now. torch's headers of it include one that torch does not
// ship, so that Python is asked.
class Level {
public:
    Level() {
        const py::gil_scoped_acquire gil;
        const py::object now = of_python("peek_interpreter_stack")();
        TORCH_CHECK(!now.is_none(),
                    "Either your tensor may have escaped from inside a function being vmapped and "
                    "this is a user error (see "
                    "https://pytorch.org/functorch/stable/ux_limitations.html), or there is an "
                    "internal functorch error in `fastrnn` Please file an issue if it looks like "
                    "the latter");
        level_ = now.attr("level")().cast<int64_t>();
    }

    Batched unwrapped(const Tensor& t) const {
        if (const auto* impl = t.defined() ? at::functorch::maybeGetBatchedImpl(t) : nullptr)
            if (impl->level() == level_) return {impl->value(), impl->bdim()};
        return {t};
    }
    Tensor wrapped(const Batched& b) const {
        return b.dim ? at::functorch::makeBatched(b.tensor, *b.dim, level_) : b.tensor;
    }

    // "Error", "Same" or "Different"
    std::string randomness() const {
        const py::gil_scoped_acquire gil;
        const py::object now = of_python("peek_interpreter_stack")();
        return py::str(of_python("CVmapInterpreterPtr")(now).attr("randomness")().attr("name"));
    }

private:
    static py::object of_python(const char* name) {
        return py::module_::import("torch._C._functorch").attr(name);
    }

    int64_t level_;
};

// ---- where the samples go ------------------------------------------------------------------------

// What a network is, beside its tensors.
struct Network {
    std::string cell;
    OptionalTensor batch_sizes;
    bool has_biases;
    int64_t num_layers;
    bool bidirectional;
    double dropout;
};

// The samples of a vmap, and where their dimension goes in a call of the operator.
class Samples {
public:
    Samples(const SymInt& count, const BatchedList& weights, const OptionalTensor& batch_sizes)
        : count_(count),
          of_models_(!weights.empty() && weights[0].tensor.dim() - weights[0].dim.has_value() == 3),
          axes_{of_models_ + !batch_sizes, of_models_ + 1, of_models_ + 1},
          axes_kept_{of_models_ + 1, of_models_ + 2, of_models_ + 2, of_models_ + 1} {}

    // In the batch: those of each of its rows beside each other, so that rows which are alive at a step
    // stay the first ones, in packed data too.
    Tensors folded(const BatchedList& list) const { return folded(list, axes_); }
    Tensors folded_kept(const BatchedList& list) const { return folded(list, axes_kept_); }
    OptionalTensor folded(const OptionalTensor& batch_sizes) const {
        return batch_sizes ? OptionalTensor(batch_sizes->mul(at::Scalar(count_))) : std::nullopt;
    }
    // The way back, of three tensors, or of those and what is kept.
    BatchedList unfolded(const Tensors& list) const {
        BatchedList result;
        for (size_t i = 0; i < list.size(); ++i) {
            const Tensor& t = list[i];
            const int64_t axis = i < axes_.size() ? axes_[i] : axes_kept_[i - axes_.size()];
            if (t.dim() == 1)
                result.push_back({t});
            else
                result.push_back(
                    {t.unflatten_symint(axis, {t.sym_size(axis) / count_, count_}), axis + 1});
        }
        return result;
    }

    // As models: in front, or, in a vmap over vmap, in the dimension of models that is there already.
    Tensors as_models(const BatchedList& list) const {
        Tensors result;
        for (const Batched& b : list) result.push_back(as_models(b));
        return result;
    }
    Tensors kept_as_models(const BatchedList& list) const {
        Tensors result;
        for (const Batched& b : list)
            result.push_back(b.is_empty() ? b.of_sample(0) : as_models(b));
        return result;
    }
    // The way back.
    BatchedList of_models(const Tensors& list) const {
        BatchedList result;
        for (const Tensor& t : list)
            if (t.dim() == 1)
                result.push_back({t});
            else if (of_models_)
                result.push_back({t.unflatten_symint(0, {count_, t.sym_size(0) / count_}), 0});
            else
                result.push_back({t, 0});
        return result;
    }

private:
    Tensor as_models(const Batched& b) const {
        if (!b.tensor.defined()) return b.tensor;
        const Tensor in_front = b.dim ? b.tensor.movedim(*b.dim, 0) : expanded(b.tensor, 0, count_);
        return of_models_ ? in_front.flatten(0, 1) : in_front;
    }
    Tensors folded(const BatchedList& list, const std::vector<int64_t>& axes) const {
        Tensors result;
        for (size_t i = 0; i < list.size(); ++i) {
            const Batched& b = list[i];
            if (b.is_empty()) {
                result.push_back(b.of_sample(0));
                continue;
            }
            const int64_t axis = axes[i];
            const Tensor apart =
                b.dim ? b.tensor.movedim(*b.dim, axis + 1) : expanded(b.tensor, axis + 1, count_);
            result.push_back(apart.flatten(axis, axis + 1));
        }
        return result;
    }

    SymInt count_;
    bool of_models_;  // whether each sample's weights are those of several models
    // Of the batch: in input, h0, c0 as in output, h_n, c_n; in hidden, saved, c, noise.
    std::vector<int64_t> axes_, axes_kept_;
};

// ---- forward -------------------------------------------------------------------------------------

struct Forward {
    Network network;
    BatchedList in, weights;  // input, h0, c0
    bool train, keep, recompute;

    Tensors call(const Tensors& in, const Tensors& weights,
                 const OptionalTensor& batch_sizes) const {
        const Network& n = network;
        return std::apply(
            [](const auto&... t) { return Tensors{t...}; },
            forward_operator().call(n.cell, in[0], in[1], optional(in[2]), weights, batch_sizes,
                                    n.has_biases, n.num_layers, n.bidirectional, n.dropout, train,
                                    keep, recompute));
    }
};

// Leaves generators, in the end, as they were.
class Undrawn {
public:
    explicit Undrawn(at::Device device) {
        add(at::kCPU);
        if (!device.is_cpu()) add(device);
    }
    ~Undrawn() {
        for (auto& [generator, state] : before_) {
            const std::lock_guard<std::mutex> lock(generator.mutex());
            generator.set_state(state);
        }
    }
    Undrawn(const Undrawn&) = delete;

private:
    void add(at::Device device) {
        at::Generator generator = at::globalContext().defaultGenerator(device);
        const std::lock_guard<std::mutex> lock(generator.mutex());
        before_.emplace_back(generator, generator.get_state());
    }

    std::vector<std::pair<at::Generator, Tensor>> before_;
};

// A call for each sample, stacked. The numbers of a call are left undrawn, but by the last.
BatchedList with_the_same_masks(const Forward& f, int64_t count) {
    std::vector<Tensors> of_all;
    for (int64_t v = 0; v < count; ++v) {
        std::optional<Undrawn> undrawn;
        if (v + 1 < count) undrawn.emplace(f.in[0].tensor.device());
        const auto of = [v](const BatchedList& list) {
            Tensors result;
            for (const Batched& b : list) result.push_back(b.of_sample(v));
            return result;
        };
        const Tensors one = f.call(of(f.in), of(f.weights), f.network.batch_sizes);
        of_all.resize(one.size());
        for (size_t i = 0; i < one.size(); ++i) of_all[i].push_back(one[i]);
    }
    BatchedList result;
    for (const Tensors& list : of_all) result.push_back({at::stack(list), 0});
    return result;
}

// output, h_n, c_n, hidden, saved, c, noise
BatchedList results_of(const Forward& f, const SymInt& count, const Level& level) {
    const OptionalTensor& batch_sizes = f.network.batch_sizes;
    if (f.train && f.network.dropout > 0 && f.network.num_layers > 1) {
        const std::string randomness = level.randomness();
        TORCH_CHECK(randomness != "Error",
                    "vmap: called random operation while in randomness error mode. Please either "
                    "use the 'same' or 'different' randomness flags on vmap or perform the "
                    "randomness operation out of vmap");
        if (randomness == "Same")
            return with_the_same_masks(f, count.guard_int(__FILE__, __LINE__));
    }
    const Samples samples(count, f.weights, batch_sizes);
    if (count_of({&f.weights}))
        return samples.of_models(
            f.call(samples.as_models(f.in), samples.as_models(f.weights), batch_sizes));
    return samples.unfolded(
        f.call(samples.folded(f.in), tensors_of(f.weights), samples.folded(batch_sizes)));
}

// ---- backward ------------------------------------------------------------------------------------

struct Backward {
    Network network;
    BatchedList grads, in, weights, kept;  // of output, h_n, c_n; input, h0, c0; hidden, saved, ...
    c10::List<bool> wanted;

    // The gradients of input, h0, c0, and those of the weights.
    std::pair<Tensors, Tensors> call(const Tensors& grads, const Tensors& in,
                                     const Tensors& weights, const OptionalTensor& batch_sizes,
                                     const Tensors& kept) const {
        const Network& n = network;
        auto [grad_input, grad_h0, grad_c0, grad_weights] = backward_operator().call(
            n.cell, optional(grads[0]), optional(grads[1]), optional(grads[2]), in[0], in[1],
            optional(in[2]), weights, batch_sizes, n.has_biases, n.num_layers, n.bidirectional,
            n.dropout, kept[0], kept[1], kept[2], kept[3], wanted);
        return {{grad_input, grad_h0, grad_c0}, std::move(grad_weights)};
    }
};

std::pair<BatchedList, BatchedList> gradients_of(const Backward& b, const SymInt& count) {
    const OptionalTensor& batch_sizes = b.network.batch_sizes;
    const Samples samples(count, b.weights, batch_sizes);
    bool of_weights = count_of({&b.weights}).has_value();
    for (size_t i = 3; i < b.wanted.size(); ++i) of_weights |= b.wanted[i];
    if (of_weights) {
        const auto [of_in, of_all] =
            b.call(samples.as_models(b.grads), samples.as_models(b.in),
                   samples.as_models(b.weights), batch_sizes, samples.kept_as_models(b.kept));
        return {samples.of_models(of_in), samples.of_models(of_all)};
    }
    const auto [of_in, none] =
        b.call(samples.folded(b.grads), samples.folded(b.in), tensors_of(b.weights),
               samples.folded(batch_sizes), samples.folded_kept(b.kept));
    BatchedList of_weights_unwanted;
    for (const Tensor& t : none) of_weights_unwanted.push_back({t});
    return {samples.unfolded(of_in), std::move(of_weights_unwanted)};
}

// ---- the rules -----------------------------------------------------------------------------------

template <class Of>
BatchedList unwrapped(const Of& level, at::TensorList list) {
    BatchedList result;
    for (const Tensor& t : list) result.push_back(level.unwrapped(t));
    return result;
}

template <class Of>
Tensors wrapped(const Of& level, const BatchedList& list) {
    Tensors result;
    for (const Batched& b : list) result.push_back(level.wrapped(b));
    return result;
}

// In C++, since torch.library.register_vmap, and Python at all, take longer than eight models of a step.

ForwardTensors forward(const std::string& cell, const Tensor& input, const Tensor& h0,
                       const OptionalTensor& c0, at::TensorList weights,
                       const OptionalTensor& batch_sizes, bool has_biases, int64_t num_layers,
                       bool bidirectional, double dropout, bool train, bool keep, bool recompute) {
    const Level level;
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::FuncTorchBatched);
    const Forward f{{cell, optional(level.unwrapped(tensor(batch_sizes)).tensor), has_biases,
                     num_layers, bidirectional, dropout},
                    unwrapped(level, {input, h0, tensor(c0)}),
                    unwrapped(level, weights),
                    train,
                    keep,
                    recompute};
    const auto count = count_of({&f.in, &f.weights});
    const Tensors r = count
                          ? wrapped(level, results_of(f, *count, level))
                          : f.call(tensors_of(f.in), tensors_of(f.weights), f.network.batch_sizes);
    return {r[0], r[1], r[2], r[3], r[4], r[5], r[6]};
}

// Of either kind: OlderLevel's tensors are all those of one in that vmap.
template <class Of>
BackwardResult backward_at(const Of& level, const std::string& cell, const Tensors& grads,
                           const Tensors& in, at::TensorList weights,
                           const OptionalTensor& batch_sizes, bool has_biases, int64_t num_layers,
                           bool bidirectional, double dropout, const Tensors& kept,
                           const c10::List<bool>& wanted) {
    const Backward b{{cell, optional(level.unwrapped(tensor(batch_sizes)).tensor), has_biases,
                      num_layers, bidirectional, dropout},
                     unwrapped(level, grads),
                     unwrapped(level, in),
                     unwrapped(level, weights),
                     unwrapped(level, kept),
                     wanted};
    const auto count = count_of({&b.grads, &b.in, &b.weights, &b.kept});
    auto [of_in, of_weights] = [&]() -> std::pair<Tensors, Tensors> {
        if (!count)
            return b.call(tensors_of(b.grads), tensors_of(b.in), tensors_of(b.weights),
                          b.network.batch_sizes, tensors_of(b.kept));
        const auto [first, second] = gradients_of(b, *count);
        return {wrapped(level, first), wrapped(level, second)};
    }();
    return {of_in[0], of_in[1], of_in[2], std::move(of_weights)};
}

BackwardResult backward(const std::string& cell, const OptionalTensor& grad_output,
                        const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                        const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                        at::TensorList weights, const OptionalTensor& batch_sizes, bool has_biases,
                        int64_t num_layers, bool bidirectional, double dropout,
                        const Tensor& hidden, const Tensor& saved, const Tensor& c,
                        const Tensor& noise, c10::List<bool> wanted) {
    const Level level;
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::FuncTorchBatched);
    return backward_at(level, cell, {tensor(grad_output), tensor(grad_h_n), tensor(grad_c_n)},
                       {input, h0, tensor(c0)}, weights, batch_sizes, has_biases, num_layers,
                       bidirectional, dropout, {hidden, saved, c, noise}, wanted);
}

BackwardResult backward_in_older_vmap(
    const std::string& cell, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
    at::TensorList weights, const OptionalTensor& batch_sizes, bool has_biases, int64_t num_layers,
    bool bidirectional, double dropout, const Tensor& hidden, const Tensor& saved, const Tensor& c,
    const Tensor& noise, c10::List<bool> wanted) {
    const Tensors grads = {tensor(grad_output), tensor(grad_h_n), tensor(grad_c_n)};
    const Tensors in = {input, h0, tensor(c0)}, kept = {hidden, saved, c, noise};
    Tensors all = weights.vec();
    for (const Tensors* list : {&grads, &in, &kept})
        all.insert(all.end(), list->begin(), list->end());
    return backward_at(OlderLevel(all), cell, grads, in, weights, batch_sizes, has_biases,
                       num_layers, bidirectional, dropout, kept, wanted);
}

TORCH_LIBRARY_IMPL(fastrnn, FuncTorchBatched, m) {
    m.impl("forward", forward);
    m.impl("backward", backward);
}

TORCH_LIBRARY_IMPL(fastrnn, Batched, m) { m.impl("backward", backward_in_older_vmap); }

}  // namespace
}  // namespace fastrnn
