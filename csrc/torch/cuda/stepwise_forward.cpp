#include <c10/cuda/CUDAException.h>

#include <algorithm>

#include "../../cuda/stepwise/rows.h"
#include "../../cuda/stepwise/step.h"
#include "matrices.h"
#include "stepwise.h"

namespace fastrnn::cuda {
namespace {

// The operands and results of a direction's products. T steps, N rows of all steps, B batch, G
// gates, H hidden, R the size of h.
struct ForwardMatrices {
    Matrix h0, h;   // [B, R]
    bool stores_h;  // whether h has h_t of the rows whose next step does not find it in the output
    Matrix hh;      // W_hh' [R, G * H]
    Matrix r;       // [B, G * H]: W_hh h_{t-1}
    Matrix output;  // [N, R]
    Matrix c;       // [N, H]: c_t of every step, if it is kept in the arithmetic type
    // With a projection:
    Matrix hr;           // W_hr' [H, P]
    Matrix unprojected;  // [B, H]: h_t before the projection
};

}  // namespace

void forward_step_by_step(const Problem& p, const ForwardLayer& layer, const Products& products,
                          const LayerSize& size, ForwardArrays* direction, cudaStream_t stream) {
    const int directions = layer.size.directions;
    const int64_t B = p.batch, H = p.hidden, R = p.recurrent, gate_rows = p.cell.gates * H;
    const bool ragged = p.rows < p.steps * B;
    const Matrices m(p);
    Tensor r[2], unprojected[2], c[2];
    ForwardMatrices matrices[2] = {};
    for (int d = 0; d < directions; ++d) {
        const ForwardDirection& user = layer.direction[d];
        ForwardMatrices& t = matrices[d];
        direction[d].c = user.c_n;
        if (p.cell.has_c && p.dtype != p.arithmetic)
            direction[d].c = (c[d] = m.arithmetic(B, H)).mutable_data_ptr();
        t.h0 = m.at(user.h0, B, R);
        t.h = m.at(user.h_n, B, R);
        t.output = m.at(user.output, p.rows, R, layer.output_stride);
        if (user.c && p.dtype == p.arithmetic) t.c = m.at(user.c, p.rows, H, layer.c_stride);
        // Against time, rows of packed data start at different steps. They wait in h with their
        // initial state, and every product takes the rows of h that have started.
        const bool starts_late = ragged && d == 1;
        // With events no step changes h of a row that has ended, or not begun.
        const bool waits = starts_late || layer.sequence.events;
        if (waits && user.h0)
            copy(t.h, t.h0, stream);
        else if (waits)
            C10_CUDA_CHECK(cudaMemsetAsync(t.h.data, 0, B * R * t.h.element, stream));
        t.stores_h = waits || p.projected;
        t.hh = m.at(user.weights.hh, gate_rows, R).t();
        t.r = m.of(r[d] = m.stored(B, gate_rows));
        if (!p.projected) continue;
        t.hr = m.at(user.weights.hr, R, H).t();
        t.unprojected = m.of(unprojected[d] = m.stored(B, H));
    }
    for (int64_t i = 0; i < p.steps; ++i) {
        ForwardStep step[2];
        for (int d = 0; d < directions; ++d) {
            const ForwardMatrices& t = matrices[d];
            const auto [row, rows] = rows_of_step(layer.sequence, d, i);
            const HostStepRows before = rows_of_step(layer.sequence, d, i - 1);
            const int64_t rows_before = std::min(rows, before.count);
            const Matrix h = i == 0       ? t.h0.some_rows(0, rows)
                             : t.stores_h ? t.h.some_rows(0, rows)
                                          : t.output.some_rows(before.first, rows);
            const bool from_zeros = i == 0 && !layer.direction[d].h0;
            step[d] = {
                .batch = B,
                .row = row,
                .rows = rows,
                .rows_before = rows_before,
                .rows_after = rows_of_step(layer.sequence, d, i + 1).count,
                .r = from_zeros ? nullptr : t.r.data,
                .h = h.data,
                .h_stride = h.stride,
                .c = t.c.data ? t.c.some_rows(before.first, rows_before).data : direction[d].c,
                .c_stride = t.c.data ? t.c.stride : H,
                .events = events_of_step(layer.sequence, d, i),
                .entering = entering_step(layer.sequence, d, i),
                .stores_h = t.stores_h,
                .stores_c = !t.c.data,
                .unprojected = t.unprojected.data};
            if (!from_zeros) products.multiply(t.r.some_rows(0, rows), h, t.hh);
        }
        C10_CUDA_CHECK(launch_forward_step(p.cell_index, p.storage, size, directions, direction,
                                           step, stream));
        if (!p.projected) continue;
        for (int d = 0; d < directions; ++d) {
            const ForwardMatrices& t = matrices[d];
            const auto [row, rows] = rows_of_step(layer.sequence, d, i);
            if (rows == 0) continue;
            const Matrix h = t.h.some_rows(0, rows), output = t.output.some_rows(row, rows);
            if (layer.sequence.events) {
                products.multiply(output, t.unprojected.some_rows(0, rows), t.hr);
                continue;
            }
            products.multiply(h, t.unprojected.some_rows(0, rows), t.hr);
            copy(output, h, stream);
        }
        if (layer.sequence.events)
            C10_CUDA_CHECK(launch_keep_ended(p.storage, size, directions, direction, step, stream));
    }
    for (int d = 0; d < directions && p.projected; ++d)
        if (const Matrix& output = matrices[d].output; direction[d].again)
            copy(m.at(direction[d].again, p.rows, R, layer.output_stride), output, stream);
}

}  // namespace fastrnn::cuda
