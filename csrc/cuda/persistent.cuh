// The persistent kernels: one launch runs all steps of both directions of a layer. Weights stay in
// registers, states in shared memory. Each block computes its units of its rows, step after step:
//   1. what the step needs beside the product is read, while the others finish the step before;
//   2. at the barrier, all of h_{t-1} (backward: of the gate gradients) is in the exchange buffer;
//   3. each warp multiplies its slice of it with its weights, and leaves sums in shared memory;
//   4. each thread adds up the slices for its elements, one unit of one row each, and applies the
//      cell; the results go to the exchange buffer, and to memory.
// An element belongs to the same thread in every step, so that its states are that thread's own.
// Included by persistent_*.cu, one for each storage type.
#pragma once
#include "../cells/registry.h"
#include "element.cuh"
#include "grid_barrier.cuh"
#include "persistent_kernel.h"
#include "resident.cuh"

namespace fastrnn::cuda {

// The steps of a direction in the order they are handled.
class Walk {
public:
    __device__ __forceinline__ Walk(const Sequence& sequence, bool ascending)
        : sequence_(sequence), step_(ascending ? 0 : -1), ascending_(ascending) {
        next_rows = rows_in(ascending ? 0 : sequence.steps - 1);
        next_first = ascending ? 0 : sequence.rows - next_rows;
        step_ = ascending ? -1 : sequence.steps;
        advance();
    }

    // After the last step there are no rows.
    __device__ __forceinline__ void advance() {
        step_ += ascending_ ? 1 : -1;
        first = next_first, rows = next_rows;
        const int64_t next = step_ + (ascending_ ? 1 : -1);
        next_rows = next >= 0 && next < sequence_.steps ? rows_in(next) : 0;
        next_first = ascending_ ? first + rows : first - next_rows;
    }

    int64_t first, rows;            // of this step in the data, and how many
    int64_t next_first, next_rows;  // of the step handled after it

private:
    __device__ __forceinline__ int64_t rows_in(int64_t step) const {
        return sequence_.batch_sizes ? sequence_.batch_sizes[step] : sequence_.batch;
    }

    const Sequence& sequence_;
    int64_t step_;
    bool ascending_;
};

// A block's part of the work, and a thread's part of that. O: outputs of a unit.
template <class S, int O>
struct Part {
    const Tiling& tiling;
    const int64_t hidden, first_unit, first_row;
    const int rows;                        // of the group
    const int tile, slice;                 // of the warp
    const int first_chunk, chunks;         // of its slice
    const int column, unit_row, row_step;  // of the thread's elements: unit, and rows in a tile
    int turn = 0;                          // which of the two buffers of sums

    template <class Arguments>
    __device__ __forceinline__ explicit Part(const Arguments& a)
        : tiling(a.tiling),
          hidden(a.size.hidden),
          first_unit(int64_t(blockIdx.x) * tiling.units()),
          first_row(int64_t(blockIdx.y) * tiling.group_rows),
          rows(clamp(a.sequence.batch)),
          tile(threadIdx.x / 32 % tiling.tiles),
          slice(threadIdx.x / 32 / tiling.tiles),
          first_chunk(slice * tiling.slice),
          chunks(min(tiling.slice, a.chunks - first_chunk)),
          column(threadIdx.x % tiling.units()),
          unit_row(threadIdx.x / tiling.units()),
          row_step(4 * tiling.slices) {}

    // Rows of the group among the first n of the batch.
    __device__ __forceinline__ int clamp(int64_t n) const {
        n -= first_row;
        return n < 0 ? 0 : n < tiling.group_rows ? int(n) : tiling.group_rows;
    }

    __device__ __forceinline__ int64_t unit() const { return first_unit + column; }

    // Whether the thread's i-th element of the tile of rows from row0 on is one of `count` rows of the
    // group; row: which.
    __device__ __forceinline__ bool element(int row0, int i, int count, int& row) const {
        row = row0 + unit_row + i * row_step;
        return row < row0 + tile_rows && row < count && unit() < hidden;
    }

