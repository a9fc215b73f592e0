#include "network.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/zeros.h>

#include "../cpu/fork.h"
#include "../cpu/memory.h"
#include "../cpu/run.h"
#ifdef FASTRNN_HAS_CUDA
#include "cuda/run.h"
#endif

namespace fastrnn {

using at::Tensor;

namespace {

const Device& device_at(at::Device device) {
    if (device.is_cpu()) return cpu::device;
#ifdef FASTRNN_HAS_CUDA
    if (device.is_cuda()) return cuda::device;
#endif
    TORCH_CHECK_NOT_IMPLEMENTED(
        !device.is_cuda(), "fastrnn has no kernels for device ", device,
        " in this build (" FASTRNN_CUDA_NOTE
        "); build it with FASTRNN_CUDA=1 pip install --no-build-isolation -e .");
    TORCH_CHECK_NOT_IMPLEMENTED(false, "fastrnn has no kernels for device ", device,
                                ", expected tensors on the CPU or a CUDA device");
}

}  // namespace

bool has_kernels(const Problem& p) {
    return device_at(p.device).has_kernels(p.cell_index, p.storage);
}

const Device& device_for(const Problem& p) {
    const Device& device = device_at(p.device);
    TORCH_CHECK_NOT_IMPLEMENTED(device.has_kernels(p.cell_index, p.storage), "fastrnn: the cell ",
                                p.cell.name, " was not compiled for ", p.dtype, " on ", p.device,
                                "; its definition's build() does that");
    return device;
}

int cpu_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void without_lost_threads() {
    if (cpu::lost_threads() && at::get_num_threads() > 1) at::set_num_threads(1);
}

Rows::Rows(const Arguments& a, const Problem& p)
    : batch_sizes(p.steps, p.batch), offsets(p.steps + 1, 0) {
    if (a.packed()) {
        const Tensor list = a.batch_sizes->contiguous();
        batch_sizes.assign(list.const_data_ptr<int64_t>(),
                           list.const_data_ptr<int64_t>() + p.steps);
    }
    for (int64_t t = 0; t < p.steps; ++t) offsets[t + 1] = offsets[t] + batch_sizes[t];
    sequence = {p.steps, p.batch, batch_sizes.data(), offsets.data(), nullptr, nullptr};
    if (!a.has_events()) return;
    events = a.batch_sizes->contiguous();
    zeros = at::zeros({std::max(p.recurrent, p.cell.c_states * p.hidden)},
                      a.input.options().memory_format(std::nullopt));
    sequence.events = events.const_data_ptr<uint8_t>();
    sequence.zeros = zeros.const_data_ptr();
}

Tensor mask_of(const Tensor& masks, int64_t layer) {
    return layer > 0 && masks.defined() && masks.numel() ? masks[layer - 1] : Tensor();
}

Tensor dropped(const Tensor& rows, const Tensor& mask, double dropout) {
    if (!mask.defined()) return rows;
    return rows.mul(mask).mul_(dropout < 1 ? 1 / (1 - dropout) : 0.0);
}

namespace {

at::ScalarType gradient_dtype(const Problem& p) {
    return device_for(p).stores_gradients ? p.dtype : p.arithmetic;
}

std::vector<Tensor> contiguous(at::TensorList tensors) {
    std::vector<Tensor> list;
    list.reserve(tensors.size());
    for (const Tensor& t : tensors) list.push_back(t.contiguous());
    return list;
}

// The initial states, undefined where they are zeros.
std::pair<Tensor, Tensor> contiguous_states(const Arguments& a) {
    return {a.h0.defined() ? a.h0.contiguous() : Tensor(), a.c0 ? a.c0->contiguous() : Tensor()};
}

// Where t[i] begins, of a contiguous tensor; null if t is undefined or empty.
const char* const_slice(const Tensor& t, int64_t i) {
    if (!t.defined() || t.numel() == 0) return nullptr;
    return static_cast<const char*>(t.const_data_ptr()) + i * t.stride(0) * t.element_size();
}

char* mutable_slice(const Tensor& t, int64_t i) {
    if (!t.defined() || t.numel() == 0) return nullptr;
    return static_cast<char*>(t.mutable_data_ptr()) + i * t.stride(0) * t.element_size();
}

// Where t[i][j] begins.
const char* const_slice(const Tensor& t, int64_t i, int64_t j) {
    const char* first = const_slice(t, i);
    return first ? first + j * t.stride(1) * t.element_size() : nullptr;
}

char* mutable_slice(const Tensor& t, int64_t i, int64_t j) {
    char* first = mutable_slice(t, i);
    return first ? first + j * t.stride(1) * t.element_size() : nullptr;
}

// The index of a cell's vectors among the weights of a layer and direction.
int first_vector(const Problem& p) { return p.has_biases ? 4 : 2; }

Weights weights_of(const Problem& p, const std::vector<Tensor>& all, int64_t layer,
                   int64_t direction) {
    const Tensor* w = all.data() + (layer * p.directions + direction) * p.weights_per_layer;
    Weights result{.ih = w[0].const_data_ptr(), .hh = w[1].const_data_ptr()};
    if (p.has_biases) {
        result.bias_ih = w[2].const_data_ptr();
        result.bias_hh = w[3].const_data_ptr();
    }
    if (p.projected) result.hr = w[p.weights_per_layer - 1].const_data_ptr();
    for (int i = 0; i < p.cell.vectors; ++i)
        result.vectors[i] = w[first_vector(p) + i].const_data_ptr();
    return result;
}

Dimensions dimensions_of(const Problem& p, int64_t layer) {
    return {p.layer_input(layer), p.hidden, p.recurrent, p.projected,
            static_cast<int>(p.directions)};
}

// Draws a dropout mask from the generator that torch's layer draws from on this device.
void draw(Tensor mask, double dropout, const at::TensorOptions& options) {
    if (dropout == 1)
        mask.zero_();
    else if (mask.is_cpu())
        mask.bernoulli_(1 - dropout);
    else
        mask.copy_(
            std::get<1>(at::native_dropout(at::empty(mask.sizes(), options), dropout, true)));
}

Tensor allocate(at::IntArrayRef size, const at::TensorOptions& options) {
    const Tensor t = at::empty(size, options);
    if (t.is_cpu()) cpu::use_huge_pages(t.mutable_data_ptr(), t.nbytes(), cpu_threads());
    return t;
}

cpu::Block new_block(size_t bytes) {
    const Tensor t = at::empty({static_cast<int64_t>(bytes)}, at::kByte);
    return {t.mutable_data_ptr(), [t](void*) {}};
}

// Tensors that live about equally long, on the CPU in one block of `least` bytes or more.
std::vector<Tensor> allocate_together(const std::vector<at::DimVector>& sizes, int64_t least,
                                      const at::TensorOptions& options) {
    std::vector<Tensor> tensors;
    if (!options.device().is_cpu()) {
        for (const at::DimVector& size : sizes) tensors.push_back(at::empty(size, options));
        return tensors;
    }
    std::vector<size_t> offsets;
    for (const at::DimVector& size : sizes)
        offsets.push_back(c10::multiply_integers(size) * options.dtype().itemsize());
    const size_t bytes = cpu::place_together(offsets, least);
    const cpu::Block block = cpu::allocate_block(bytes, cpu_threads(), new_block);
    for (size_t i = 0; i < sizes.size(); ++i)
        tensors.push_back(at::for_blob(static_cast<char*>(block.get()) + offsets[i], sizes[i])
                              .deleter([block](void*) {})
                              .options(options)
                              .make_tensor());
    return tensors;
}

Layer layer_of(const Problem& p, const Sequence& sequence, int64_t layer) {
    return {.cell = p.cell_index,
            .storage = p.storage,
            .device_index = p.device.index(),
            .threads = cpu_threads(),
            .sequence = sequence,
            .size = dimensions_of(p, layer)};
}

// A layer's sizes and inputs. The caller sets where its results are written.
ForwardLayer forward_layer(const Problem& p, const Sequence& sequence,
                           const std::vector<Tensor>& weights, const Tensor& input,
                           const Tensor& h0, const Tensor& c0, int64_t layer) {
    ForwardLayer task{layer_of(p, sequence, layer)};
    task.input = input.const_data_ptr();
    task.output_stride = p.directions * p.recurrent;
    task.c_stride = p.cell.c_states * p.hidden;
    for (int64_t d = 0; d < p.directions; ++d) {
        const int64_t state = layer * p.directions + d;
        task.direction[d].weights = weights_of(p, weights, layer, d);
        task.direction[d].h0 = const_slice(h0, state);
        task.direction[d].c0 = const_slice(c0, state);
    }
    return task;
}

// Recomputes `saved` and `c` of both directions of a layer, which forward did not save.
struct Gates {
    Tensor saved, c;

