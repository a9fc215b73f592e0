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

// What a direction works on beside what is the user's. T steps, N rows of all steps, B batch, G gates,
// H hidden, R the size of h.
struct ForwardTensors {
    Tensor x;  // [N, G * H]: W_ih x_t
    Tensor c;  // [B, H] of the arithmetic type: c0 to begin with; undefined if c_n is its place

    ForwardTensors(const Problem& p, const fastrnn::ForwardLayer& layer,
                   const fastrnn::ForwardDirection& user, const Products& products,
                   cudaStream_t stream) {
        const Matrices m(p);
        const int64_t B = p.batch, N = p.rows, H = p.hidden, R = p.recurrent,
                      gate_rows = p.cell.gates * H, I = layer.size.input;
        x = m.stored(N, gate_rows);
        products.multiply(m.of(x), m.at(layer.input, N, I),
                          m.at(user.weights.ih, gate_rows, I).t());
        copy(m.at(user.h_n, B, R), m.at(user.h0, B, R), stream);
        if (!p.cell.has_c) return;
        if (p.dtype == p.arithmetic)
            copy(m.at(user.c_n, B, H), m.at(user.c0, B, H), stream);
        else
            c = m.tensor(user.c0, {B, H}).to(p.arithmetic);
    }

    ForwardDirection direction(const fastrnn::ForwardDirection& user) const {
        return {x.const_data_ptr(),
                user.weights.bias_ih,
                user.weights.bias_hh,
                user.h_n,
                c.defined() ? c.data_ptr() : user.c_n,
                user.output,
                user.saved,
                user.c};
    }
};

// What a direction's steps multiply.
struct ForwardMatrices {
    Matrix h;            // [B, R]
    Matrix hh;           // W_hh' [R, G * H]
    Matrix r;            // [B, G * H]: W_hh h_{t-1}
    Matrix hr;           // W_hr' [H, P], if there is a projection; and then
    Matrix unprojected;  // [B, H]: h_t before it
    Matrix output;       // [N, P]
};

// Every step: a product a direction, and one launch. With a projection: another product and a copy a
// direction.
void step_by_step(const Problem& p, const fastrnn::ForwardLayer& layer, const Products& products,
                  const ForwardDirection* direction, cudaStream_t stream) {
    const LayerSize size{p.hidden, p.recurrent, layer.output_stride, 0};
    const int directions = layer.size.directions;
    const int64_t B = p.batch, H = p.hidden, R = p.recurrent, gate_rows = p.cell.gates * H;
    const Matrices m(p);
    Tensor memory[2][2];  // of what is not the user's
    ForwardMatrices matrices[2] = {};
    for (int d = 0; d < directions; ++d) {
        const fastrnn::ForwardDirection& user = layer.direction[d];
        ForwardMatrices& t = matrices[d];
        t.h = m.at(user.h_n, B, R);
        t.hh = m.at(user.weights.hh, gate_rows, R).t();
        t.r = m.of(memory[d][0] = m.stored(B, gate_rows));
        if (!p.projected) continue;
        t.hr = m.at(user.weights.hr, R, H).t();
        t.unprojected = m.of(memory[d][1] = m.stored(B, H));
        t.output = m.at(user.output, p.rows, R, layer.output_stride);
    }
    for (int64_t i = 0; i < p.steps; ++i) {
        ForwardStep step[2];
        for (int d = 0; d < directions; ++d) {
            const ForwardMatrices& t = matrices[d];
            const auto [row, rows] = step_rows(layer.sequence, d, i);
            step[d] = {row, rows, t.r.data, t.unprojected.data};
            products.multiply(t.r.some_rows(0, rows), t.h.some_rows(0, rows), t.hh);
        }
        C10_CUDA_CHECK(launch_forward_step(p.cell_index, p.storage, size, directions, direction,
                                           step, stream));
        if (!p.projected) continue;
        for (int d = 0; d < directions; ++d) {
            const ForwardMatrices& t = matrices[d];
            const auto [row, rows] = step_rows(layer.sequence, d, i);
            if (rows == 0) continue;
            const Matrix h = t.h.some_rows(0, rows);
            products.multiply(h, t.unprojected.some_rows(0, rows), t.hr);
            copy(t.output.some_rows(row, rows), h, stream);
        }
    }
}

}  // namespace

void forward(const Problem& p, const fastrnn::ForwardLayer& layer) {
    const c10::cuda::CUDAGuard guard(p.device);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Products products(p);
    std::vector<ForwardTensors> tensors;
    ForwardDirection direction[2];
    for (int d = 0; d < layer.size.directions; ++d) {
        tensors.emplace_back(p, layer, layer.direction[d], products, stream);
        direction[d] = tensors[d].direction(layer.direction[d]);
    }
    if (const PersistentPlan plan = choose_path(Pass::forward, p); plan.fits) {
        const PersistentMemory memory(plan, p, layer.sequence, stream);
        const LayerSize size{p.hidden, p.recurrent, layer.output_stride, 0};
        const void* hh[] = {layer.direction[0].weights.hh, layer.direction[1].weights.hh};
        C10_CUDA_CHECK(launch_persistent_forward(plan, size, memory.sequence, layer.size.directions,
                                                 direction, hh, memory.workspace.data_ptr(),
                                                 stream));
    } else {
        step_by_step(p, layer, products, direction, stream);
    }
    for (int d = 0; d < layer.size.directions; ++d)
        if (tensors[d].c.defined())
            Matrices(p).tensor(layer.direction[d].c_n, {p.batch, p.hidden}).copy_(tensors[d].c);
}

}  // namespace fastrnn::cuda
