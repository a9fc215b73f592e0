#include <algorithm>

#include "../../cells/registry.h"
#include "../own_cell.h"
#include "step.cuh"

namespace fastrnn::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(step_threads)
    backward_sum(const __grid_constant__ StepArguments<BackwardSum, BackwardArrays> launch) {
    const BackwardArrays& d = launch.direction[blockIdx.z];
    const BackwardStep& step = launch.step[blockIdx.z].step;
    const LayerSize& z = launch.size;
    const auto [b, unit] = element_of_thread();
    if ((b >= step.rows && b >= step.rows_after) || unit >= z.recurrent) return;

    const BackwardRow row = row_of(step, b);
    Arithmetic<S> dh;
    if (!add_gradients_of_h<S, /*passes_h=*/false>(d, z, step, row, unit, dh)) {
        if (b >= step.rows) return;
        dh = 0;  // of a row that has ended: nothing for W_hr
    } else if (step.has_events) {
        static_cast<Arithmetic<S>*>(d.dh)[b * z.recurrent + unit] = 0;
    }
    store<S>(launch.step[blockIdx.z].dh, row.at * z.recurrent + unit, dh);
    if (d.prev) {
        const S* h_prev = previous_h<S>(d, z, row);
        static_cast<S*>(d.prev)[row.at * z.recurrent + unit] = h_prev ? h_prev[unit] : narrow<S>(0);
    }
}

// With a projection and events: copies h_t, which the product has left in the output, and zeros the
// output of rows that have ended.
template <class S>
__global__ void __launch_bounds__(step_threads)
    keep_ended(const __grid_constant__ StepArguments<ForwardStep, ForwardArrays> launch) {
    const ForwardArrays& d = launch.direction[blockIdx.z];
    const ForwardStep& step = launch.step[blockIdx.z];
    const auto [b, unit] = element_of_thread();
    const int64_t R = launch.size.recurrent;
    if (b >= step.rows || unit >= R) return;
    S& output = static_cast<S*>(d.output)[(step.row + b) * launch.size.output_stride + unit];
    if (has_event(step.events, b, past_end))
        output = narrow<S>(0);
    else
        static_cast<S*>(d.h)[b * R + unit] = output;
}

// Rows for which a launch has work.
int64_t launched_rows(const ForwardStep& step, const ForwardArrays&) { return step.rows; }
int64_t launched_rows(const BackwardStep& step, const BackwardArrays& d) {
    const int64_t rows = step.dh ? step.rows : std::max(step.rows, step.rows_after);
    if (!d.biases.sums) return rows;
    return step.last ? step.batch : std::max<int64_t>(rows, step.first);
}
int64_t launched_rows(const BackwardSum& step, const BackwardArrays&) {
    return std::max(step.step.rows, step.step.rows_after);
}

int64_t batch_of(const ForwardStep& step) { return step.batch; }
int64_t batch_of(const BackwardStep& step) { return step.batch; }
int64_t batch_of(const BackwardSum& step) { return step.step.batch; }

template <class Step, class Arrays>
cudaError_t launch(StepKernel<Step, Arrays> kernel, const LayerSize& size, int64_t units,
                   int directions, const Arrays* direction, const Step* step, cudaStream_t stream) {
    int64_t rows = 0;
    StepArguments<Step, Arrays> parameters{size, {}, {}};
    for (int i = 0; i < directions; ++i) {
        parameters.direction[i] = direction[i];
        parameters.step[i] = step[i];
        rows = std::max(rows, launched_rows(step[i], direction[i]));
    }
    if (rows == 0) return cudaSuccess;
    const unsigned y = std::min<int64_t>(step_tile_rows, batch_of(step[0]));
    const dim3 grid((rows + y - 1) / y, (units + step_tile_units - 1) / step_tile_units,
                    directions);
    kernel<<<grid, dim3(step_tile_units, y), 0, stream>>>(parameters);
    return cudaGetLastError();
}

// Calls f with a value of the type of `storage`.
template <class F>
cudaError_t with_storage(Storage storage, F f) {
    switch (storage) {
        case Storage::float32: return f(float{});
        case Storage::float64: return f(double{});
        case Storage::bfloat16: return f(__nv_bfloat16{});
        default: return f(__half{});
    }
}

}  // namespace

cudaError_t launch_forward_step(int cell, Storage storage, const LayerSize& size, int directions,
                                const ForwardArrays* direction, const ForwardStep* step,
                                cudaStream_t stream) {
    if (cell >= cell_count)
        return launch(own_kernels(cell, storage)->forward_step, size, size.hidden, directions,
                      direction, step, stream);
    return with_storage(storage, [&]<class S>(S) {
#define FASTRNN_ENTRY(name, Cell) forward_step<Cell, S>,
        static constexpr StepKernel<ForwardStep, ForwardArrays> kernels[] = {
            FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)};
#undef FASTRNN_ENTRY
        return launch(kernels[cell], size, size.hidden, directions, direction, step, stream);
    });
}

cudaError_t launch_backward_step(int cell, Storage storage, const LayerSize& size, int directions,
                                 const BackwardArrays* direction, const BackwardStep* step,
                                 cudaStream_t stream) {
    if (cell >= cell_count)
        return launch(own_kernels(cell, storage)->backward_step, size, size.hidden, directions,
                      direction, step, stream);
    return with_storage(storage, [&]<class S>(S) {
#define FASTRNN_ENTRY(name, Cell) backward_step<Cell, S>,
        static constexpr StepKernel<BackwardStep, BackwardArrays> kernels[] = {
            FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)};
#undef FASTRNN_ENTRY
        return launch(kernels[cell], size, size.hidden, directions, direction, step, stream);
    });
}

cudaError_t launch_keep_ended(Storage storage, const LayerSize& size, int directions,
                              const ForwardArrays* direction, const ForwardStep* step,
                              cudaStream_t stream) {
    return with_storage(storage, [&]<class S>(S) {
        return launch<ForwardStep, ForwardArrays>(keep_ended<S>, size, size.recurrent, directions,
                                                  direction, step, stream);
    });
}

cudaError_t launch_backward_sum(Storage storage, const LayerSize& size, int directions,
                                const BackwardArrays* direction, const BackwardSum* step,
                                cudaStream_t stream) {
    return with_storage(storage, [&]<class S>(S) {
        return launch<BackwardSum, BackwardArrays>(backward_sum<S>, size, size.recurrent,
                                                   directions, direction, step, stream);
    });
}

}  // namespace fastrnn::cuda
