#include "step.h"

#include "../cells/registry.h"
#include "element.cuh"

namespace fastrnn::cuda {
namespace {

template <class Step, class Direction>
struct Launch {
    LayerSize size;
    Direction direction[2];
    Step step[2];
};

// A block is a tile of rows and units, units along the lanes, so that accesses coalesce.
constexpr int threads = 256;

struct Place {
    int64_t row, unit;
};

__device__ __forceinline__ Place place() {
    return {int64_t(blockIdx.x) * blockDim.y + threadIdx.y,
            int64_t(blockIdx.y) * blockDim.x + threadIdx.x};
}

template <class Cell, class S>
__global__ void __launch_bounds__(threads)
    forward_step(const __grid_constant__ Launch<ForwardStep, ForwardDirection> launch) {
    using A = Arithmetic<S>;
    constexpr int G = Cell::gates;
    const ForwardDirection& d = launch.direction[blockIdx.z];
    const ForwardStep& step = launch.step[blockIdx.z];
    const auto [b, unit] = place();
    const int64_t H = launch.size.hidden, at = step.row + b;
    if (b >= step.rows || unit >= H) return;

    A x[G], r[G];
    for (int g = 0; g < G; ++g) {
        x[g] = load<S>(d.x, (at * G + g) * H + unit) + load<S>(d.bias_ih, g * H + unit);
        r[g] = load<S>(step.r, (b * G + g) * H + unit) + load<S>(d.bias_hh, g * H + unit);
    }
    const bool begun = b < step.begun;
    A c{};
    if constexpr (Cell::has_c)
        c = begun ? static_cast<const A*>(step.c)[b * H + unit] : load<S>(d.c0, b * H + unit);
    // A cell that allows a projection does without h_{t-1}: that has another size.
    const A h_prev = step.unprojected ? A{}
                     : begun          ? load<S>(step.h, b * step.h_stride + unit)
                                      : load<S>(d.h0, b * H + unit);
    const ForwardOutputs<Cell, S> out = forward_element<Cell, S>(x, r, h_prev, c);
    out.keep(d, H, at, unit);
    if constexpr (Cell::has_c) {
        if (b >= step.go_on)
            store<S>(d.c_n, b * H + unit, c);
        else if (step.leaves_c)
            static_cast<A*>(d.c)[b * H + unit] = c;
    }
    if (step.unprojected) {
        static_cast<S*>(step.unprojected)[b * H + unit] = out.h;
    } else {
        if (b >= step.go_on || step.leaves_h) static_cast<S*>(d.h)[b * H + unit] = out.h;
        out.put(d, launch.size.output_stride, at, unit);
    }
}

__device__ __forceinline__ BackwardRow row_of(const BackwardStep& step, int64_t b) {
    return {b, step.row + b, b < step.prev_rows ? step.prev_row + b : -1};
}

// Adds up dL/dh_t of a row that is alive, and says so. One that has reached its initial state gets
// what comes through W_hh, and is done. `known` is where the row's part of dh is.
template <class S>
__device__ __forceinline__ bool goes_on(const BackwardDirection& d, const LayerSize& z,
                                        const BackwardStep& step, const BackwardRow& row,
                                        int64_t unit, Arithmetic<S>*& known, Arithmetic<S>& dh) {
    known = static_cast<Arithmetic<S>*>(d.dh) + row.b * z.recurrent + unit;
    const int64_t at = row.b * z.recurrent + unit;
    dh = row.b < step.linked ? *known + load<S>(step.r, at) : load<S>(d.dh_n, at);
    if (row.b < step.rows) {
        dh += load<S>(d.grad_output, row.at * z.grad_output_stride + unit);
        return true;
    }
    *known = dh;
    return false;
}

template <class Cell, class S>
__global__ void __launch_bounds__(threads)
    backward_step(const __grid_constant__ Launch<BackwardStep, BackwardDirection> launch) {
    using A = Arithmetic<S>;
    const BackwardDirection& d = launch.direction[blockIdx.z];
    const BackwardStep& step = launch.step[blockIdx.z];
    const LayerSize& z = launch.size;
    const auto [b, unit] = place();
    const bool alive = b < step.rows;
    if ((!alive && (step.dh || b >= step.linked)) || unit >= z.hidden) return;

    const BackwardRow row = row_of(step, b);
    A *known = nullptr, dh;
    if (step.dh)
        dh = load<S>(step.dh, b * z.hidden + unit);
    else if (!goes_on<S>(d, z, step, row, unit, known, dh))
        return;
    A dc{};
    if constexpr (Cell::has_c) {
        const int64_t at = b * z.hidden + unit;
        dc = b < step.linked ? static_cast<const A*>(d.dc)[at] : load<S>(d.dc_n, at);
    }
    using In = BackwardInputs<Cell, S>;
    const In in([&](int kind) {
        // With a projection h_{t-1} has another size, and such a cell does without.
        const bool wanted = kind == In::h_prev ? !step.dh && (Cell::needs_h_prev || d.prev)
                                               : kind != In::grad_output;
        const S* from = wanted ? In::source(d, z, row, kind) : nullptr;
        return from ? from[unit] : narrow<S>(0);
    });
    backward_element<Cell, S>(in, dh, dc).keep(d, z.hidden, row.at, unit);
    if (d.prev && !step.dh)
        static_cast<S*>(d.prev)[row.at * z.hidden + unit] = in.value[In::h_prev];
    if constexpr (Cell::has_c) static_cast<A*>(d.dc)[b * z.hidden + unit] = dc;
    if (known) *known = dh;
    if constexpr (allows_projection<Cell>)
        if (step.unprojected) {
            A saved[Cell::saved + 1];
            for (int i = 0; i < Cell::saved; ++i) saved[i] = widen(in.value[i]);
            store<S>(step.unprojected, row.at * z.hidden + unit,
                     Cell::output(saved, widen(in.value[In::c])));
        }
}

template <class S>
__global__ void __launch_bounds__(threads)
    backward_sum(const __grid_constant__ Launch<BackwardSum, BackwardDirection> launch) {
    using A = Arithmetic<S>;
    const BackwardDirection& d = launch.direction[blockIdx.z];
    const BackwardStep& step = launch.step[blockIdx.z].step;
    const LayerSize& z = launch.size;
    const auto [b, unit] = place();
    if ((b >= step.rows && b >= step.linked) || unit >= z.recurrent) return;

    const BackwardRow row = row_of(step, b);
    A *known, dh;
    if (!goes_on<S>(d, z, step, row, unit, known, dh)) return;
    *known = A{};
    store<S>(launch.step[blockIdx.z].dh, row.at * z.recurrent + unit, dh);
    if (d.prev) {
        const S* h_prev = previous_h<S>(d, z, row);
        static_cast<S*>(d.prev)[row.at * z.recurrent + unit] = h_prev ? h_prev[unit] : narrow<S>(0);
    }
}

template <class Step, class Direction>
using Kernel = void (*)(Launch<Step, Direction>);

template <class Step, class Direction>
cudaError_t launch(Kernel<Step, Direction> kernel, const LayerSize& size, int64_t units,
                   int64_t rows, int directions, const Direction* direction, const Step* step,
                   cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    Launch<Step, Direction> parameters{size, {}, {}};
    for (int i = 0; i < directions; ++i) {
        parameters.direction[i] = direction[i];
        parameters.step[i] = step[i];
    }
    const unsigned x = units >= threads ? threads : (units + 31) / 32 * 32, y = threads / x;
    const dim3 grid((rows + y - 1) / y, (units + x - 1) / x, directions);
    kernel<<<grid, dim3(x, y), 0, stream>>>(parameters);
    return cudaGetLastError();
}

int64_t rows_of(const ForwardStep& step) { return step.rows; }
int64_t rows_of(const BackwardStep& step) {
    return step.rows > step.linked || step.dh ? step.rows : step.linked;
}
int64_t rows_of(const BackwardSum& step) { return rows_of(step.step); }

template <class Step>
int64_t most_rows(int directions, const Step* step) {
    int64_t rows = 0;
    for (int i = 0; i < directions; ++i)
        if (rows_of(step[i]) > rows) rows = rows_of(step[i]);
    return rows;
}

// Calls f with a value of the storage type.
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
                                const ForwardDirection* direction, const ForwardStep* step,
                                cudaStream_t stream) {
    return with_storage(storage, [&]<class S>(S) {
#define FASTRNN_ENTRY(name, Cell) forward_step<Cell, S>,
        static constexpr Kernel<ForwardStep, ForwardDirection> kernels[] = {
            FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)};
#undef FASTRNN_ENTRY
        return launch(kernels[cell], size, size.hidden, most_rows(directions, step), directions,
                      direction, step, stream);
    });
}

cudaError_t launch_backward_step(int cell, Storage storage, const LayerSize& size, int directions,
                                 const BackwardDirection* direction, const BackwardStep* step,
                                 cudaStream_t stream) {
    return with_storage(storage, [&]<class S>(S) {
#define FASTRNN_ENTRY(name, Cell) backward_step<Cell, S>,
        static constexpr Kernel<BackwardStep, BackwardDirection> kernels[] = {
            FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)};
#undef FASTRNN_ENTRY
        return launch(kernels[cell], size, size.hidden, most_rows(directions, step), directions,
                      direction, step, stream);
    });
}

cudaError_t launch_backward_sum(Storage storage, const LayerSize& size, int directions,
                                const BackwardDirection* direction, const BackwardSum* step,
                                cudaStream_t stream) {
    return with_storage(storage, [&]<class S>(S) {
        return launch<BackwardSum, BackwardDirection>(backward_sum<S>, size, size.recurrent,
                                                      most_rows(directions, step), directions,
                                                      direction, step, stream);
    });
}

}  // namespace fastrnn::cuda
