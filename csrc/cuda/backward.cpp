#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "path.h"
#include "run.h"
#include "step.h"
#include "tensors.h"

namespace fastrnn::cuda {
namespace {

// Where the gradient of a state, [B, size] of the arithmetic type, is kept from step to step: the place
// it is wanted in, if that is of this type; else in memory of its own.
struct StateGradient {
    Tensor own;
    void* data = nullptr;

    void start(const Problem& p, int64_t size, void* wanted) {
        if (p.dtype != p.arithmetic || !wanted) own = Matrices(p).arithmetic(p.batch, size);
        data = own.defined() ? own.data_ptr() : wanted;
    }
    void finish(const Problem& p, int64_t size, void* wanted) const {
        if (wanted && own.defined()) Matrices(p).tensor(wanted, {p.batch, size}).copy_(own);
    }
};

// Whether W_ih x + b_ih and W_hh h + b_hh have the same gradients.
bool shared(const Problem& p) { return p.cell.grads == p.cell.gates; }

// Whether h_{t-1} of every row is in the output, B rows away: where all begin together, and from zeros,
// of which W_hh's gradient has nothing.
bool prev_is_output(const Problem& p, const fastrnn::BackwardDirection& user) {
    return !user.h0 && p.rows == p.steps * p.batch;
}

// What a direction works on. N rows of all steps, B batch, G gates, H hidden, R the size of h.
struct BackwardTensors {
    StateGradient dh;    // [B, R]
    StateGradient dc;    // [B, H], of a cell with c
    Tensor dgates;       // [N, stored gradients * H]
    Tensor prev;         // [N, R]: h_{t-1}, if W_hh's gradient is wanted and the output is not it
    Tensor projected;    // [N, P]: dL/dh_t, if there is a projection
    Tensor unprojected;  // [N, H]: h before the projection, if W_hr's gradient is wanted

    BackwardTensors(const Problem& p, const fastrnn::BackwardDirection& user) {
        const Matrices m(p);
        const int64_t N = p.rows, H = p.hidden, R = p.recurrent;
        dh.start(p, R, user.grad_h0);
        if (p.cell.has_c) dc.start(p, H, user.grad_c0);
        dgates = m.stored(N, (shared(p) ? 1 : 2) * p.cell.gates * H);
        if (user.grads.hh && !prev_is_output(p, user)) prev = m.stored(N, R);
        if (p.projected) {
            projected = m.stored(N, R);
            if (user.grads.hr) unprojected = m.stored(N, H);
        }
    }

    BackwardDirection direction(const fastrnn::BackwardDirection& user) const {
        return {user.h0,
                user.c0,
                user.output,
                user.saved,
                user.c,
                user.grad_output,
                user.grad_h_n,
                user.grad_c_n,
                dh.data,
                dc.data,
                dgates.data_ptr(),
                prev.defined() ? prev.data_ptr() : nullptr,
                {}};
    }

    // [N, G * H]: what belongs to W_ih x + b_ih, and to W_hh h + b_hh.
    Matrix of_x(const Problem& p) const {
        return Matrices(p).of(dgates).some_columns(0, p.cell.gates * p.hidden);
    }
    Matrix of_h(const Problem& p) const {
        return Matrices(p).of(dgates).some_columns(shared(p) ? 0 : p.cell.gates * p.hidden,
                                                   p.cell.gates * p.hidden);
    }
};

// What a direction's steps multiply.
struct BackwardMatrices {
    Matrix dgates;     // [N, G * H]: of_h
    Matrix hh;         // W_hh [G * H, R]
    Matrix r;          // [B, R]: dgates of the step handled before, times W_hh
    Matrix projected;  // [N, P]: dL/dh_t, if there is a projection; and then
    Matrix hr;         // W_hr [P, H],
    Matrix dh;         // [B, H]: dL/dh_t before the projection
};

// Where the steps of a direction add up the gradients of its biases.
struct BiasMemory {
    Tensor sums, done;
    BiasGradients gradients{};

