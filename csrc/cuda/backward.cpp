#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "path.h"
#include "run.h"
#include "step.h"
#include "tensors.h"

namespace fastrnn::cuda {
namespace {

bool in_gates_order(const CellInfo& cell) {
    for (int g = 0; g < cell.gates; ++g)
        if (cell.x_grad[g] != g) return false;
    return true;
}

// G blocks of H rows that belong to W_ih x + b_ih, out of the order of the gates into that in which
// dgates has them; or back.
Tensor reordered(const Problem& p, const Tensor& blocks, bool back) {
    if (in_gates_order(p.cell)) return blocks;
    std::vector<Tensor> list(p.cell.gates);
    for (int g = 0; g < p.cell.gates; ++g) {
        const int place = p.cell.x_grad[g];
        list[back ? g : place] = blocks.narrow(0, (back ? place : g) * p.hidden, p.hidden);
    }
    return at::cat(list);
}

// One direction's memory. N rows of all steps, B batch, G gates, H hidden, R the size of h.
struct BackwardTensors {
    Tensor dh;           // [B, R] of the arithmetic type: grad_h_n or zeros to begin with
    Tensor dc;           // [B, H] of the arithmetic type: grad_c_n or zeros to begin with
    Tensor dgates;       // [N, grads * H]
    Tensor prev;         // [N, R]: h_{t-1}, if W_hh's gradient is wanted
    Tensor hh;           // W_hh [G * H, R]
    Tensor hr;           // W_hr [P, H], if there is a projection; and then
    Tensor projected;    // [N, P]: dL/dh_t,
    Tensor unprojected;  // [N, H]: h before the projection, if W_hr's gradient is wanted

    BackwardTensors(const Problem& p, const fastrnn::BackwardDirection& user) {
        const Matrices m(p);
        const int64_t B = p.batch, N = p.rows, H = p.hidden, R = p.recurrent;
        const auto state = [&](const void* given, int64_t size) {
            const Tensor t = m.arithmetic(B, size);
            return given ? t.copy_(m.at(given, B, size)) : t.zero_();
        };
        dh = state(user.grad_h_n, R);
        if (p.cell.has_c) dc = state(user.grad_c_n, H);
        dgates = m.stored(N, p.cell.grads * H);
        if (user.grads.hh) prev = m.stored(N, R);
        hh = m.at(user.weights.hh, p.cell.gates * H, R);
        if (p.projected) {
            hr = m.at(user.weights.hr, R, H);
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
                dh.data_ptr(),
                dc.defined() ? dc.data_ptr() : nullptr,
                dgates.data_ptr(),
                prev.defined() ? prev.data_ptr() : nullptr};
    }

