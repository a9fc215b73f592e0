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
        : rows(0),
          sequence_(sequence),
          step_(ascending ? -1 : int(sequence.steps)),
          ascending_(ascending) {
        next_rows = rows_in(ascending ? 0 : int(sequence.steps) - 1);
        first = ascending ? 0 : sequence.rows;
        advance();
    }

    // After the last step there are no rows.
    __device__ __forceinline__ void advance() {
        first = next_first(), rows = next_rows;
        step_ += ascending_ ? 1 : -1;
        next_rows = rows_in(step_ + (ascending_ ? 1 : -1));
    }

    // The first row of the step handled next.
    __device__ __forceinline__ int64_t next_first() const {
        return ascending_ ? first + rows : first - next_rows;
    }

    int64_t first;        // row of this step in the data
    int rows, next_rows;  // of this step, and of the one handled next

private:
    __device__ __forceinline__ int rows_in(int step) const {
        if (step < 0 || step >= sequence_.steps) return 0;
        return sequence_.batch_sizes ? sequence_.batch_sizes[step] : int(sequence_.batch);
    }

    const Sequence& sequence_;
    int step_;
    const bool ascending_;
};

// A block's part of the work, and a warp's and a thread's part of that. O: outputs of a unit; tile:
// units of a tile. What is counted here fits into an int: the plan sees to it.
template <class S, int O, int tile>
class Part {
public:
    template <class Arguments>
    __device__ __forceinline__ explicit Part(const Arguments& a)
        : tiling_(a.tiling),
          column_(threadIdx.x % a.tiling.units()),
          unit(blockIdx.x * a.tiling.units() + column_),
          first_row(blockIdx.y * a.tiling.group_rows) {
        const int warp = threadIdx.x / 32, own_tile = warp % a.tiling.tiles,
                  slice = warp / a.tiling.tiles, first = slice * a.tiling.slice;
        first_unit_ = blockIdx.x * a.tiling.units() + own_tile * tile;
        first_k_ = first * chunk_size;
        chunks_ = min(a.tiling.slice, a.chunks - first);
        warp_sums_ = (slice * O * a.tiling.tiles + own_tile) * a.tiling.sums_stride();
        // A thread without a unit has no rows either.
        unit_row_ = unit < a.size.hidden ? threadIdx.x / a.tiling.units() : tile_rows;
    }

    // Rows of the group among the first n of the batch.
    __device__ __forceinline__ int rows_among(int n) const {
        return max(0, min(n - first_row, tiling_.group_rows));
    }

    // Whether the thread's i-th element of the tile of rows from row0 on is one of `count` rows of
    // the group; row: which.
    __device__ __forceinline__ bool element(int row0, int i, int count, int& row) const {
        const int row_of_tile = unit_row_ + i * (32 / tile) * tiling_.slices;
        row = row0 + row_of_tile;
        return row_of_tile < tile_rows && row < count;
    }

    // Calls f(row) for each of the thread's elements in `count` rows of the group.
    template <class F>
    __device__ __forceinline__ void for_each_element(int count, F f) const {
        int row;
        for (int row0 = 0; row0 < count; row0 += tile_rows)
            for (int i = 0; i < most_elements; ++i)
                if (element(row0, i, count, row)) f(row);
    }

    __device__ __forceinline__ int state_at(int row) const {
        return row * tiling_.units() + column_;
    }
    __device__ __forceinline__ int bias_at(int bias) const {
        return bias * tiling_.units() + column_;
    }
    // One thread of those that have the same unit.
    __device__ __forceinline__ bool first_of_unit() const { return unit_row_ == 0; }