    Gates(const Device& device, const Problem& p, ForwardLayer task,
          const at::TensorOptions& options) {
        const std::vector<Tensor> made =
            allocate_together({{p.directions, p.rows, p.cell.saved * p.hidden},
                               {p.directions, p.rows, p.cell.c_states * p.hidden}},
                              0, options);
        saved = made[0], c = made[1];
        // The other results are known.
        const Tensor output = at::empty({p.rows, p.directions * p.recurrent}, options),
                     h_n = at::empty({p.directions, p.batch, p.recurrent}, options),
                     c_n = at::empty({p.directions, p.batch, p.cell.c_states * p.hidden}, options);
        for (int64_t d = 0; d < p.directions; ++d) {
            ForwardDirection& direction = task.direction[d];
            direction.h_n = mutable_slice(h_n, d);
            direction.c_n = mutable_slice(c_n, d);
            direction.output = mutable_slice(output, 0) + d * p.recurrent * output.element_size();
            direction.saved = mutable_slice(saved, d);
            direction.c = mutable_slice(c, d);
        }
        device.forward(task);
    }
};

}  // namespace

ForwardResult results_of(const Arguments& a, const Problem& p, bool train, Keep keep,
                         at::IntArrayRef models) {
    device_for(p);  // whether there is one, before anything is made on it
    const int64_t width = p.directions * p.recurrent, states = p.layers * p.directions;
    const auto options = a.input.options().memory_format(std::nullopt);
    const auto size = [&](at::IntArrayRef of_one) {
        at::DimVector all(models);
        all.append(of_one.begin(), of_one.end());
        return all;
    };

    ForwardResult r;
    r.output = a.packed() ? allocate(size({p.rows, p.width}), options)
                          : allocate(size({p.steps, p.batch, p.width}), options);
    r.h_n = at::empty(size({states, p.batch, p.recurrent}), options);
    if (p.cell.has_c)
        r.c_n = at::empty(size({states, p.batch, p.cell.c_states * p.hidden}), options);
    const int64_t between = p.layers - (keep == Keep::nothing ? 1 : 0);
    const at::DimVector hidden = size({between, p.rows, width});
    if (keep == Keep::gates) {
        const auto gates = [&](int64_t values) {
            return size({p.layers, p.directions, p.rows, values});
        };
        const std::vector<Tensor> kept = allocate_together(
            {hidden, gates(p.cell.saved * p.hidden), gates(p.cell.c_states * p.hidden)},
            4 * r.output.nbytes(), options);
        r.hidden = kept[0], r.saved = kept[1], r.c = kept[2];
    } else if (between > 0) {
        r.hidden = allocate(hidden, options);
    }
    if (keep == Keep::outputs) {
        r.saved = at::empty({0}, options);
        r.c = at::empty({0}, options);
    }
    if (train && a.options.dropout > 0 && p.layers > 1) {
        r.dropout_mask = at::empty(size({p.layers - 1, p.rows, width}), options.dtype(at::kByte));
        // Layer by layer, as torch draws them: the same seed gives the same masks. torch draws
        // nothing for 1.
        const int64_t count = c10::multiply_integers(models) * (p.layers - 1);
        const Tensor masks = r.dropout_mask.view({count, p.rows, width});
        for (int64_t i = 0; i < count; ++i) draw(masks[i], a.options.dropout, options);
    } else if (keep != Keep::nothing) {
        r.dropout_mask = at::empty({0}, options.dtype(at::kByte));
    }
    return r;
}

void forward(const Arguments& a, const Problem& p, Keep keep, const ForwardResult& r) {
    if (p.batch == 0) return;
    const Device& device = device_for(p);
    const Rows rows(a, p);
    const std::vector<Tensor> weights = contiguous(a.weights);
    const auto [h0, c0] = contiguous_states(a);
    Tensor input = a.input.contiguous();
    const bool returns_c = a.options.return_states && p.cell.has_c;
    //     a row of the output:   h of the directions | c of the first | c of the second
    const int64_t width = p.directions * p.recurrent, C = p.cell.c_states * p.hidden;
    for (int64_t layer = 0; layer < p.layers; ++layer) {
        if (layer > 0)
            input = dropped(r.hidden[layer - 1], mask_of(r.dropout_mask, layer), a.options.dropout);
        const bool is_last = layer + 1 == p.layers, to_output = is_last && keep == Keep::nothing;
        char* out = to_output ? mutable_slice(r.output, 0) : mutable_slice(r.hidden, layer);
        ForwardLayer task = forward_layer(p, rows.sequence, weights, input, h0, c0, layer);
        if (to_output) task.output_stride = p.width;
        const bool c_to_output = is_last && returns_c && keep != Keep::gates;
        if (c_to_output) task.c_stride = p.width;
        for (int64_t d = 0; d < p.directions; ++d) {
            const int64_t state = layer * p.directions + d;
            ForwardDirection& direction = task.direction[d];
            direction.h_n = mutable_slice(r.h_n, state);
            direction.c_n = mutable_slice(r.c_n, state);
            const int64_t first = d * p.recurrent * input.element_size();
            direction.output = out + first;
            // The last layer's output is saved, and the user gets a copy, which may be changed.
            if (is_last && !to_output && !returns_c)
                direction.output_copy = mutable_slice(r.output, 0) + first;
            if (keep == Keep::gates) {
                direction.saved = mutable_slice(r.saved, layer, d);
                direction.c = mutable_slice(r.c, layer, d);
            }
            if (c_to_output)
                direction.c =
                    mutable_slice(r.output, 0) + (width + d * C) * r.output.element_size();
        }
        device.forward(task);
    }
    if (!returns_c) return;
    const Tensor output = r.output.view({p.rows, p.width});
    if (keep != Keep::nothing) output.narrow(1, 0, width).copy_(r.hidden[p.layers - 1]);
    Tensor states = output.narrow(1, width, p.directions * C);
    for (int64_t d = 0; d < p.directions && keep == Keep::gates; ++d)
        states.narrow(1, d * C, C).copy_(r.c[p.layers - 1][d]);
    if (rows.events.defined())
        states.masked_fill_(rows.events.view({p.rows, 1}).eq(int64_t{past_end}), 0);
}

ForwardResult forward(const Arguments& a, const Problem& p, bool train, Keep keep) {
    without_lost_threads();
    ForwardResult r = results_of(a, p, train, keep);
    forward(a, p, keep, r);
    return r;
}

ForwardResult forward_step(const Arguments& a, const Problem& p) {
    if (!device_for(p).output_may_be_h_n) return forward(a, p, /*train=*/false, Keep::nothing);
    without_lost_threads();
    const auto options = a.input.options().memory_format(std::nullopt);
    ForwardResult r;
    r.output = r.h_n = at::empty({1, p.batch, p.recurrent}, options);
    if (p.cell.has_c) r.c_n = at::empty({1, p.batch, p.cell.c_states * p.hidden}, options);
    forward(a, p, Keep::nothing, r);
    return r;
}

BackwardResult gradients_of(const Arguments& a, const Problem& p, const std::vector<bool>& wanted) {
    const auto options = a.input.options().memory_format(std::nullopt).dtype(gradient_dtype(p));
    const auto make = [&](bool yes, const Tensor& like) {
        return yes && like.defined() ? allocate(like.sizes(), options) : Tensor();
    };
    std::vector<Tensor> grad_weights;
    grad_weights.reserve(a.weights.size());
    for (size_t i = 0; i < a.weights.size(); ++i)
        grad_weights.push_back(make(wanted[3 + i], a.weights[i]));
    return {make(wanted[0], a.input), make(wanted[1], a.h0),
            make(wanted[2], a.c0 ? *a.c0 : Tensor()), std::move(grad_weights)};
}

void backward(const Arguments& a, const Problem& p, const Kept& kept,
              const OutputGradients& gradients, const BackwardResult& result) {
    const auto& [grad_input, grad_h0, grad_c0, grad_weights] = result;
    if (p.batch == 0) {
        const auto clear = [](const Tensor& g) {
            if (g.defined()) g.zero_();
        };
        for (const Tensor* g : {&grad_input, &grad_h0, &grad_c0}) clear(*g);
        for (const Tensor& g : grad_weights) clear(g);
        return;
    }
    const Device& device = device_for(p);
    const int64_t width = p.directions * p.recurrent;
    const at::ScalarType dtype = gradient_dtype(p);
    const auto options = a.input.options().memory_format(std::nullopt).dtype(dtype);
    const Rows rows(a, p);
    const std::vector<Tensor> weights = contiguous(a.weights);
    const auto [h0, c0] = contiguous_states(a);
    const Tensor hidden = kept.hidden.contiguous(), saved = kept.saved.contiguous(),
                 c = kept.c.contiguous(), masks = kept.dropout_mask.contiguous();
    const auto prepared = [&](const OptionalTensor& g) {
        return g ? g->to(dtype).contiguous() : Tensor();
    };
    const Tensor grad_h_n = prepared(gradients.h_n), grad_c_n = prepared(gradients.c_n);
    Tensor grad_output = gradients.output ? gradients.output->contiguous() : Tensor();
    const bool returns_c = a.options.return_states && p.cell.has_c;

    for (int64_t layer = p.layers - 1; layer >= 0; --layer) {
        const Tensor mask = mask_of(masks, layer);
        const Tensor input =
            layer > 0 ? dropped(hidden[layer - 1], mask, a.options.dropout) : a.input.contiguous();
        std::optional<Gates> again;
        if (recomputes(kept))
            again.emplace(device, p, forward_layer(p, rows.sequence, weights, input, h0, c0, layer),
                          options.dtype(p.dtype));
        const Tensor grad_below = layer > 0 ? allocate({p.rows, width}, options) : grad_input;
        BackwardLayer task{layer_of(p, rows.sequence, layer)};
        task.input = input.const_data_ptr();
        task.output_stride = width;
        const bool is_last = layer + 1 == p.layers;
        task.grad_output_stride = is_last ? p.width : width;
        task.grad_output_stored = device.stores_gradients || is_last;
        task.grad_input = mutable_slice(grad_below, 0);
        for (int64_t d = 0; d < p.directions; ++d) {
            const int64_t state = layer * p.directions + d;
            BackwardDirection& direction = task.direction[d];
            direction.weights = weights_of(p, weights, layer, d);
            direction.h0 = const_slice(h0, state);
            direction.c0 = const_slice(c0, state);
            direction.output = const_slice(hidden, layer) + d * p.recurrent * hidden.element_size();
            direction.saved = again ? const_slice(again->saved, d) : const_slice(saved, layer, d);
            direction.c = again ? const_slice(again->c, d) : const_slice(c, layer, d);
            if (grad_output.defined())
                direction.grad_output = static_cast<char*>(grad_output.data_ptr()) +
                                        d * p.recurrent * grad_output.element_size();
            if (grad_output.defined() && is_last && returns_c)
                direction.grad_c =
                    static_cast<char*>(grad_output.data_ptr()) +
                    (width + d * p.cell.c_states * p.hidden) * grad_output.element_size();
            direction.grad_h_n = const_slice(grad_h_n, state);
            direction.grad_c_n = const_slice(grad_c_n, state);
            direction.grad_h0 = mutable_slice(grad_h0, state);
            direction.grad_c0 = mutable_slice(grad_c0, state);
            const Tensor* g = grad_weights.data() + state * p.weights_per_layer;
            direction.grads = {
                mutable_slice(g[0], 0), mutable_slice(g[1], 0),
                p.has_biases ? mutable_slice(g[2], 0) : nullptr,
                p.has_biases ? mutable_slice(g[3], 0) : nullptr,
                p.projected ? mutable_slice(g[p.weights_per_layer - 1], 0) : nullptr};
            for (int i = 0; i < p.cell.vectors; ++i)
                direction.grads.vectors[i] = mutable_slice(g[first_vector(p) + i], 0);
        }
        device.backward(task);
        if (layer > 0) grad_output = dropped(grad_below, mask, a.options.dropout);
    }
}

BackwardResult in_their_dtype(const Problem& p, BackwardResult result) {
    if (gradient_dtype(p) == p.dtype) return result;
    const auto round = [&](Tensor& g) {
        if (g.defined()) g = g.to(p.dtype);
    };
    auto& [grad_input, grad_h0, grad_c0, grad_weights] = result;
    for (Tensor* g : {&grad_input, &grad_h0, &grad_c0}) round(*g);
    for (Tensor& g : grad_weights) round(g);
    return result;
}

BackwardResult backward(const Arguments& a, const Problem& p, const Kept& kept,
                        const OutputGradients& gradients, const std::vector<bool>& wanted) {
    without_lost_threads();
    BackwardResult result = gradients_of(a, p, wanted);
    backward(a, p, kept, gradients, result);
    return in_their_dtype(p, std::move(result));
}

std::pair<Facts, Facts> explain(const Arguments& a, const Problem& p, int64_t layer) {
    const Device& device = device_for(p);
    const Rows rows(a, p);
    const Layer of_network = layer_of(p, rows.sequence, layer);
    return {device.explain(of_network, Pass::forward), device.explain(of_network, Pass::backward)};
}

}  // namespace fastrnn
