#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "path.h"
#include "run.h"
#include "step.h"
#include "tensors.h"

namespace fastrnn::cuda {
namespace {

// One direction's memory. T steps, N rows of all steps, B batch, G gates, H hidden, R the size of h.
struct ForwardTensors {
    Tensor x;            // [N, G * H]: W_ih x_t
    Tensor h;            // [B, R]: h0 to begin with; h_n is its place
    Tensor c;            // [B, H] of the arithmetic type: c0 to begin with
    Tensor unprojected;  // [B, H]: h_t before the projection, if there is one
    Tensor output;       // [N, R], strided
    Tensor hh, hr;       // W_hh' [R, G * H], W_hr' [H, P]

    ForwardTensors(const Problem& p, const fastrnn::ForwardLayer& layer,
                   const fastrnn::ForwardDirection& user) {
        const Matrices m(p);
        const int64_t B = p.batch, N = p.rows, H = p.hidden, R = p.recurrent,
                      gate_rows = p.cell.gates * H, I = layer.size.input;
        x = m.stored(N, gate_rows);
        multiply(x, m.at(layer.input, N, I), m.at(user.weights.ih, gate_rows, I).t());
        h = m.at(user.h_n, B, R);
        h.copy_(m.at(user.h0, B, R));
        if (p.cell.has_c) {
            c = p.dtype == p.arithmetic ? m.at(user.c_n, B, H) : m.arithmetic(B, H);
            c.copy_(m.at(user.c0, B, H));
        }
        output = m.at(user.output, N, R, layer.output_stride);
        hh = m.at(user.weights.hh, gate_rows, R).t();
        if (p.projected) {
            unprojected = m.stored(B, H);
            hr = m.at(user.weights.hr, R, H).t();
        }
    }

    ForwardDirection direction(const fastrnn::ForwardDirection& user) const {
        return {x.const_data_ptr(),
                user.weights.bias_ih,
                user.weights.bias_hh,
                h.data_ptr(),
                c.defined() ? c.data_ptr() : nullptr,
                user.output,
                user.saved,
                user.c};
    }
};

// Every step: a product a direction, and one launch.
void step_by_step(const Problem& p, const fastrnn::ForwardLayer& layer,
                  const std::vector<ForwardTensors>& tensors, const ForwardDirection* direction,
                  cudaStream_t stream) {
    const LayerSize size{p.hidden, p.recurrent, layer.output_stride, 0};
    const int directions = layer.size.directions;
    Tensor r[2];  // [B, G * H]: W_hh h_{t-1}
    for (int d = 0; d < directions; ++d)
        r[d] = Matrices(p).stored(p.batch, p.cell.gates * p.hidden);
    for (int64_t i = 0; i < p.steps; ++i) {
        ForwardStep step[2];
        for (int d = 0; d < directions; ++d) {
            const ForwardTensors& t = tensors[d];
            const auto [row, rows] = step_rows(layer.sequence, d, i);
            step[d] = {row, rows, r[d].const_data_ptr(),
                       p.projected ? t.unprojected.data_ptr() : nullptr};
            if (rows > 0) multiply(rows_of(r[d], 0, rows), rows_of(t.h, 0, rows), t.hh);
        }
        C10_CUDA_CHECK(launch_forward_step(p.cell_index, p.storage, size, directions, direction,
                                           step, stream));
        if (!p.projected) continue;
        for (int d = 0; d < directions; ++d) {
            const ForwardTensors& t = tensors[d];
            const auto [row, rows] = step_rows(layer.sequence, d, i);
            if (rows == 0) continue;
            const Tensor h = rows_of(t.h, 0, rows);
            multiply(h, rows_of(t.unprojected, 0, rows), t.hr);
            rows_of(t.output, row, rows).copy_(h);
        }
    }
}

}  // namespace

void forward(const Problem& p, const fastrnn::ForwardLayer& layer) {
    const c10::cuda::CUDAGuard guard(p.device);
    std::vector<ForwardTensors> tensors;
    ForwardDirection direction[2];
    for (int d = 0; d < layer.size.directions; ++d) {
        tensors.emplace_back(p, layer, layer.direction[d]);
        direction[d] = tensors[d].direction(layer.direction[d]);
    }
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    if (const PersistentPlan plan = choose_path(Pass::forward, p); plan.fits) {
        const PersistentMemory memory(plan, p, layer.sequence, stream);
        const LayerSize size{p.hidden, p.recurrent, layer.output_stride, 0};
        const void* hh[] = {layer.direction[0].weights.hh, layer.direction[1].weights.hh};
        C10_CUDA_CHECK(launch_persistent_forward(plan, size, memory.sequence, layer.size.directions,
                                                 direction, hh, memory.workspace.data_ptr(),
                                                 stream));
    } else {
        step_by_step(p, layer, tensors, direction, stream);
    }
    if (p.cell.has_c && p.dtype != p.arithmetic)
        for (int d = 0; d < layer.size.directions; ++d)
            Matrices(p).at(layer.direction[d].c_n, p.batch, p.hidden).copy_(tensors[d].c);
}

}  // namespace fastrnn::cuda
