#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>

#include "../../cuda/stepwise/rows.h"
#include "../../cuda/stepwise/step.h"
#include "stepwise.h"

namespace fastrnn::cuda {
namespace {

// The operands and results of a direction's products. N rows of all steps, B batch, G gates, H
// hidden, R the size of h.
struct BackwardMatrices {
    Matrix dgates;  // [N, G * H]: gradients of W_hh h + b_hh
    Matrix hh;      // W_hh [G * H, R]
    Matrix r;       // [B, R]: dgates of the step after, times W_hh
    // With a projection:
    Matrix projected;  // [N, P]: dL/dh_t
    Matrix hr;         // W_hr [P, H]
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
        gradients = {.ih = wanted.bias_ih,
                     .hh = wanted.bias_hh,
                     .sums = sums.data_ptr(),
                     .done = static_cast<unsigned*>(done.data_ptr())};
        if (p.steps == 1 && blocks > 1)  // otherwise the first of the steps sets it to 0
            C10_CUDA_CHECK(cudaMemsetAsync(done.data_ptr(), 0, done.nbytes(), stream));
    }
};

}  // namespace

void backward_step_by_step(const Problem& p, const BackwardLayer& layer, const Products& products,
                           const LayerSize& size, const std::vector<BackwardTensors>& tensors,
                           BackwardArrays* direction, cudaStream_t stream) {
    const int directions = layer.size.directions;
    const int64_t B = p.batch, H = p.hidden, R = p.recurrent;
    const Matrices m(p);
    Tensor r[2], dh[2];
    BackwardMatrices matrices[2] = {};
    std::vector<BiasMemory> biases;
    void* unprojected[2] = {};
    for (int d = 0; d < directions; ++d) {
        const Weights& weights = layer.direction[d].weights;
        BackwardMatrices& t = matrices[d];
        t.dgates = tensors[d].of_h(p);
        t.hh = m.at(weights.hh, p.cell.gates * H, R);
        t.r = m.of(r[d] = m.stored(B, R));
        direction[d].biases = biases.emplace_back(p, layer.direction[d].grads, stream).gradients;
        if (!p.projected) continue;
        t.projected = m.of(tensors[d].projected);
        t.hr = m.at(weights.hr, R, H);
        t.dh = m.of(dh[d] = m.stored(B, H));
        if (tensors[d].unprojected.defined()) unprojected[d] = tensors[d].unprojected.data_ptr();
    }
    // Step -1 has no rows: it only completes grad_h0.
    const int64_t end = layer.direction[0].grad_h0 ? -1 : 0;
    for (int64_t i = p.steps - 1; i >= end; --i) {
        BackwardStep step[2];
        for (int d = 0; d < directions; ++d) {
            const BackwardMatrices& t = matrices[d];
            const HostStepRows now = rows_of_step(layer.sequence, d, i),
                               after = rows_of_step(layer.sequence, d, i + 1),
                               before = rows_of_step(layer.sequence, d, i - 1);
            step[d] = {.batch = B,
                       .row = now.first,
                       .rows = now.count,
                       .rows_after = after.count,
                       .row_before = before.first,
                       .rows_before = before.count,
                       .r = t.r.data,
                       .dh = nullptr,
                       .events = events_of_step(layer.sequence, d, i),
                       .entering = entering_step(layer.sequence, d, i),
                       .entering_after = entering_step(layer.sequence, d, i + 1),
                       .has_events = layer.sequence.events != nullptr,
                       .unprojected = unprojected[d],
                       .first = i > 0 && i == p.steps - 1,
                       .last = i == 0};
            products.multiply(t.r.some_rows(0, after.count),
                              t.dgates.some_rows(after.first, after.count), t.hh);
        }
        if (p.projected) {
            BackwardSum sum[2];
            for (int d = 0; d < directions; ++d)
                sum[d] = {.step = step[d], .dh = matrices[d].projected.data};
            C10_CUDA_CHECK(
                launch_backward_sum(p.storage, size, directions, direction, sum, stream));
            if (i < 0) break;
            for (int d = 0; d < directions; ++d) {
                const BackwardMatrices& t = matrices[d];
                const auto [row, rows] = rows_of_step(layer.sequence, d, i);
                step[d].dh = t.dh.data;
                products.multiply(t.dh.some_rows(0, rows), t.projected.some_rows(row, rows), t.hr);
            }
        }
        C10_CUDA_CHECK(launch_backward_step(p.cell_index, p.storage, size, directions, direction,
                                            step, stream));
    }
}

}  // namespace fastrnn::cuda
