#include "step.h"

#include <algorithm>

#include "../../cells/registry.h"
#include "../common/element.cuh"
#include "bias_sums.cuh"

namespace fastrnn::cuda {
namespace {

template <class Step, class Arrays>
struct Launch {
    LayerSize size;
    Arrays direction[2];
    Step step[2];
};

constexpr int threads = step_tile_units * step_tile_rows;

struct Element {
    int64_t row, unit;
};

__device__ __forceinline__ Element element_of_thread() {
    return {int64_t(blockIdx.x) * blockDim.y + threadIdx.y,
            int64_t(blockIdx.y) * blockDim.x + threadIdx.x};
}

// Adds a unit's biases, which the block reads once for all its rows. Called by all its threads.
template <class Cell, class S>
__device__ __forceinline__ void add_biases(const ForwardArrays& d, int64_t hidden, int64_t unit,
                                           Arithmetic<S>* x, Arithmetic<S>* r) {
    constexpr int G = Cell::gates;
    if (!d.bias_ih) return;
    __shared__ Arithmetic<S> biases[2 * G][step_tile_units];
    Arithmetic<S> some[2 * G];  // all loads are issued before the first is used
#pragma unroll
    for (int k = 0; k < 2 * G; ++k) {
        const int i = threadIdx.y + k * blockDim.y;
        if (i < 2 * G && unit < hidden)
            some[k] = load<S>(i < G ? d.bias_ih : d.bias_hh, i % G * hidden + unit);
    }
#pragma unroll
    for (int k = 0; k < 2 * G; ++k) {
        const int i = threadIdx.y + k * blockDim.y;
        if (i < 2 * G && unit < hidden) biases[i][threadIdx.x] = some[k];
    }
    __syncthreads();
    for (int g = 0; g < G && unit < hidden; ++g)
        x[g] += biases[g][threadIdx.x], r[g] += biases[G + g][threadIdx.x];
}

template <class Cell, class S>
__global__ void __launch_bounds__(threads)
    forward_step(const __grid_constant__ Launch<ForwardStep, ForwardArrays> launch) {
    using A = Arithmetic<S>;
    constexpr int G = Cell::gates;
    const ForwardArrays& d = launch.direction[blockIdx.z];
    const ForwardStep& step = launch.step[blockIdx.z];
    const auto [b, unit] = element_of_thread();
    const int64_t H = launch.size.hidden, at = step.row + b;
    const bool alive = b < step.rows && unit < H;

    A x[G] = {}, r[G] = {}, c{}, h_prev{};
    if (alive) {
        for (int g = 0; g < G; ++g) {
            x[g] = load<S>(d.x, (at * G + g) * H + unit);
            r[g] = load<S>(step.r, (b * G + g) * H + unit);
        }
        const bool has_state = b < step.rows_before;
        if constexpr (Cell::has_c)
            c = has_state ? static_cast<const A*>(step.c)[b * H + unit]
                          : load<S>(d.c0, b * H + unit);
        // With a projection h_{t-1} has another size; the cells that allow one do not read it.
        if (!step.unprojected)
            h_prev =
                has_state ? load<S>(step.h, b * step.h_stride + unit) : load<S>(d.h0, b * H + unit);
    }
    add_biases<Cell, S>(d, H, unit, x, r);
    if (!alive) return;
    const ForwardOutputs<Cell, S> out = forward_element<Cell, S>(x, r, h_prev, c);
    out.store_saved(d, H, at, unit);
    if constexpr (Cell::has_c) {
        if (b >= step.rows_after)
            store<S>(d.c_n, b * H + unit, c);
        else if (step.stores_c)
            static_cast<A*>(d.c)[b * H + unit] = c;
    }
    if (step.unprojected) {
        static_cast<S*>(step.unprojected)[b * H + unit] = out.h;
    } else {
        if (b >= step.rows_after || step.stores_h) static_cast<S*>(d.h)[b * H + unit] = out.h;
        out.store_output(d, launch.size.output_stride, at, unit);
    }
}

__device__ __forceinline__ BackwardRow row_of(const BackwardStep& step, int64_t b) {
    return {b, step.row + b, b < step.rows_before ? step.row_before + b : -1};
}

// Sets dh to dL/dh_t of a row that is alive in this step and returns true. For a row that has
// reached its initial state, completes grad_h0 and returns false. passes_h: whether the step after
// has left a part of dL/dh_t in d.dh.
template <class S, bool passes_h>
__device__ __forceinline__ bool add_gradients_of_h(const BackwardArrays& d, const LayerSize& z,
                                                   const BackwardStep& step, const BackwardRow& row,
                                                   int64_t unit, Arithmetic<S>& dh) {
    const int64_t at = row.b * z.recurrent + unit;
    Arithmetic<S>& running = static_cast<Arithmetic<S>*>(d.dh)[at];
    dh = load<S>(row.b < step.rows_after ? step.r : d.dh_n, at);
    if (passes_h && row.b < step.rows_after) dh += running;
    if (row.b < step.rows) {
        dh += load<S>(d.grad_output, row.at * z.grad_output_stride + unit);
        return true;
    }
    running = dh;
    return false;
}

// The gate gradients of an element; zeros if its row is not alive in this step.
template <class Cell, class S>
__device__ __forceinline__ BackwardOutputs<Cell, S> backward_unit(const BackwardArrays& d,
                                                                  const LayerSize& z,
                                                                  const BackwardStep& step,
                                                                  int64_t b, int64_t unit) {
    using A = Arithmetic<S>;
    const bool alive = b < step.rows;
    if ((!alive && (step.dh || b >= step.rows_after)) || unit >= z.hidden) return {};

    const BackwardRow row = row_of(step, b);
    A dh;
    if (step.dh)
        dh = load<S>(step.dh, b * z.hidden + unit);
    else if (!add_gradients_of_h<S, Cell::passes_h>(d, z, step, row, unit, dh))
        return {};
    A dc{};
    if constexpr (Cell::has_c) {
        const int64_t at = b * z.hidden + unit;
        dc = b < step.rows_after ? static_cast<const A*>(d.dc)[at] : load<S>(d.dc_n, at);
    }
    using In = BackwardInputs<Cell, S>;
    const In in([&](int kind) {
        // With a projection h_{t-1} has another size.
        const bool wanted = kind == In::h_prev ? !step.dh : kind != In::grad_output;
        const S* from = wanted ? In::source(d, z, row, kind) : nullptr;
        return from ? from[unit] : narrow<S>(0);
    });
    const BackwardOutputs<Cell, S> out = backward_element<Cell, S>(in, dh, dc);
    out.store(d, z.hidden, row.at, unit);
    if (d.prev && !step.dh)
        static_cast<S*>(d.prev)[row.at * z.hidden + unit] = in.value[In::h_prev];
    if constexpr (Cell::has_c) static_cast<A*>(d.dc)[b * z.hidden + unit] = dc;
    if constexpr (Cell::passes_h) static_cast<A*>(d.dh)[b * z.hidden + unit] = dh;
    if constexpr (allows_projection<Cell>)
        if (step.unprojected) {
            A saved[Cell::saved + 1];
            for (int i = 0; i < Cell::saved; ++i) saved[i] = widen(in.value[i]);
            store<S>(step.unprojected, row.at * z.hidden + unit,
                     Cell::output(saved, widen(in.value[In::c])));
        }
    return out;
}

template <class Cell, class S>
__global__ void __launch_bounds__(threads)
    backward_step(const __grid_constant__ Launch<BackwardStep, BackwardArrays> launch) {
    const BackwardStep& step = launch.step[blockIdx.z];
    const LayerSize& z = launch.size;
    const auto [b, unit] = element_of_thread();
    const BackwardArrays& d = launch.direction[blockIdx.z];
    BiasSums<Cell, S> biases(step, d.biases, z.hidden, unit);
    biases.add(backward_unit<Cell, S>(d, z, step, b, unit));
}

template <class S>
__global__ void __launch_bounds__(threads)
    backward_sum(const __grid_constant__ Launch<BackwardSum, BackwardArrays> launch) {
    const BackwardArrays& d = launch.direction[blockIdx.z];
    const BackwardStep& step = launch.step[blockIdx.z].step;
    const LayerSize& z = launch.size;
    const auto [b, unit] = element_of_thread();
    if ((b >= step.rows && b >= step.rows_after) || unit >= z.recurrent) return;

    const BackwardRow row = row_of(step, b);
    Arithmetic<S> dh;
    if (!add_gradients_of_h<S, /*passes_h=*/false>(d, z, step, row, unit, dh)) return;
    store<S>(launch.step[blockIdx.z].dh, row.at * z.recurrent + unit, dh);
    if (d.prev) {
        const S* h_prev = previous_h<S>(d, z, row);
        static_cast<S*>(d.prev)[row.at * z.recurrent + unit] = h_prev ? h_prev[unit] : narrow<S>(0);
    }
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
using Kernel = void (*)(Launch<Step, Arrays>);

template <class Step, class Arrays>
cudaError_t launch(Kernel<Step, Arrays> kernel, const LayerSize& size, int64_t units,
                   int directions, const Arrays* direction, const Step* step, cudaStream_t stream) {
    int64_t rows = 0;
    Launch<Step, Arrays> parameters{size, {}, {}};
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
    return with_storage(storage, [&]<class S>(S) {
#define FASTRNN_ENTRY(name, Cell) forward_step<Cell, S>,
        static constexpr Kernel<ForwardStep, ForwardArrays> kernels[] = {
            FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)};
#undef FASTRNN_ENTRY
        return launch(kernels[cell], size, size.hidden, directions, direction, step, stream);
    });
}

cudaError_t launch_backward_step(int cell, Storage storage, const LayerSize& size, int directions,
                                 const BackwardArrays* direction, const BackwardStep* step,
                                 cudaStream_t stream) {
    return with_storage(storage, [&]<class S>(S) {
#define FASTRNN_ENTRY(name, Cell) backward_step<Cell, S>,
        static constexpr Kernel<BackwardStep, BackwardArrays> kernels[] = {
            FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)};
#undef FASTRNN_ENTRY
        return launch(kernels[cell], size, size.hidden, directions, direction, step, stream);
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
