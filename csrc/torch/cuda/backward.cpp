#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "backward_tensors.h"
#include "path.h"
#include "problem.h"
#include "run.h"
#include "stepwise.h"

namespace fastrnn::cuda {
namespace {

// The gradients of a direction's weight matrices, each a product over all rows.
void weight_gradients(const Problem& p, const Products& products, const Matrix& input,
                      const Matrix& output, bool reverse, const BackwardTensors& t,
                      const WeightGradients& grads) {
    const Matrices m(p);
    const int64_t H = p.hidden, gate_rows = p.cell.gates * H;
    if (grads.ih) products.multiply(m.at(grads.ih, gate_rows, input.columns), t.of_x(p).t(), input);
    if (grads.hh) {
        const Matrix out = m.at(grads.hh, gate_rows, p.recurrent), of_h = t.of_h(p);
        if (t.prev.defined()) {
            products.multiply(out, of_h.t(), m.of(t.prev));
        } else {  // h_{t-1} is the output of every step but the direction's first
            const int64_t B = p.batch, rows = p.rows - B;
            products.multiply(out, of_h.some_rows(reverse ? 0 : B, rows).t(),
                              output.some_rows(reverse ? B : 0, rows));
        }
    }
    if (grads.hr)
        products.multiply(m.at(grads.hr, p.recurrent, H), m.of(t.projected).t(),
                          m.of(t.unprojected));
}

// The gradients of a direction's biases, where no kernel has added them up.
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
    if (shares_gradients(p) && grads.bias_ih)
        copy(m.at(grads.bias_hh, 1, gate_rows), m.at(grads.bias_ih, 1, gate_rows), stream);
    else
        sum(grads.bias_hh, t.dgates.narrow(1, t.dgates.size(1) - gate_rows, gate_rows));
}

}  // namespace

void backward(const BackwardLayer& layer) {
    const Problem p = problem_of(layer);
    const c10::cuda::CUDAGuard guard(p.device);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Matrices m(p);
    const Products products(p);
    const int directions = layer.size.directions;
    std::vector<BackwardTensors> tensors;
    LayerArguments<BackwardArrays> arguments{
        .size = {.hidden = p.hidden,
                 .recurrent = p.recurrent,
                 .output_stride = layer.output_stride,
                 .c_stride = p.hidden,
                 .grad_output_stride = layer.grad_output_stride}};
    for (int d = 0; d < directions; ++d) {
        const BackwardDirection& user = layer.direction[d];
        arguments.direction[d] =
            tensors.emplace_back(p, user, layer.sequence.events != nullptr).arrays(user);
        arguments.weight_hh[d] = user.weights.hh;
    }
    const Plan plan = choose_path(Pass::backward, p, layer.sequence);
    if (std::holds_alternative<StepwisePlan>(plan)) {
        backward_step_by_step(p, layer, products, arguments.size, tensors, arguments.direction,
                              stream);
    } else {
        const auto* persistent = std::get_if<PersistentPlan>(&plan);
        const bool adds_up_biases = persistent && persistent->adds_up_biases();
        for (int d = 0; adds_up_biases && d < directions; ++d) {
            const WeightGradients& wanted = layer.direction[d].grads;
            arguments.direction[d].biases = {.ih = wanted.bias_ih, .hh = wanted.bias_hh};
        }
        run_in_one_launch(plan, p, layer.sequence, arguments, stream);
        for (int d = 0; !adds_up_biases && d < directions; ++d)
            bias_gradients(p, tensors[d], layer.direction[d].grads, stream);
    }

    const int64_t gate_rows = p.cell.gates * p.hidden, I = layer.size.input;
    const Matrix input = m.at(layer.input, p.rows, I);
    for (int d = 0; d < directions; ++d) {
        const BackwardDirection& user = layer.direction[d];
        const BackwardTensors& t = tensors[d];
        t.dh.finish(p, p.recurrent, user.grad_h0);
        t.dc.finish(p, p.hidden, user.grad_c0);
        weight_gradients(p, products, input,
                         m.at(user.output, p.rows, p.recurrent, layer.output_stride),
                         /*reverse=*/d == 1, t, user.grads);
        if (layer.grad_input)  // the second direction adds to the first's
            products.multiply(m.at(layer.grad_input, p.rows, I), t.of_x(p),
                              m.at(user.weights.ih, gate_rows, I), /*add=*/d > 0);
    }
}

}  // namespace fastrnn::cuda