    // The warp's weights. weights_of(unit, output, k): those of a chunk from k on, of which a unit
    // has a row.
    template <class Weights, class WeightsOf>
    __device__ __forceinline__ void load_rows(Weights& weights, WeightsOf weights_of) const {
        weights.load_rows(chunks_, [&](int unit_of_tile, int output, int chunk) {
            return weights_of(first_unit_ + unit_of_tile, output, first_k_ + chunk * chunk_size);
        });
    }
    // The same where a unit has a column. weights_of(unit, k): of the unit and those after it.
    template <class Weights, class WeightsOf>
    __device__ __forceinline__ void load_columns(Weights& weights, WeightsOf weights_of) const {
        weights.load_columns(chunks_, [&](int chunk) {
            return weights_of(first_unit_, first_k_ + chunk * chunk_size);
        });
    }

    // Multiplies a tile of rows. The sums are complete after the next __syncthreads. That is enough
    // also before the next tile, which uses the other of two buffers.
    template <class Weights>
    __device__ __forceinline__ void multiply(const Weights& weights, const S* exchange, int width,
                                             int row0, int count, float* sums) const {
        weights.multiply(exchange + row0 * width, width, first_k_, count - row0, chunks_,
                         sums + turn(row0) * tiling_.sums(O) + warp_sums_,
                         tiling_.tiles * tiling_.sums_stride());
    }

    // The sum of all slices, in a fixed order.
    __device__ __forceinline__ float sum(const float* sums, int row, int output) const {
        const int stride = tiling_.sums_stride();
        sums += turn(row) * tiling_.sums(O) + (output * tiling_.tiles + column_ / tile) * stride +
                row % tile_rows * tile + column_ % tile;
        float total = 0;
        for (int k = 0; k < tiling_.slices; ++k) total += sums[k * O * tiling_.tiles * stride];
        return total;
    }

private:
    static __device__ __forceinline__ int turn(int row) { return row / tile_rows % 2; }

    const Tiling& tiling_;
    const int column_;  // of the thread's unit in the block
    int first_unit_, first_k_, chunks_, warp_sums_, unit_row_;

public:
    const int unit;       // the thread's
    const int first_row;  // of the group
};