    // [N, G * H]: what belongs to W_hh h + b_hh, in the order of the gates; and to W_ih x + b_ih, in
    // the order of the gradients.
    Tensor of_h(const Problem& p) const {
        return dgates.narrow(1, (p.cell.grads - p.cell.gates) * p.hidden, p.cell.gates * p.hidden);
    }
    Tensor of_x(const Problem& p) const { return dgates.narrow(1, 0, p.cell.gates * p.hidden); }
};

// Every step: a product a direction, and one launch. With a projection: two and two.
void step_by_step(const Problem& p, const fastrnn::BackwardLayer& layer,
                  const std::vector<BackwardTensors>& tensors, const BackwardDirection* direction,
                  cudaStream_t stream) {
    const LayerSize size{p.hidden, p.recurrent, layer.output_stride, layer.grad_output_stride};
    const int directions = layer.size.directions;
    const Matrices m(p);
    Tensor r[2];        // [B, R]: dgates of the step handled before, times W_hh
    Tensor dh_step[2];  // [B, H]: dL/dh_t before the projection, if there is one
    for (int d = 0; d < directions; ++d) {
        r[d] = m.stored(p.batch, p.recurrent);
        if (p.projected) dh_step[d] = m.stored(p.batch, p.hidden);
    }
    // The step before the first, as it were, where nothing is left to do but grad_h0.
    const int64_t end = layer.direction[0].grad_h0 ? -1 : 0;
    for (int64_t i = p.steps - 1; i >= end; --i) {
        BackwardStep step[2];
        for (int d = 0; d < directions; ++d) {
            const BackwardTensors& t = tensors[d];
            const StepRows now = step_rows(layer.sequence, d, i),
                           before = step_rows(layer.sequence, d, i + 1),
                           next = step_rows(layer.sequence, d, i - 1);
            step[d] = {now.row,     now.rows,
                       before.rows, next.row,
                       next.rows,   r[d].const_data_ptr(),
                       nullptr,     t.unprojected.defined() ? t.unprojected.data_ptr() : nullptr};
            if (before.rows > 0)
                multiply(rows_of(r[d], 0, before.rows), rows_of(t.of_h(p), before.row, before.rows),
                         t.hh);
        }
        if (p.projected) {
            BackwardSum sum[2];
            for (int d = 0; d < directions; ++d)
                sum[d] = {step[d], tensors[d].projected.data_ptr()};
            C10_CUDA_CHECK(
                launch_backward_sum(p.storage, size, directions, direction, sum, stream));
            if (i < 0) break;
            for (int d = 0; d < directions; ++d) {
                const BackwardTensors& t = tensors[d];
                step[d].dh = dh_step[d].const_data_ptr();
                if (step[d].rows > 0)
                    multiply(rows_of(dh_step[d], 0, step[d].rows),
                             rows_of(t.projected, step[d].row, step[d].rows), t.hr);
            }
        }
        C10_CUDA_CHECK(launch_backward_step(p.cell_index, p.storage, size, directions, direction,
                                            step, stream));
    }
}

// The gradients of a direction's weights, each a product or a sum over all rows.
void weights_gradients(const Problem& p, const Tensor& input, const BackwardTensors& t,
                       const WeightGradients& grads) {
    const Matrices m(p);
    const int64_t H = p.hidden, gate_rows = p.cell.gates * H;
    if (grads.ih) {
        Tensor out = m.at(grads.ih, gate_rows, input.size(1));
        multiply(out, t.of_x(p).t(), input);
        const Tensor ordered = reordered(p, out, /*back=*/true);
        if (!ordered.is_same(out)) out.copy_(ordered);
    }
    if (grads.hh) multiply(m.at(grads.hh, gate_rows, p.recurrent), t.of_h(p).t(), t.prev);
    if (grads.hr) multiply(m.at(grads.hr, p.recurrent, H), t.projected.t(), t.unprojected);
    if (grads.bias_ih || grads.bias_hh) {
        const Tensor sums = t.dgates.sum(0, /*keepdim=*/false, p.arithmetic);
        if (grads.bias_ih)
            m.at(grads.bias_ih, gate_rows)
                .copy_(reordered(p, sums.narrow(0, 0, gate_rows), /*back=*/true));
        if (grads.bias_hh)
            m.at(grads.bias_hh, gate_rows)
                .copy_(sums.narrow(0, sums.size(0) - gate_rows, gate_rows));
    }
}

}  // namespace

void backward(const Problem& p, const fastrnn::BackwardLayer& layer) {
    const c10::cuda::CUDAGuard guard(p.device);
    const Matrices m(p);
    std::vector<BackwardTensors> tensors;
    BackwardDirection direction[2];
    for (int d = 0; d < layer.size.directions; ++d) {
        tensors.emplace_back(p, layer.direction[d]);
        direction[d] = tensors[d].direction(layer.direction[d]);
    }
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    if (const PersistentPlan plan = choose_path(Pass::backward, p); plan.fits) {
        const PersistentMemory memory(plan, p, layer.sequence, stream);
        const LayerSize size{p.hidden, p.recurrent, layer.output_stride, layer.grad_output_stride};
        const void* hh[] = {layer.direction[0].weights.hh, layer.direction[1].weights.hh};
        C10_CUDA_CHECK(launch_persistent_backward(plan, size, memory.sequence,
                                                  layer.size.directions, direction, hh,
                                                  memory.workspace.data_ptr(), stream));
    } else {
        step_by_step(p, layer, tensors, direction, stream);
    }

    const Tensor input = m.at(layer.input, p.rows, layer.size.input);
    for (int d = 0; d < layer.size.directions; ++d) {
        const fastrnn::BackwardDirection& user = layer.direction[d];
        const BackwardTensors& t = tensors[d];
        if (user.grad_h0) m.at(user.grad_h0, p.batch, p.recurrent).copy_(t.dh);
        if (user.grad_c0) m.at(user.grad_c0, p.batch, p.hidden).copy_(t.dc);
        weights_gradients(p, input, t, user.grads);
        if (layer.grad_input) {
            Tensor out = m.at(layer.grad_input, p.rows, layer.size.input);
            const Tensor ih = m.at(user.weights.ih, p.cell.gates * p.hidden, layer.size.input);
            at::addmm_out(out, out, t.of_x(p), reordered(p, ih, /*back=*/false), /*beta=*/d,
                          /*alpha=*/1);
        }
    }
}

}  // namespace fastrnn::cuda