    BiasMemory(const Problem& p, const WeightGradients& wanted, cudaStream_t stream) {
        if (!wanted.bias_ih && !wanted.bias_hh) return;
        const int64_t blocks = (p.batch + step_tile_rows - 1) / step_tile_rows,
                      counters = (p.hidden + step_tile_units - 1) / step_tile_units;
        sums = Matrices(p).arithmetic(blocks, p.cell.grads * p.hidden);
        done = at::empty({counters}, sums.options().dtype(at::kInt));
        gradients = {wanted.bias_ih, wanted.bias_hh, sums.data_ptr(),
                     static_cast<unsigned*>(done.data_ptr())};
        if (p.steps == 1 && blocks > 1)  // no step before the last
            C10_CUDA_CHECK(cudaMemsetAsync(done.data_ptr(), 0, done.nbytes(), stream));
    }
};

// Every step: a product a direction, and one launch. With a projection: two and two.
void step_by_step(const Problem& p, const fastrnn::BackwardLayer& layer, const Products& products,
                  const std::vector<BackwardTensors>& tensors, BackwardDirection* direction,
                  cudaStream_t stream) {
    const LayerSize size{p.hidden, p.recurrent, layer.output_stride, layer.grad_output_stride};
    const int directions = layer.size.directions;
    const int64_t B = p.batch, H = p.hidden, R = p.recurrent;
    const Matrices m(p);
    Tensor memory[2][2];  // of what is not the user's
    BackwardMatrices matrices[2] = {};
    std::vector<BiasMemory> biases;
    void* unprojected[2] = {};
    for (int d = 0; d < directions; ++d) {
        const Weights& weights = layer.direction[d].weights;
        BackwardMatrices& t = matrices[d];
        t.dgates = tensors[d].of_h(p);
        t.hh = m.at(weights.hh, p.cell.gates * H, R);
        t.r = m.of(memory[d][0] = m.stored(B, R));
        direction[d].biases = biases.emplace_back(p, layer.direction[d].grads, stream).gradients;
        if (!p.projected) continue;
        t.projected = m.of(tensors[d].projected);
        t.hr = m.at(weights.hr, R, H);
        t.dh = m.of(memory[d][1] = m.stored(B, H));
        if (tensors[d].unprojected.defined()) unprojected[d] = tensors[d].unprojected.data_ptr();
    }
    // The step before the first, as it were, where nothing is left to do but grad_h0.
    const int64_t end = layer.direction[0].grad_h0 ? -1 : 0;
    for (int64_t i = p.steps - 1; i >= end; --i) {
        BackwardStep step[2];
        for (int d = 0; d < directions; ++d) {
            const BackwardMatrices& t = matrices[d];
            const StepRows now = step_rows(layer.sequence, d, i),
                           before = step_rows(layer.sequence, d, i + 1),
                           next = step_rows(layer.sequence, d, i - 1);
            step[d] = {B,         now.row,  now.rows, before.rows,    next.row,
                       next.rows, t.r.data, nullptr,  unprojected[d], i > 0 && i == p.steps - 1,
                       i == 0};
            products.multiply(t.r.some_rows(0, before.rows),
                              t.dgates.some_rows(before.row, before.rows), t.hh);
        }
        if (p.projected) {
            BackwardSum sum[2];
            for (int d = 0; d < directions; ++d) sum[d] = {step[d], matrices[d].projected.data};
            C10_CUDA_CHECK(
                launch_backward_sum(p.storage, size, directions, direction, sum, stream));
            if (i < 0) break;
            for (int d = 0; d < directions; ++d) {
                const BackwardMatrices& t = matrices[d];
                const auto [row, rows] = step_rows(layer.sequence, d, i);
                step[d].dh = t.dh.data;
                products.multiply(t.dh.some_rows(0, rows), t.projected.some_rows(row, rows), t.hr);
            }
        }
        C10_CUDA_CHECK(launch_backward_step(p.cell_index, p.storage, size, directions, direction,
                                            step, stream));
    }
}

// The gradients of a direction's weights, each a product over all rows.
void weights_gradients(const Problem& p, const Products& products, const Matrix& input,
                       const Matrix& output, bool reverse, const BackwardTensors& t,
                       const WeightGradients& grads) {
    const Matrices m(p);
    const int64_t H = p.hidden, gate_rows = p.cell.gates * H;
    if (grads.ih) products.multiply(m.at(grads.ih, gate_rows, input.columns), t.of_x(p).t(), input);
    if (grads.hh) {
        const Matrix out = m.at(grads.hh, gate_rows, p.recurrent), of_h = t.of_h(p);
        if (t.prev.defined()) {
            products.multiply(out, of_h.t(), m.of(t.prev));
        } else {  // every step but a direction's first
            const int64_t B = p.batch, rows = p.rows - B;
            products.multiply(out, of_h.some_rows(reverse ? 0 : B, rows).t(),
                              output.some_rows(reverse ? B : 0, rows));
        }
    }
    if (grads.hr)
        products.multiply(m.at(grads.hr, p.recurrent, H), m.of(t.projected).t(),
                          m.of(t.unprojected));
}

// Those of its biases where no step's kernel has added them up.
void bias_gradients(const Problem& p, const BackwardTensors& t, const WeightGradients& grads,
                    cudaStream_t stream) {
    const Matrices m(p);
    const int64_t gate_rows = p.cell.gates * p.hidden;
    const auto sum = [&](void* to, const Tensor& of) {
        Tensor sums = m.tensor(to, {gate_rows});
        at::sum_out(sums, of, 0);
    };
    if (grads.bias_ih) sum(grads.bias_ih, t.dgates.narrow(1, 0, gate_rows));
    if (!grads.bias_hh) return;
    if (shared(p) && grads.bias_ih)
        copy(m.at(grads.bias_hh, 1, gate_rows), m.at(grads.bias_ih, 1, gate_rows), stream);
    else
        sum(grads.bias_hh, t.dgates.narrow(1, t.dgates.size(1) - gate_rows, gate_rows));
}

}  // namespace

void backward(const Problem& p, const fastrnn::BackwardLayer& layer) {
    const c10::cuda::CUDAGuard guard(p.device);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Matrices m(p);
    const Products products(p);
    std::vector<BackwardTensors> tensors;
    BackwardDirection direction[2];
    for (int d = 0; d < layer.size.directions; ++d) {
        tensors.emplace_back(p, layer.direction[d]);
        direction[d] = tensors[d].direction(layer.direction[d]);
    }
    if (const PersistentPlan plan = choose_path(Pass::backward, p); plan.fits) {
        const PersistentMemory memory(plan, p, layer.sequence, stream);
        const LayerSize size{p.hidden, p.recurrent, layer.output_stride, layer.grad_output_stride};
        const void* hh[] = {layer.direction[0].weights.hh, layer.direction[1].weights.hh};
        for (int d = 0; plan.adds_up_biases && d < layer.size.directions; ++d) {
            const WeightGradients& wanted = layer.direction[d].grads;
            direction[d].biases = {wanted.bias_ih, wanted.bias_hh, nullptr, nullptr};
        }
        C10_CUDA_CHECK(launch_persistent_backward(plan, size, memory.sequence,
                                                  layer.size.directions, direction, hh,
                                                  memory.workspace.data_ptr(), stream));
        for (int d = 0; !plan.adds_up_biases && d < layer.size.directions; ++d)
            bias_gradients(p, tensors[d], layer.direction[d].grads, stream);
    } else {
        step_by_step(p, layer, products, tensors, direction, stream);
    }

    const int64_t gate_rows = p.cell.gates * p.hidden, I = layer.size.input;
    const Matrix input = m.at(layer.input, p.rows, I);
    for (int d = 0; d < layer.size.directions; ++d) {
        const fastrnn::BackwardDirection& user = layer.direction[d];
        const BackwardTensors& t = tensors[d];
        t.dh.finish(p, p.recurrent, user.grad_h0);
        t.dc.finish(p, p.hidden, user.grad_c0);
        weights_gradients(p, products, input,
                          m.at(user.output, p.rows, p.recurrent, layer.output_stride),
                          /*reverse=*/d == 1, t, user.grads);
        if (layer.grad_input)  // to which the second direction adds
            products.multiply(m.at(layer.grad_input, p.rows, I), t.of_x(p),
                              m.at(user.weights.ih, gate_rows, I), /*add=*/d > 0);
    }
}

}  // namespace fastrnn::cuda
