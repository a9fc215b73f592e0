// What both persistent backward kernels do with the elements of a block: prefetch their inputs,
// keep dh and dc in shared memory, and write gradients to memory.
#pragma once
#include "../common/backward_steps.cuh"
#include "part.cuh"
#include "tile_prefetch.cuh"

namespace fastrnn::cuda {

// P: Part or ColumnsPart.
template <class Cell, class S, class P>
struct BackwardElements {
    using In = BackwardInputs<Cell, S>;

    const PersistentArguments<BackwardArrays>& a;
    const BackwardArrays& d;  // of the direction
    P& part;
    const TilePrefetch<S, In::kinds>& inputs;
    float *dh_states, *dc_states;  // [rows, units]
    int H;
    bool in_order;
    int buffer = 0;  // of `inputs`, for the current tile

    __device__ __forceinline__ int rows_of(int step) const {
        return part.rows_among(rows_at(a.sequence, in_order, step).count);
    }

    // The rows of the tile from row0 on.
    __device__ __forceinline__ void prefetch(int to, int step, int row0) const {
        const DeviceStepRows now = rows_at(a.sequence, in_order, step),
                             before = rows_at(a.sequence, in_order, step + 1);
        inputs.prefetch(
            to, part.rows_among(now.count) - row0, H - part.first_unit, [&](int kind, int row) {
                const int b = part.first_row + row0 + row;
                const BackwardRow at{b, now.first + b, b < before.count ? before.first + b : -1};
                const S* from = In::source(d, a.size, at, kind);
                return from ? from + part.first_unit : nullptr;
            });
    }
    // Waits for the inputs of a tile, and prefetches those of the next one.
    __device__ __forceinline__ void await_inputs(const BackwardTile& tile) const {
        inputs.wait();
        __syncthreads();
        part.rematerialize();
        prefetch(buffer ^ 1, tile.next_step(), tile.next_row0());
    }
    __device__ __forceinline__ S input(const BackwardTile& tile, int kind, int row) const {
        return inputs.value(buffer, kind, row - tile.row0, part.column());
    }

    __device__ __forceinline__ BackwardState<1> state(int row) const {
        BackwardState<1> state;
        state.dh[0] = dh_states[part.state_at(row)];
        if constexpr (Cell::has_c) state.dc[0] = dc_states[part.state_at(row)];
        return state;
    }
    __device__ __forceinline__ void put_state(int row, const BackwardState<1>& state) const {
        dh_states[part.state_at(row)] = state.dh[0];
        if constexpr (Cell::has_c) dc_states[part.state_at(row)] = state.dc[0];
    }

    // The row of the data.
    __device__ __forceinline__ int64_t row_at(const BackwardTile& tile, int row) const {
        return rows_at(a.sequence, in_order, tile.step).first + part.first_row + row;
    }
    __device__ __forceinline__ float gradient_of_c(const BackwardTile& tile, int row) const {
        return d.grad_c ? cuda::gradient_of_c<S>(d, a.size, row_at(tile, row), part.unit()) : 0;
    }
    // Writes h_{t-1}, if it is wanted. at: as row_at returns it.
    __device__ __forceinline__ void write_prev(const BackwardTile& tile, int row,
                                               int64_t at) const {
        if (d.prev) static_cast<S*>(d.prev)[at * H + part.unit()] = input(tile, In::h_prev, row);
    }
    // Writes the gradients of the initial state, which the row has reached.
    __device__ __forceinline__ void write_state(int row) const {
        const int64_t at = int64_t(part.first_row + row) * H + part.unit();
        static_cast<float*>(d.dh)[at] = dh_states[part.state_at(row)];
        if constexpr (Cell::has_c) static_cast<float*>(d.dc)[at] = dc_states[part.state_at(row)];
    }
};

}  // namespace fastrnn::cuda
