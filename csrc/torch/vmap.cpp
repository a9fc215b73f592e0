// vmap of the operators: that of torch.func, and the legacy vmap of
// torch.autograd.grad(is_grads_batched=True) and torch.autograd.functional's vectorize=True. The
// operator is called once. A vmapped dimension of the inputs is folded into the batch. If the
// weights have it, or if each sample has its own gradients of the weights, it becomes the
// operator's dimension of models (models.h).
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

#include "legacy_vmap.h"
#include "schema.h"

namespace fastrnn {
namespace {

namespace py = pybind11;
using at::Tensor;
using c10::SymInt;
using Tensors = std::vector<Tensor>;
using BatchedList = std::vector<Batched>;

// The size of the vmapped dimension, if any tensor of the lists has it.
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

// The innermost vmap of torch.func. Read through Python, because torch's header for it includes one
// that torch does not ship.
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

// ---- placing the samples

// The samples of a vmap, and the place of their dimension in a call of the operator.
class Samples {
public:
    Samples(const SymInt& count, const BatchedList& weights, const Batched& batch_sizes)
        : count_(count),
          of_models_(!weights.empty() && weights[0].tensor.dim() - weights[0].dim.has_value() == 3),
          axes_{of_models_ + !is_packed(batch_sizes), of_models_ + 1, of_models_ + 1},
          axes_kept_{of_models_ + 1, of_models_ + 2, of_models_ + 2, of_models_ + 1} {}

    // Folded into the batch, with the samples of a row adjacent: in packed data the rows of a step
    // stay the first ones.
    Tensors folded(const BatchedList& list) const { return folded(list, axes_); }
    Tensors folded_kept(const BatchedList& list) const { return folded(list, axes_kept_); }
    // The batch sizes of packed data, or the events [T, B] of padded input.
    OptionalTensor folded(const Batched& batch_sizes) const {
        if (!batch_sizes.tensor.defined()) return std::nullopt;
        if (is_packed(batch_sizes)) return batch_sizes.tensor.mul(at::Scalar(count_));
        return folded({batch_sizes},
                      {batch_sizes.tensor.dim() - batch_sizes.dim.has_value() - 1})[0];
    }
    OptionalTensor as_models_or_shared(const Batched& batch_sizes) const {
        if (!batch_sizes.dim) return optional(batch_sizes.tensor);
        return as_models(batch_sizes);
    }
    // The inverse, for three results, or for those and the saved tensors.
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

    // As models: in front, or, in a vmap over vmap, folded into the dimension of models.
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
    // The inverse.
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
    static bool is_packed(const Batched& batch_sizes) {
        return batch_sizes.tensor.defined() &&
               batch_sizes.tensor.dim() - batch_sizes.dim.has_value() < 2;
    }
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
    // Of the batch: in input, h0, c0 as in output, h_n, c_n; in hidden, saved, c and the
    // dropout mask.
    std::vector<int64_t> axes_, axes_kept_;
};

// ---- forward

// A call whose tensors may have the dimension of samples.
struct Forward {
    const ForwardCall& call_;
    Batched batch_sizes;      // undefined if there are none
    BatchedList in, weights;  // input, h0, c0

    Tensors call(const Tensors& in, const Tensors& weights,
                 const OptionalTensor& batch_sizes) const {
        ForwardCall call = call_;
        call.input = in[0], call.h0 = in[1], call.c0 = optional(in[2]);
        call.weights = weights;
        call.batch_sizes = batch_sizes;
        const ForwardResult r = call();
        return {r.output, r.h_n, r.c_n, r.hidden, r.saved, r.c, r.dropout_mask};
    }
};

// Restores the states of the random generators at its end.
class RestoredGenerators {
public:
    explicit RestoredGenerators(at::Device device) {
        add(at::kCPU);
        if (!device.is_cpu()) add(device);
    }
    ~RestoredGenerators() {
        for (auto& [generator, state] : before_) {
            const std::lock_guard<std::mutex> lock(generator.mutex());
            generator.set_state(state);
        }
    }
    RestoredGenerators(const RestoredGenerators&) = delete;

private:
    void add(at::Device device) {
        at::Generator generator = at::globalContext().defaultGenerator(device);
        const std::lock_guard<std::mutex> lock(generator.mutex());
        before_.emplace_back(generator, generator.get_state());
    }

