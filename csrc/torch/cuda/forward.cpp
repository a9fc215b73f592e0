#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "matrices.h"
#include "path.h"
#include "problem.h"
#include "run.h"
#include "stepwise.h"

namespace fastrnn::cuda {
namespace {

// [N, G * H]: W_ih x_t of all steps.
Tensor input_products(const Problem& p, const ForwardLayer& layer, const ForwardDirection& user,
                      const Products& products) {
    const Matrices m(p);
    const int64_t N = p.rows, gate_rows = p.cell.gates * p.hidden, I = layer.size.input;
    Tensor x = m.stored(N, gate_rows);
    products.multiply(m.of(x), m.at(layer.input, N, I), m.at(user.weights.ih, gate_rows, I).t());
    return x;
}

ForwardArrays arrays_of(const ForwardDirection& user, const Tensor& x) {
    return {.x = x.const_data_ptr(),
            .bias_ih = user.weights.bias_ih,
            .bias_hh = user.weights.bias_hh,
            .h0 = user.h0,
            .c0 = user.c0,
            .h = user.h_n,
            .c = nullptr,
            .c_n = user.c_n,
            .output = user.output,
            .again = user.output_copy,
            .saved = user.saved,
            .kept_c = user.c};
}

}  // namespace

void forward(const ForwardLayer& layer) {
    const Problem p = problem_of(layer);
    const c10::cuda::CUDAGuard guard(p.device);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Products products(p);
    Tensor x[2];
    LayerArguments<ForwardArrays> arguments{.size = {.hidden = p.hidden,
                                                     .recurrent = p.recurrent,
                                                     .output_stride = layer.output_stride,
                                                     .c_stride = layer.c_stride,
                                                     .grad_output_stride = 0}};
    for (int d = 0; d < layer.size.directions; ++d) {
        const ForwardDirection& user = layer.direction[d];
        x[d] = input_products(p, layer, user, products);
        arguments.direction[d] = arrays_of(user, x[d]);
        arguments.weight_hh[d] = user.weights.hh;
    }
    const Plan plan = choose_path(Pass::forward, p, layer.sequence);
    if (std::holds_alternative<StepwisePlan>(plan))
        forward_step_by_step(p, layer, products, arguments.size, arguments.direction, stream);
    else
        run_in_one_launch(plan, p, layer.sequence, arguments, stream);
}

}  // namespace fastrnn::cuda
