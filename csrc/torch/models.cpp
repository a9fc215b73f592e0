#include "models.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

namespace fastrnn {
namespace {

using at::Tensor;

Tensor part(const Tensor& t, int64_t model) { return t.select(0, model); }

OptionalTensor part(const OptionalTensor& t, int64_t model) {
    return t ? OptionalTensor(part(*t, model)) : std::nullopt;
}

std::vector<Tensor> parts(at::TensorList all, int64_t model) {
    std::vector<Tensor> list;
    for (const Tensor& t : all) list.push_back(part(t, model));
    return list;
}

// A model's slice of a result or saved tensor, which is empty for all models if it is for one.
Tensor part_or_empty(const Tensor& t, int64_t model) {
    return t.defined() && t.dim() > 1 ? part(t, model) : t;
}

// The arguments of one model, and the tensors that they refer to.
struct Model {
    Tensor input, h0;
    OptionalTensor c0;
    std::vector<Tensor> weights;
    OptionalTensor batch_sizes;  // of all models, or events of each
    Arguments arguments;

    Model(const Arguments& all, int64_t model)
        : input(part(all.input, model)),
          h0(part(all.h0, model)),
          c0(part(all.c0, model)),
          weights(parts(all.weights, model)),
          batch_sizes(all.batch_sizes && all.batch_sizes->dim() == 3 ? part(all.batch_sizes, model)
                                                                     : all.batch_sizes),
          arguments{all.options, input, h0, c0, weights, batch_sizes} {}
    Model(const Model&) = delete;
};

// The other arguments of backward, for one model.
struct Given {
    Tensor hidden, saved, c, dropout_mask;
    OptionalTensor output, h_n, c_n;
    Kept kept{hidden, saved, c, dropout_mask};
    OutputGradients gradients{output, h_n, c_n};

    Given(const Kept& k, const OutputGradients& g, int64_t model)
        : hidden(part_or_empty(k.hidden, model)),
          saved(part_or_empty(k.saved, model)),
          c(part_or_empty(k.c, model)),
          dropout_mask(part_or_empty(k.dropout_mask, model)),
          output(part(g.output, model)),
          h_n(part(g.h_n, model)),
          c_n(part(g.c_n, model)) {}
    Given(const Given&) = delete;
};

// Checks the dimension of models, which `check` does not see.
void check_count(const char* name, const Tensor& t, int64_t models) {
    TORCH_CHECK(t.defined(), "fastrnn: the ", name, " tensor is undefined");
    TORCH_CHECK(t.dim() > 0 && t.size(0) == models, "Expected ", name, " of ", models,
                " models, got size ", t.sizes());
}

void check_count(const char* name, const OptionalTensor& t, int64_t models) {
    if (t) check_count(name, *t, models);
}

// How many models there are.
int64_t count(const Arguments& a) {
    const int64_t models = a.weights[0].size(0);
    TORCH_CHECK(models > 0, "Expected weights of at least one model, got size ",
                a.weights[0].sizes());
    check_count("input", a.input, models);
    check_count("hidden", a.h0, models);
    check_count("hidden", a.c0, models);
    for (const Tensor& weight : a.weights) check_count("parameter", weight, models);
    if (a.batch_sizes && a.batch_sizes->dim() == 3) check_count("events", *a.batch_sizes, models);
    return models;
}

void check_counts(const Kept& k, const OutputGradients& g, int64_t models) {
    check_count("grad_output", g.output, models);
    check_count("grad_h_n", g.h_n, models);
    check_count("grad_c_n", g.c_n, models);
    check_count("hidden", k.hidden, models);
    if (!recomputes(k)) {
        check_count("saved", k.saved, models);
        check_count("c", k.c, models);
    }
    if (k.dropout_mask.dim() > 1) check_count("dropout_mask", k.dropout_mask, models);
}

void for_each(const Problem& p, int64_t models, const std::function<void(int64_t)>& run) {
    const auto in_parallel = device_for(p).runs_models_in_parallel;
    const int64_t inputs = p.input + (p.layers - 1) * p.directions * p.recurrent;
    const int64_t gate_rows = p.cell.gates * p.hidden;
    const Models all{
        .count = models,
        .multiply_adds = p.rows * p.directions * gate_rows * (inputs + p.layers * p.recurrent),
        .recurrent_weights = gate_rows * p.recurrent};
    const int threads = cpu_threads();
    // The last models, if they are fewer than the threads, get all of the threads each.
    const int64_t parallel =
        in_parallel && in_parallel(all, threads) ? models / threads * threads : int64_t{0};
    at::parallel_for(0, parallel, parallel / threads, [&](int64_t begin, int64_t end) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;  // dispatch keys are a thread's own
        for (int64_t model = begin; model < end; ++model) run(model);
    });
    for (int64_t model = parallel; model < models; ++model) run(model);
}

}  // namespace

bool are_of_models(at::TensorList weights) {
    return !weights.empty() && weights[0].defined() && weights[0].dim() == 3;
}

ForwardResult forward_models(const Arguments& a, bool train, Keep keep) {
    without_lost_threads();
    const int64_t models = count(a);
    const Problem p = check(Model(a, 0).arguments);
    const ForwardResult all = results_of(a, p, train, keep, models);
    for_each(p, models, [&](int64_t model) {
        const Model own(a, model);
        const auto of = [&](const Tensor& t) { return part_or_empty(t, model); };
        forward(own.arguments, p, keep,
                ForwardResult{of(all.output), of(all.h_n), of(all.c_n), of(all.hidden),
                              of(all.saved), of(all.c), of(all.dropout_mask)});
    });
    return all;
}

BackwardResult backward_models(const Arguments& a, const Kept& kept,
                               const OutputGradients& gradients, const std::vector<bool>& wanted) {
    without_lost_threads();
    const int64_t models = count(a);
    const Model first(a, 0);
    const Problem p = check(first.arguments);
    check_counts(kept, gradients, models);
    const Given of_first(kept, gradients, 0);
    check_kept(first.arguments, p, of_first.kept);
    check_gradients(first.arguments, p, of_first.gradients);
    const BackwardResult all = gradients_of(a, p, wanted);
    for_each(p, models, [&](int64_t model) {
        const Model own(a, model);
        const Given given(kept, gradients, model);
        const auto of = [&](const Tensor& t) { return part_or_empty(t, model); };
        const auto& [grad_input, grad_h0, grad_c0, grad_weights] = all;
        BackwardResult result{of(grad_input), of(grad_h0), of(grad_c0), {}};
        for (const Tensor& t : grad_weights) std::get<3>(result).push_back(of(t));
        backward(own.arguments, p, given.kept, given.gradients, result);
    });
    return in_their_dtype(p, all);
}

}  // namespace fastrnn