    std::vector<std::pair<at::Generator, Tensor>> before_;
};

// A call for each sample, stacked. All but the last restore the generators: each draws the same
// masks.
BatchedList with_the_same_masks(const Forward& f, int64_t count) {
    std::vector<Tensors> of_all;
    for (int64_t v = 0; v < count; ++v) {
        std::optional<RestoredGenerators> restored;
        if (v + 1 < count) restored.emplace(f.in[0].tensor.device());
        const auto of = [v](const BatchedList& list) {
            Tensors result;
            for (const Batched& b : list) result.push_back(b.of_sample(v));
            return result;
        };
        const Tensors one = f.call(of(f.in), of(f.weights), optional(of({f.batch_sizes})[0]));
        of_all.resize(one.size());
        for (size_t i = 0; i < one.size(); ++i) of_all[i].push_back(one[i]);
    }
    BatchedList result;
    for (const Tensors& list : of_all) result.push_back({at::stack(list), 0});
    return result;
}

// The seven results of `forward`.
BatchedList results_of(const Forward& f, const SymInt& count, const Level& level) {
    if (f.call_.train && f.call_.options.dropout > 0 && f.call_.options.num_layers > 1) {
        const std::string randomness = level.randomness();
        TORCH_CHECK(randomness != "Error",
                    "vmap: called random operation while in randomness error mode. Please either "
                    "use the 'same' or 'different' randomness flags on vmap or perform the "
                    "randomness operation out of vmap");
        if (randomness == "Same")
            return with_the_same_masks(f, count.guard_int(__FILE__, __LINE__));
    }
    const Samples samples(count, f.weights, f.batch_sizes);
    if (count_of({&f.weights}))
        return samples.of_models(f.call(samples.as_models(f.in), samples.as_models(f.weights),
                                        samples.as_models_or_shared(f.batch_sizes)));
    return samples.unfolded(
        f.call(samples.folded(f.in), tensors_of(f.weights), samples.folded(f.batch_sizes)));
}

// ---- backward

struct Backward {
    const BackwardCall& call_;
    Batched batch_sizes;
    BatchedList grads, in, weights, kept;  // of output, h_n, c_n; input, h0, c0; hidden, saved, ...

