// The kernels of a step that depend on the cell. step.cu instantiates them for the cells of the
// registry, and the library of a cell of the user's own for that one (../own_cell.cuh).
#pragma once
#include "../common/element.cuh"
#include "bias_sums.cuh"
#include "step.h"

namespace fastrnn::cuda {

constexpr int step_threads = step_tile_units * step_tile_rows;

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
__global__ void __launch_bounds__(step_threads)
    forward_step(const __grid_constant__ StepArguments<ForwardStep, ForwardArrays> launch) {
    using A = Arithmetic<S>;
    constexpr int G = Cell::gates;
    const ForwardArrays& d = launch.direction[blockIdx.z];
    const ForwardStep& step = launch.step[blockIdx.z];
    const auto [b, unit] = element_of_thread();
    const int64_t H = launch.size.hidden, at = step.row + b;
    const bool alive = b < step.rows && unit < H;

    A x[G] = {}, r[G] = {}, c{}, h_prev{};
    if (alive) {
        const bool from_zeros = has_event(step.entering, b, reset);
        for (int g = 0; g < G; ++g) {
            x[g] = load<S>(d.x, (at * G + g) * H + unit);
            if (!from_zeros) r[g] = load<S>(step.r, (b * G + g) * H + unit);
        }
        const bool has_state = b < step.rows_before;
        if constexpr (Cell::has_c)
            if (!from_zeros)
                c = has_state ? static_cast<const A*>(step.c)[b * step.c_stride + unit]
                              : load<S>(d.c0, b * H + unit);
        // With a projection h_{t-1} has another size; the cells that allow one do not read it.
        if (!step.unprojected && !from_zeros)
            h_prev =
                has_state ? load<S>(step.h, b * step.h_stride + unit) : load<S>(d.h0, b * H + unit);
    }
    add_biases<Cell, S>(d, H, unit, x, r);
    if (!alive) return;
    const bool ended = has_event(step.events, b, past_end);
    const A c_prev = c;
    ForwardOutputs<Cell, S> out = forward_element<Cell, S>(x, r, h_prev, c);
    if (ended) c = c_prev, out.c = narrow<S>(c), out.h = narrow<S>(0);
    out.store_saved(d, launch.size, at, unit);
    if constexpr (Cell::has_c) {
        if (b >= step.rows_after)
            store<S>(d.c_n, b * H + unit, c);
        else if (step.stores_c)
            static_cast<A*>(d.c)[b * H + unit] = c;
    }
    if (step.unprojected) {
        static_cast<S*>(step.unprojected)[b * H + unit] = out.h;
    } else {
        if ((b >= step.rows_after || step.stores_h) && !ended)
            static_cast<S*>(d.h)[b * H + unit] = out.h;
        out.store_output(d, launch.size.output_stride, at, unit);
    }
}

__device__ __forceinline__ BackwardRow row_of(const BackwardStep& step, int64_t b) {
    // Against time, a row begins after those of its steps that are past its end.
    const bool begins = b >= step.rows_before || has_event(step.entering, b, past_end);
    return {b, step.row + b, begins ? -1 : step.row_before + b, has_event(step.entering, b, reset)};
}

// Sets dh to dL/dh_t of a row that is alive in this step and returns true. For a row that has
// reached its initial state, completes grad_h0 and returns false; for one that has ended, leaves dh
// to the step before and returns false. passes_h: whether the step after has left a part of dL/dh_t
// in d.dh.
template <class S, bool passes_h>
__device__ __forceinline__ bool add_gradients_of_h(const BackwardArrays& d, const LayerSize& z,
                                                   const BackwardStep& step, const BackwardRow& row,
                                                   int64_t unit, Arithmetic<S>& dh) {
    const int64_t at = row.b * z.recurrent + unit;
    Arithmetic<S>& running = static_cast<Arithmetic<S>*>(d.dh)[at];
    const bool has_after = row.b < step.rows_after;
    dh = has_event(step.entering_after, row.b, reset) ? Arithmetic<S>{}
                                                      : load<S>(has_after ? step.r : d.dh_n, at);
    if ((passes_h || step.has_events) && has_after) dh += running;
    if (row.b < step.rows && !has_event(step.events, row.b, past_end)) {
        dh += load<S>(d.grad_output, row.at * z.grad_output_stride + unit);
        return true;
    }
    running = dh;
    return false;
}

// Zeros in the place of what backward_unit stores for the gradients of weights.
template <class Cell, class S>
__device__ __forceinline__ void store_no_gradients(const BackwardArrays& d, const LayerSize& z,
                                                   const BackwardStep& step, const BackwardRow& row,
                                                   int64_t unit) {
    BackwardOutputs<Cell, S>{}.store(d, z.hidden, row.at, unit);
    if (d.prev && !step.dh) store<S>(d.prev, row.at * z.hidden + unit, 0);
    if (step.unprojected) store<S>(step.unprojected, row.at * z.hidden + unit, 0);
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
    A dh, dc{};
    if (step.dh)
        dh = load<S>(step.dh, b * z.hidden + unit);
    else if (!add_gradients_of_h<S, Cell::passes_h>(d, z, step, row, unit, dh) && !alive)
        return {};
    if constexpr (Cell::has_c) {
        const int64_t at = b * z.hidden + unit;
        dc = b < step.rows_after ? static_cast<const A*>(d.dc)[at] : load<S>(d.dc_n, at);
    }
    if (has_event(step.events, b, past_end)) {
        if constexpr (Cell::has_c) static_cast<A*>(d.dc)[b * z.hidden + unit] = dc;
        store_no_gradients<Cell, S>(d, z, step, row, unit);
        return {};
    }
    if constexpr (Cell::has_c) {
        dc += gradient_of_c<S>(d, z, row.at, unit);
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
    if constexpr (Cell::has_c)
        static_cast<A*>(d.dc)[b * z.hidden + unit] = row.from_zeros ? A{} : dc;
    if ((Cell::passes_h || step.has_events) && !step.dh)
        static_cast<A*>(d.dh)[b * z.hidden + unit] = row.from_zeros ? A{} : dh;
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
__global__ void __launch_bounds__(step_threads)
    backward_step(const __grid_constant__ StepArguments<BackwardStep, BackwardArrays> launch) {
    const BackwardStep& step = launch.step[blockIdx.z];
    const LayerSize& z = launch.size;
    const auto [b, unit] = element_of_thread();
    const BackwardArrays& d = launch.direction[blockIdx.z];
    BiasSums<Cell, S> biases(step, d.biases, z.hidden, unit);
    biases.add(backward_unit<Cell, S>(d, z, step, b, unit));
}

}  // namespace fastrnn::cuda
