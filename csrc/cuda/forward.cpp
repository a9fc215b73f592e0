#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
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

    ForwardTensors(const Problem& p, const fastrnn::ForwardLayer& layer,
                   const fastrnn::ForwardDirection& user, const Products& products) {
        const Matrices m(p);
        const int64_t N = p.rows, gate_rows = p.cell.gates * p.hidden, I = layer.size.input;
        x = m.stored(N, gate_rows);
        products.multiply(m.of(x), m.at(layer.input, N, I),
                          m.at(user.weights.ih, gate_rows, I).t());
    }

    ForwardDirection direction(const fastrnn::ForwardDirection& user) const {
        return {x.const_data_ptr(),
                user.weights.bias_ih,
                user.weights.bias_hh,
                user.h0,
                user.c0,
                user.h_n,
                nullptr,
                user.c_n,
                user.output,
                user.again,
                user.saved,
                user.c};
    }
};

// What a direction's steps multiply.
struct ForwardMatrices {
    Matrix h0, h;        // [B, R]: h, of what the output does not have as the next step needs it
    bool leaves_h;       // whether there is such a thing
    Matrix hh;           // W_hh' [R, G * H]
    Matrix r;            // [B, G * H]: W_hh h_{t-1}
    Matrix hr;           // W_hr' [H, P], if there is a projection; and then
    Matrix unprojected;  // [B, H]: h_t before it
    Matrix output;       // [N, R]
    Matrix c;            // [N, H]: c_t of every step, if it is kept and of A
};

// Every step: a product a direction, and one launch. With a projection: another product and a copy a
// direction.
void step_by_step(const Problem& p, const fastrnn::ForwardLayer& layer, const Products& products,
                  ForwardDirection* direction, cudaStream_t stream) {
    const LayerSize size{p.hidden, p.recurrent, layer.output_stride, 0};
    const int directions = layer.size.directions;
    const int64_t B = p.batch, H = p.hidden, R = p.recurrent, gate_rows = p.cell.gates * H;
    const bool ragged = p.rows < p.steps * B;
    const Matrices m(p);
    Tensor memory[2][3];  // of what is not the user's
    ForwardMatrices matrices[2] = {};
    for (int d = 0; d < directions; ++d) {
        const fastrnn::ForwardDirection& user = layer.direction[d];
        ForwardMatrices& t = matrices[d];
        direction[d].c = user.c_n;
        if (p.cell.has_c && p.dtype != p.arithmetic)
            direction[d].c = (memory[d][2] = m.arithmetic(B, H)).mutable_data_ptr();
        t.h0 = m.at(user.h0, B, R);
        t.h = m.at(user.h_n, B, R);
        t.output = m.at(user.output, p.rows, R, layer.output_stride);
        if (user.c && p.dtype == p.arithmetic) t.c = m.at(user.c, p.rows, H);
        // Rows that begin after the first step are multiplied with those that have begun.
        const bool late = ragged && d == 1;
        if (late) copy(t.h, t.h0, stream);
        t.leaves_h = late || p.projected;
        t.hh = m.at(user.weights.hh, gate_rows, R).t();
        t.r = m.of(memory[d][0] = m.stored(B, gate_rows));
        if (!p.projected) continue;
        t.hr = m.at(user.weights.hr, R, H).t();
        t.unprojected = m.of(memory[d][1] = m.stored(B, H));
    }
    for (int64_t i = 0; i < p.steps; ++i) {
        ForwardStep step[2];
        for (int d = 0; d < directions; ++d) {
            const ForwardMatrices& t = matrices[d];
            const auto [row, rows] = step_rows(layer.sequence, d, i);
            const StepRows before = step_rows(layer.sequence, d, i - 1);
            const int64_t begun = std::min(rows, before.rows);
            const Matrix h = i == 0       ? t.h0.some_rows(0, rows)
                             : t.leaves_h ? t.h.some_rows(0, rows)
                                          : t.output.some_rows(before.row, rows);
            const bool from_zeros = i == 0 && !layer.direction[d].h0;
            step[d] = {B,
                       row,
                       rows,
                       begun,
                       step_rows(layer.sequence, d, i + 1).rows,
                       from_zeros ? nullptr : t.r.data,
                       h.data,
                       h.stride,
                       t.c.data ? t.c.some_rows(before.row, begun).data : direction[d].c,
                       t.leaves_h,
                       !t.c.data,
                       t.unprojected.data};
            if (!from_zeros) products.multiply(t.r.some_rows(0, rows), h, t.hh);
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
    for (int d = 0; d < directions && p.projected; ++d)
        if (const Matrix& output = matrices[d].output; direction[d].again)
            copy(m.at(direction[d].again, p.rows, R, layer.output_stride), output, stream);
}

}  // namespace

void forward(const Problem& p, const fastrnn::ForwardLayer& layer) {
    const c10::cuda::CUDAGuard guard(p.device);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const Products products(p);
    std::vector<ForwardTensors> tensors;
    ForwardDirection direction[2];
    for (int d = 0; d < layer.size.directions; ++d) {
        tensors.emplace_back(p, layer, layer.direction[d], products);
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
}

}  // namespace fastrnn::cuda