    // Calls f(row of the group) for each of the thread's elements.
    template <class F>
    __device__ __forceinline__ void for_each_element(F f) const {
        int row;
        for (int row0 = 0; row0 < rows; row0 += tile_rows)
            for (int i = 0; i < most_elements; ++i)
                if (element(row0, i, rows, row)) f(row);
    }

    __device__ __forceinline__ int state_at(int row) const { return row * tiling.units() + column; }

    // Multiplies a tile of rows; `sums` are then complete.
    template <class Weights>
    __device__ __forceinline__ void multiply(const Weights& weights, const S* exchange,
                                             int64_t width, int row0, int count, float* sums) {
        turn ^= 1;
        sums += turn * tiling.sums(O);
        const int stride = tiling.sums_stride();
        weights.multiply(exchange + row0 * width + first_chunk * chunk_size, width, count - row0,
                         chunks, sums + (slice * O * tiling.tiles + tile) * stride,
                         tiling.tiles * stride);
        __syncthreads();
    }

    // The sum of all slices, in a fixed order.
    __device__ __forceinline__ float sum(const float* sums, int row, int output) const {
        const int stride = tiling.sums_stride();
        sums += turn * tiling.sums(O) + (output * tiling.tiles + column / tile_units) * stride +
                row % tile_rows * tile_units + column % tile_units;
        float total = 0;
        for (int k = 0; k < tiling.slices; ++k) total += sums[k * O * tiling.tiles * stride];
        return total;
    }
};

template <class S>
__device__ __forceinline__ S* exchange_rows(void* exchange, int64_t batch, int64_t width, int turn,
                                            int64_t first_row) {
    return static_cast<S*>(exchange) +
           ((int64_t(turn) * gridDim.z + blockIdx.z) * batch + first_row) * width;
}

__device__ __forceinline__ unsigned* counter_of_group(unsigned* counters) {
    return counters + (blockIdx.z * gridDim.y + blockIdx.y) * counter_stride;
}

template <class Cell, class S>
__global__ void __launch_bounds__(most_threads<S>)
    persistent_forward(const __grid_constant__ PersistentArguments<ForwardDirection> a) {
    constexpr int G = Cell::gates;
    extern __shared__ float4 shared_memory[];
    const ForwardDirection& d = a.direction[blockIdx.z];
    const int64_t H = a.size.hidden, width = a.width;
    Part<S, G> part(a);
    const int64_t unit = part.unit();
    float* sums = reinterpret_cast<float*>(shared_memory);
    float* states = sums + 2 * part.tiling.sums(G);              // c: [rows, units]
    float* biases = states + Cell::has_c * part.tiling.state();  // [2][G][units]
    const auto exchange = [&](int turn) {
        return exchange_rows<S>(a.exchange, a.sequence.batch, width, turn, part.first_row);
    };

    Resident<S, most_chunks(G), G> weights;
    weights.load(part.chunks, [&](int gate, int unit_of_tile, int chunk) {
        const int64_t own = part.first_unit + part.tile * tile_units + unit_of_tile,
                      k = int64_t(part.first_chunk + chunk) * chunk_size;
        return ChunkWeights<S>{
            static_cast<const S*>(a.weight_hh[blockIdx.z]) + (gate * H + own) * H + k, 1,
            own < H ? H - k : 0};
    });
    if (part.unit_row == 0 && unit < H)
        for (int g = 0; g < G; ++g) {
            biases[g * part.tiling.units() + part.column] = load<S>(d.bias_ih, g * H + unit);
            biases[(G + g) * part.tiling.units() + part.column] = load<S>(d.bias_hh, g * H + unit);
        }
    part.for_each_element([&](int row) {
        const int64_t at = (part.first_row + row) * H + unit;
        if constexpr (Cell::has_c) states[part.state_at(row)] = static_cast<const float*>(d.c)[at];
        // Into both: a row that joins later finds it at whatever step.
        for (int turn = 0; turn < 2; ++turn)
            exchange(turn)[row * width + unit] = static_cast<const S*>(d.h)[at];
    });
    GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    barrier.arrive();

    Walk walk(a.sequence, blockIdx.z == 0);
    for (int64_t step = 0; step < a.sequence.steps; ++step, walk.advance()) {
        const S* before = exchange(step & 1);
        S* after = exchange(~step & 1);
        const int rows = part.clamp(walk.rows), next_rows = part.clamp(walk.next_rows);
        for (int row0 = 0; row0 < rows; row0 += tile_rows) {
            struct Inputs {
                S x[G], h_prev;
            };
            const auto inputs_of = [&](int row) {
                Inputs in;
                const int64_t at = walk.first + part.first_row + row;
                for (int g = 0; g < G; ++g)
                    in.x[g] = static_cast<const S*>(d.x)[(at * G + g) * H + unit];
                in.h_prev = before[row * width + unit];
                return in;
            };
            int row;
            Inputs first;
            if (part.element(row0, 0, rows, row)) first = inputs_of(row);
            if (row0 == 0) barrier.wait();
            part.multiply(weights, before, width, row0, rows, sums);
#pragma unroll
            for (int i = 0; i < most_elements; ++i) {
                if (!part.element(row0, i, rows, row)) continue;
                const Inputs in = i == 0 ? first : inputs_of(row);
                const int64_t b = part.first_row + row, at = walk.first + b;
                float x[G], r[G], c{};
                for (int g = 0; g < G; ++g) {
                    x[g] = widen(in.x[g]) + biases[g * part.tiling.units() + part.column];
                    r[g] = part.sum(sums, row, g) +
                           biases[(G + g) * part.tiling.units() + part.column];
                }
                if constexpr (Cell::has_c) c = states[part.state_at(row)];
                const float h = forward_element<Cell, S>(d, H, at, unit, x, r, widen(in.h_prev), c);
                if constexpr (Cell::has_c) states[part.state_at(row)] = c;
                after[row * width + unit] = narrow<S>(h);
                store<S>(d.output, at * a.size.output_stride + unit, h);
                if (row >= next_rows) {  // its last step
                    store<S>(d.h, b * H + unit, h);
                    if constexpr (Cell::has_c) static_cast<float*>(d.c)[b * H + unit] = c;
                }
            }
        }
        barrier.arrive();
    }
}

template <class Cell, class S>
__global__ void __launch_bounds__(most_threads<S>)
    persistent_backward(const __grid_constant__ PersistentArguments<BackwardDirection> a) {
    constexpr int G = Cell::gates;
    extern __shared__ float4 shared_memory[];
    const BackwardDirection& d = a.direction[blockIdx.z];
    const LayerSize& z = a.size;
    const int64_t H = z.hidden, width = a.width, gate_width = width / G;
    Part<S, 1> part(a);
    const int64_t unit = part.unit();
    float* sums = reinterpret_cast<float*>(shared_memory);
    float* dh_states = sums + 2 * part.tiling.sums(1);   // what is known of dh: [rows, units]
    float* dc_states = dh_states + part.tiling.state();  // [rows, units]
    const auto exchange = [&](int turn) {
        return exchange_rows<S>(a.exchange, a.sequence.batch, width, turn, part.first_row);
    };

    Resident<S, most_chunks(1), 1> weights;
    weights.load(part.chunks, [&](int, int unit_of_tile, int chunk) {
        const int64_t own = part.first_unit + part.tile * tile_units + unit_of_tile,
                      k = int64_t(part.first_chunk + chunk) * chunk_size, gate = k / gate_width,
                      row = k % gate_width;
        return ChunkWeights<S>{
            static_cast<const S*>(a.weight_hh[blockIdx.z]) + (gate * H + row) * H + own, H,
            own < H ? H - row : 0};
    });
    part.for_each_element([&](int row) {
        const int64_t at = (part.first_row + row) * H + unit;
        dh_states[part.state_at(row)] = static_cast<const float*>(d.dh)[at];
        if constexpr (Cell::has_c)
            dc_states[part.state_at(row)] = static_cast<const float*>(d.dc)[at];
    });
    GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    barrier.arrive();

    // One more than there are steps: the last takes the first step's gradients to the initial state.
    Walk walk(a.sequence, blockIdx.z == 1);
    int linked = 0;  // rows that were alive in the step handled before
    for (int64_t step = 0; step <= a.sequence.steps; ++step, walk.advance()) {
        const S* before = exchange(step & 1);
        S* after = exchange(~step & 1);
        const int rows = part.clamp(walk.rows);
        for (int row0 = 0; row0 < max(rows, linked); row0 += tile_rows) {
            struct Inputs {
                BackwardInputs<Cell, S> cell;
                float dh, h_prev;
            };
            const auto inputs_of = [&](int row) {
                const int64_t b = part.first_row + row;
                const BackwardRow at{b, walk.first + b,
                                     b < walk.next_rows ? walk.next_first + b : -1};
                return Inputs{{d, z, at, unit},
                              whole_dh<S>(d, z, at.at, unit, 0),
                              previous_h<S>(d, z, at, unit)};
            };
            int row;
            Inputs first;
            if (part.element(row0, 0, rows, row)) first = inputs_of(row);
            if (row0 == 0) barrier.wait();
            if (row0 < linked) part.multiply(weights, before, width, row0, linked, sums);
#pragma unroll
            for (int i = 0; i < most_elements; ++i) {
                if (!part.element(row0, i, max(rows, linked), row)) continue;
                const int64_t b = part.first_row + row;
                float dh = dh_states[part.state_at(row)], dc{}, dgates[Cell::grads];
                if constexpr (Cell::has_c) dc = dc_states[part.state_at(row)];
                if (row < linked) dh += part.sum(sums, row, 0);
                if (row >= rows) {  // at its initial state
                    static_cast<float*>(d.dh)[b * H + unit] = dh;
                    if constexpr (Cell::has_c) static_cast<float*>(d.dc)[b * H + unit] = dc;
                    continue;
                }
                const Inputs in = i == 0 ? first : inputs_of(row);
                dh_states[part.state_at(row)] = backward_element<Cell, S>(
                    d, H, walk.first + b, unit, in.cell, in.h_prev, dh + in.dh, dc, dgates);
                if constexpr (Cell::has_c) dc_states[part.state_at(row)] = dc;
                for (int g = 0; g < G; ++g)
                    after[row * width + g * gate_width + unit] =
                        narrow<S>(dgates[Cell::grads - G + g]);
            }
        }
        linked = rows;
        barrier.arrive();
    }
}

}  // namespace fastrnn::cuda

// Defines `persistent_<suffix>`: the kernels of each cell of the registry, in its order.
#define FASTRNN_ENTRY(name, Cell)                                                                 \
    {{reinterpret_cast<const void*>(&persistent_forward<Cell, Stored>), most_threads<Stored>,     \
      Cell::gates, 1, Cell::has_c, 2 * Cell::gates},                                              \
     {reinterpret_cast<const void*>(&persistent_backward<Cell, Stored>), most_threads<Stored>, 1, \
      Cell::gates, 1 + Cell::has_c, 0}},
#define FASTRNN_DEFINE_PERSISTENT(suffix, storage)                                            \
    namespace fastrnn::cuda {                                                                 \
    namespace {                                                                               \
    using Stored = storage;                                                                   \
    }                                                                                         \
    extern const PersistentKernel persistent_##suffix[cell_count][2];                         \
    const PersistentKernel persistent_##suffix[][2] = {FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)}; \
    }