// The block's group in the exchange buffer that is read in a step, and written in the step before.
// Worked out wherever it is used: there are no registers to keep it in.
template <class S, class Arguments>
__device__ __forceinline__ S* exchange_of_group(const Arguments& a, int step) {
    const int64_t group = (int64_t(step & 1) * gridDim.z + blockIdx.z) * gridDim.y + blockIdx.y;
    return static_cast<S*>(a.exchange) + group * a.tiling.group_rows * a.width;
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
    const int H = a.size.hidden, width = a.width;
    const Part<S, G, forward_tile> part(a);
    const int unit = part.unit;
    float* sums = reinterpret_cast<float*>(shared_memory);
    float* states = sums + 2 * a.tiling.sums(G);              // c: [rows, units]
    float* biases = states + Cell::has_c * a.tiling.state();  // [2][G][units]

    using Weights = Resident<S, most_chunks(G, 1, forward_tile), G, forward_tile>;
    Weights weights;
    part.load_rows(weights, [&](int own, int gate, int k) {
        return WeightsRow<S>{
            static_cast<const S*>(a.weight_hh[blockIdx.z]) + (int64_t(gate) * H + own) * H + k,
            own < H ? H - k : 0};
    });
    if (part.first_of_unit())
        for (int g = 0; g < G; ++g) {
            biases[part.bias_at(g)] = load<S>(d.bias_ih, g * H + unit);
            biases[part.bias_at(G + g)] = load<S>(d.bias_hh, g * H + unit);
        }
    part.for_each_element(part.rows_among(a.sequence.batch), [&](int row) {
        const int64_t at = int64_t(part.first_row + row) * H + unit;
        if constexpr (Cell::has_c) states[part.state_at(row)] = static_cast<const float*>(d.c)[at];
        // Into both: a row that joins later finds it at whatever step.
        for (int turn = 0; turn < 2; ++turn)
            exchange_of_group<S>(a, turn)[Weights::place(row, unit, width)] =
                static_cast<const S*>(d.h)[at];
    });
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    barrier.arrive();

    Walk walk(a.sequence, blockIdx.z == 0);
    for (int step = 0; step < a.sequence.steps; ++step, walk.advance()) {
        const int rows = part.rows_among(walk.rows);
        for (int row0 = 0; row0 < rows; row0 += tile_rows) {
            S x[most_elements][G], h_prev[most_elements];
            const auto read_inputs = [&](int i) {
                int row;
                // Without values for the others, the compiler would keep last step's.
                for (int g = 0; g < G; ++g) x[i][g] = narrow<S>(0);
                h_prev[i] = narrow<S>(0);
                if (!part.element(row0, i, rows, row)) return;
                const int64_t at = walk.first + part.first_row + row;
                for (int g = 0; g < G; ++g)
                    x[i][g] = static_cast<const S*>(d.x)[(at * G + g) * H + unit];
                h_prev[i] = exchange_of_group<S>(a, step)[Weights::place(row, unit, width)];
            };
            // The first while waiting, the next when the registers of the product are free again.
            read_inputs(0);
            if (row0 == 0) barrier.wait(step + 1);
            part.multiply(weights, exchange_of_group<S>(a, step), width, row0, rows, sums);
            read_inputs(1);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < most_elements; ++i) {
                if (i > 0 && i + 1 < most_elements) read_inputs(i + 1);
                int row;
                if (!part.element(row0, i, rows, row)) continue;
                const int b = part.first_row + row;
                const int64_t at = walk.first + b, state_at = int64_t(b) * H + unit;
                float x_sum[G], r_sum[G], c{};
                for (int g = 0; g < G; ++g) {
                    x_sum[g] = widen(x[i][g]) + biases[part.bias_at(g)];
                    r_sum[g] = part.sum(sums, row, g) + biases[part.bias_at(G + g)];
                }
                if constexpr (Cell::has_c) c = states[part.state_at(row)];
                const float h =
                    forward_element<Cell, S>(d, H, at, unit, x_sum, r_sum, widen(h_prev[i]), c);
                if constexpr (Cell::has_c) states[part.state_at(row)] = c;
                exchange_of_group<S>(a, step + 1)[Weights::place(row, unit, width)] = narrow<S>(h);
                store<S>(d.output, at * a.size.output_stride + unit, h);
                if (b >= walk.next_rows) {  // its last step
                    store<S>(d.h, state_at, h);
                    if constexpr (Cell::has_c) static_cast<float*>(d.c)[state_at] = c;
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
    const int H = z.hidden, width = a.width, gate_width = width / G;
    const Part<S, 1, backward_tile<S>> part(a);
    const int unit = part.unit;
    float* sums = reinterpret_cast<float*>(shared_memory);
    float* dh_states = sums + 2 * a.tiling.sums(1);   // what is known of dh: [rows, units]
    float* dc_states = dh_states + a.tiling.state();  // [rows, units]

    using Weights = Resident<S, most_chunks(1, G, backward_tile<S>), 1, backward_tile<S>>;
    Weights weights;
    part.load_columns(weights, [&](int own, int k) {
        const int gate = k / gate_width, row = k % gate_width;
        return WeightsColumns<S>{
            static_cast<const S*>(a.weight_hh[blockIdx.z]) + (int64_t(gate) * H + row) * H + own, H,
            H - row, H - own};
    });
    part.for_each_element(part.rows_among(a.sequence.batch), [&](int row) {
        const int64_t at = int64_t(part.first_row + row) * H + unit;
        dh_states[part.state_at(row)] = static_cast<const float*>(d.dh)[at];
        if constexpr (Cell::has_c)
            dc_states[part.state_at(row)] = static_cast<const float*>(d.dc)[at];
    });
    const GroupBarrier barrier(counter_of_group(a.counters), gridDim.x);
    barrier.arrive();

    // One more than there are steps: the last takes the first step's gradients to the initial
    // state.
    Walk walk(a.sequence, blockIdx.z == 1);
    int linked = 0;  // rows that were alive in the step handled before
    for (int step = 0; step <= a.sequence.steps; ++step, walk.advance()) {
        const int rows = part.rows_among(walk.rows), all_rows = max(rows, linked);
        for (int row0 = 0; row0 < all_rows; row0 += tile_rows) {
            BackwardInputs<Cell, S> inputs[most_elements];
            S grad_output[most_elements];
            const auto read_inputs = [&](int i) {
                int row;
                inputs[i] = BackwardInputs<Cell, S>();
                grad_output[i] = narrow<S>(0);
                if (!part.element(row0, i, rows, row)) return;
                const int b = part.first_row + row;
                const BackwardRow at{b, walk.first + b,
                                     b < walk.next_rows ? walk.next_first() + b : -1};
                inputs[i] = BackwardInputs<Cell, S>(d, z, at, unit, false);
                grad_output[i] = read<S>(d.grad_output, at.at * z.grad_output_stride + unit);
            };
            // As in the forward pass.
            read_inputs(0);
            if (row0 == 0) barrier.wait(step + 1);
            if (row0 < linked)
                part.multiply(weights, exchange_of_group<S>(a, step), width, row0, linked, sums);
            read_inputs(1);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < most_elements; ++i) {
                if (i > 0 && i + 1 < most_elements) read_inputs(i + 1);
                int row;
                if (!part.element(row0, i, all_rows, row)) continue;
                const int b = part.first_row + row;
                float dh = dh_states[part.state_at(row)], dc{}, dgates[Cell::grads];
                if constexpr (Cell::has_c) dc = dc_states[part.state_at(row)];
                if (row < linked) dh += part.sum(sums, row, 0);
                if (row >= rows) {  // at its initial state
                    const int64_t at = int64_t(b) * H + unit;
                    static_cast<float*>(d.dh)[at] = dh;
                    if constexpr (Cell::has_c) static_cast<float*>(d.dc)[at] = dc;
                    continue;
                }
                const int64_t at = walk.first + b;
                dh_states[part.state_at(row)] = backward_element<Cell, S>(
                    d, H, at, unit, inputs[i], dh + widen(grad_output[i]), dc, dgates);
                if (d.prev) static_cast<S*>(d.prev)[at * H + unit] = inputs[i].h_prev;
                if constexpr (Cell::has_c) dc_states[part.state_at(row)] = dc;
                for (int g = 0; g < G; ++g)
                    exchange_of_group<S>(
                        a, step + 1)[Weights::place(row, g * gate_width + unit, width)] =
                        narrow<S>(dgates[Cell::grads - G + g]);
            }
        }
        linked = rows;
        barrier.arrive();
    }
}

}  // namespace fastrnn::cuda

// Defines `persistent_<suffix>`: the kernels of each cell of the registry, in its order.
#define FASTRNN_ENTRY(name, Cell)                                                              \
    {{reinterpret_cast<const void*>(&persistent_forward<Cell, Stored>), most_threads<Stored>,  \
      forward_tile, Cell::gates, 1, Cell::has_c, 2 * Cell::gates},                             \
     {reinterpret_cast<const void*>(&persistent_backward<Cell, Stored>), most_threads<Stored>, \
      backward_tile<Stored>, 1, Cell::gates, 1 + Cell::has_c, 0}},
#define FASTRNN_DEFINE_PERSISTENT(suffix, storage)                                            \
    namespace fastrnn::cuda {                                                                 \
    namespace {                                                                               \
    using Stored = storage;                                                                   \
    }                                                                                         \
    extern const PersistentKernel persistent_##suffix[cell_count][2];                         \
    const PersistentKernel persistent_##suffix[][2] = {FASTRNN_FOR_EACH_CELL(FASTRNN_ENTRY)}; \
    }