    // The gradients of input, h0, c0, and those of the weights.
    std::pair<Tensors, Tensors> call(const Tensors& grads, const Tensors& in,
                                     const Tensors& weights, const OptionalTensor& batch_sizes,
                                     const Tensors& kept) const {
        BackwardCall call = call_;
        call.grad_output = optional(grads[0]), call.grad_h_n = optional(grads[1]),
        call.grad_c_n = optional(grads[2]);
        call.input = in[0], call.h0 = in[1], call.c0 = optional(in[2]);
        call.weights = weights;
        call.batch_sizes = batch_sizes;
        call.hidden = kept[0], call.saved = kept[1], call.c = kept[2], call.dropout_mask = kept[3];
        auto [grad_input, grad_h0, grad_c0, grad_weights] = call();
        return {{grad_input, grad_h0, grad_c0}, std::move(grad_weights)};
    }
};

std::pair<BatchedList, BatchedList> gradients_of(const Backward& b, const SymInt& count) {
    const Samples samples(count, b.weights, b.batch_sizes);
    bool of_weights = count_of({&b.weights}).has_value();
    for (size_t i = 3; i < b.call_.wanted.size(); ++i) of_weights |= b.call_.wanted[i];
    if (of_weights) {
        const auto [of_in, of_all] = b.call(
            samples.as_models(b.grads), samples.as_models(b.in), samples.as_models(b.weights),
            samples.as_models_or_shared(b.batch_sizes), samples.kept_as_models(b.kept));
        return {samples.of_models(of_in), samples.of_models(of_all)};
    }
    const auto [of_in, none] =
        b.call(samples.folded(b.grads), samples.folded(b.in), tensors_of(b.weights),
               samples.folded(b.batch_sizes), samples.folded_kept(b.kept));
    BatchedList of_weights_unwanted;
    for (const Tensor& t : none) of_weights_unwanted.push_back({t});
    return {samples.unfolded(of_in), std::move(of_weights_unwanted)};
}

// ---- the rules

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

// In C++: torch.library.register_vmap, or any Python, takes longer than a step of eight models.

void forward(const c10::OperatorHandle&, Stack* stack) {
    const ForwardCall call = ForwardCall::pop(*stack);
    const Level level;
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::FuncTorchBatched);
    const Forward f{call, level.unwrapped(tensor(call.batch_sizes)),
                    unwrapped(level, {call.input, call.h0, tensor(call.c0)}),
                    unwrapped(level, call.weights)};
    const BatchedList sizes = {f.batch_sizes};
    const auto count = count_of({&f.in, &f.weights, &sizes});
    const Tensors r =
        count ? wrapped(level, results_of(f, *count, level))
              : f.call(tensors_of(f.in), tensors_of(f.weights), optional(f.batch_sizes.tensor));
    for (const Tensor& t : r) stack->emplace_back(t);
}

// Backward under either vmap.
template <class Of>
void backward_at(const Of& level, const BackwardCall& call, Stack& stack) {
    const Backward b{
        call,
        level.unwrapped(tensor(call.batch_sizes)),
        unwrapped(level, {tensor(call.grad_output), tensor(call.grad_h_n), tensor(call.grad_c_n)}),
        unwrapped(level, {call.input, call.h0, tensor(call.c0)}),
        unwrapped(level, call.weights),
        unwrapped(level, {call.hidden, call.saved, call.c, call.dropout_mask})};
    const BatchedList sizes = {b.batch_sizes};
    const auto count = count_of({&b.grads, &b.in, &b.weights, &b.kept, &sizes});
    auto [of_in, of_weights] = [&]() -> std::pair<Tensors, Tensors> {
        if (!count)
            return b.call(tensors_of(b.grads), tensors_of(b.in), tensors_of(b.weights),
                          optional(b.batch_sizes.tensor), tensors_of(b.kept));
        const auto [first, second] = gradients_of(b, *count);
        return {wrapped(level, first), wrapped(level, second)};
    }();
    push(stack, BackwardResult{of_in[0], of_in[1], of_in[2], std::move(of_weights)});
}

void backward(const c10::OperatorHandle&, Stack* stack) {
    const BackwardCall call = BackwardCall::pop(*stack);
    const Level level;
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::FuncTorchBatched);
    backward_at(level, call, *stack);
}

void backward_in_legacy_vmap(const c10::OperatorHandle&, Stack* stack) {
    const BackwardCall call = BackwardCall::pop(*stack);
    Tensors all = call.weights;
    for (const OptionalTensor* t : {&call.grad_output, &call.grad_h_n, &call.grad_c_n, &call.c0})
        all.push_back(tensor(*t));
    for (const Tensor* t :
         {&call.input, &call.h0, &call.hidden, &call.saved, &call.c, &call.dropout_mask})
        all.push_back(*t);
    backward_at(LegacyLevel(all), call, *stack);
}

TORCH_LIBRARY_IMPL(fastrnn, FuncTorchBatched, m) {
    m.impl("forward", torch::CppFunction::makeFromBoxedFunction<&forward>());
    m.impl("backward", torch::CppFunction::makeFromBoxedFunction<&backward>());
}

TORCH_LIBRARY_IMPL(fastrnn, Batched, m) {
    m.impl("backward", torch::CppFunction::makeFromBoxedFunction<&backward_in_legacy_vmap>());
}

}  // namespace
}  // namespace fastrnn
