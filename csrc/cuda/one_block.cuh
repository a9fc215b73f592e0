// The kernels of small layers: a block runs all steps of a direction for up to 8 rows. Its warps hold
// W_hh in their registers, 16 units each, and no other block is waited for. Each step:
//   1. a warp multiplies all of h_{t-1} (backward: of the gate gradients), which is in shared memory;
//   2. a lane has both sums of its two units and rows, applies the cell, and keeps the states;
//   3. what comes of it goes to the other one of two buffers of shared memory, and to memory.
// A step is a chain of a few hundred cycles, so that what can be is worked out before the loop.
// Included by one_block_*.cu, one for each type that products are of.
#pragma once
#include "../cells/registry.h"
#include "ahead.cuh"
#include "element.cuh"
#include "held.cuh"
#include "one_block_kernel.h"
#include "step_rows.cuh"

namespace fastrnn::cuda {

// Which rows of the data this step has, the next and the one after it: asked for that early, since
// those of packed data are read from memory.
class Walk {
public:
    __device__ __forceinline__ Walk(const Sequence& sequence, bool in_order)
        : sequence_(sequence), in_order_(in_order) {
        for (int step = 0; step < 3; ++step) at_[step] = rows_of(sequence_, in_order_, step);
    }
    __device__ __forceinline__ const StepRows& operator[](int later) const { return at_[later]; }
    // To `step`: the next one.
    __device__ __forceinline__ void go_on(int step) {
        at_[0] = at_[1], at_[1] = at_[2];
        at_[2] = rows_of(sequence_, in_order_, step + 2);
    }

private:
    const Sequence& sequence_;
    const bool in_order_;
    StepRows at_[3];
};

// A lane's units and rows, and the block's two buffers of rows that are multiplied.
template <class M>
class OneBlock {
    using S = Stored<M>;

public:
    template <class Arguments>
    __device__ __forceinline__ OneBlock(const Arguments& a, bool at_once, void* shared)
        : units(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 * 2, int(a.size.hidden), at_once),
          first_row(blockIdx.y * a.tiling.group_rows),
          group_rows(a.tiling.group_rows),
          stride_(one_block_stride(a.width, sizeof(S))),
          read_(static_cast<S*>(shared)),
          write_(read_ + group_rows * stride_) {
        for (int i = threadIdx.x; i < 2 * group_rows * stride_; i += blockDim.x)
            read_[i] = narrow<S>(0);
        __syncthreads();
    }

    // Calls f(i, row) for the lane's rows among the group's first `count`: the i-th of two, which
    // row of the group.
    template <class F>
    __device__ __forceinline__ void for_each_row(int count, F f) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = threadIdx.x % 4 + 4 * i;
            if (row < count && units.count() > 0) f(i, row);
        }
    }
    // Rows of the group among the first n of the batch.
    __device__ __forceinline__ int rows_among(int n) const {
        return max(0, min(n - first_row, group_rows));
    }

    // Puts a row's values of the lane's units into the buffer that is read in the next step. first: of
    // all units' values.
    __device__ __forceinline__ void put(int row, int first, const float (&value)[2]) const {
        store_pair(write_ + row * stride_ + first + units.first(),
                   Pair<S>{{operand<M>(value[0]), operand<M>(value[1])}});
    }
    template <class Held, int N>
    __device__ __forceinline__ void multiply(const Held& held, int chunks,
                                             float (&sum)[N][2][2]) const {
        held.multiply(read_, stride_, group_rows, chunks, sum);
    }
    // The step is over, for all threads.
    __device__ __forceinline__ void turn() {
        S* const read = read_;
        read_ = write_, write_ = read;
        __syncthreads();
    }

    const TwoUnits units;
    const int first_row, group_rows;

private:
    const int stride_;
    S *read_, *write_;
};

__device__ __forceinline__ int later(int stage, int by) {
    return stage + by < ahead_stages ? stage + by : stage + by - ahead_stages;
}

// Keeps a pointer in a register: the compiler would read it from the arguments at every step.
template <class T>
__device__ __forceinline__ T* kept(const void* pointer) {
    size_t in_global = __cvta_generic_to_global(pointer);
    asm volatile("" : "+l"(in_global));
    return static_cast<T*>(__cvta_global_to_generic(in_global));
}

template <class Cell, class M>
__global__ void __launch_bounds__(one_block_threads(Cell::gates, sizeof(Stored<M>)))
    one_block_forward(const __grid_constant__ PersistentArguments<ForwardDirection> a) {
    using S = Stored<M>;
    constexpr int G = Cell::gates, threads = one_block_threads(G, sizeof(S));
    extern __shared__ float4 shared_memory[];
    const ForwardDirection& d = a.direction[blockIdx.z];
    const int H = static_cast<int>(a.size.hidden);
    // Of each thread: [2][G] pairs of biases, and what is asked for ahead.
    auto* biases = reinterpret_cast<Pair<float>*>(shared_memory) + threadIdx.x;
    const Ahead<S, G, threads> ahead(biases - threadIdx.x + 2 * G * threads);
    OneBlock<M> block(
        a,
        has_pairs<S>(d.x, H) && has_pairs<S>(d.output, a.size.output_stride) &&
            has_pairs<S>(d.again, a.size.output_stride) && has_pairs<S>(d.saved, H) &&
            has_pairs<S>(d.kept_c, H),
        reinterpret_cast<char*>(shared_memory) + one_block_own_bytes(threads, 2 * G, G, sizeof(S)));
    const TwoUnits& units = block.units;

    Held<M, one_block_chunks(G, sizeof(S)), G> held;
    held.load_rows(a.chunks, [&](int u, int gate, int chunk) {
        const int own = units.first() + u, k = chunk * chunk_size;
        return WeightsRow<S>{
            static_cast<const S*>(a.weight_hh[blockIdx.z]) + (int64_t(gate) * H + own) * H + k,
            own < H ? H - k : 0};
    });
    for (int g = 0; g < G; ++g) {
        const auto bias = [&](const void* b) {
            const Pair<S> pair = units.load(b ? static_cast<const S*>(b) + g * H : nullptr);
            return Pair<float>{{widen(pair.of[0]), widen(pair.of[1])}};
        };
        biases[g * threads] = bias(d.bias_ih);
        biases[(G + g) * threads] = bias(d.bias_hh);
    }
    float c[2][2] = {}, h[2][2] = {};  // [row][unit]
    const int all_rows = block.rows_among(static_cast<int>(a.sequence.batch));
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        const Pair<S> h0 = units.load(row_at<S>(d.h0, at));
        for (int u = 0; u < 2; ++u) h[i][u] = widen(h0.of[u]);
        if constexpr (Cell::has_c) {
            const Pair<S> c0 = units.load(row_at<S>(d.c0, at));
            for (int u = 0; u < 2; ++u) c[i][u] = widen(c0.of[u]);
        }
    });
    // Into both buffers: a row that joins later finds it at whatever step.
    for (int buffer = 0; buffer < 2; ++buffer) {
        block.for_each_row(all_rows, [&](int i, int row) { block.put(row, 0, h[i]); });
        block.turn();
    }
    Walk walk(a.sequence, blockIdx.z == 0);
    const S* const x = kept<const S>(d.x);
    S* const output = kept<S>(d.output);
    S* const again = kept<S>(d.again);
    S* const saved = kept<S>(d.saved);
    S* const kept_c = kept<S>(d.kept_c);
    const int output_stride = static_cast<int>(a.size.output_stride);
    const auto ask = [&](int stage, const StepRows& asked) {
        block.for_each_row(block.rows_among(asked.rows), [&](int i, int row) {
            const S* of_row = x + (asked.first + block.first_row + row) * (G * H);
#pragma unroll
            for (int g = 0; g < G; ++g, of_row += H) ahead.ask(stage, i, g, of_row, true, units);
        });
        ahead.asked();
    };
    ask(0, walk[0]);
    ask(1, walk[1]);

    int stage = 0;
    const int steps = static_cast<int>(a.sequence.steps);
    for (int step = 0; step < steps; ++step, stage = later(stage, 1), walk.go_on(step)) {
        ask(later(stage, 2), walk[2]);
        float r_sums[G][2][2];  // [gate][unit][row]
        for (int g = 0; g < G; ++g) {
            const auto bias = load_pair<float>(biases + (G + g) * threads);
            for (int u = 0; u < 2; ++u) r_sums[g][u][0] = r_sums[g][u][1] = bias.of[u];
        }
        block.multiply(held, a.chunks, r_sums);
        ahead.arrived();
        block.for_each_row(block.rows_among(walk[0].rows), [&](int i, int row) {
            ForwardOutputs<Cell, S> out[2];
            float x_sum[2][G], r_sum[2][G];
            for (int g = 0; g < G; ++g) {
                const auto x_of = ahead.values(stage, i, g);
                const auto bias = load_pair<float>(biases + g * threads);
                for (int u = 0; u < 2; ++u) {
                    x_sum[u][g] = widen(x_of.of[u]) + bias.of[u];
                    r_sum[u][g] = r_sums[g][u][i];
                }
            }
            for (int u = 0; u < 2; ++u) {
                out[u] = forward_element<Cell, S>(x_sum[u], r_sum[u], h[i][u], c[i][u]);
                h[i][u] = widen(out[u].h);
            }
            block.put(row, 0, h[i]);
            const int64_t at = walk[0].first + block.first_row + row;
            units.store(output + at * output_stride, Pair<S>{{out[0].h, out[1].h}});
            if (again) units.store(again + at * output_stride, Pair<S>{{out[0].h, out[1].h}});
            if (saved) {
                S* to = saved + at * (Cell::saved * H);
                for (int k = 0; k < Cell::saved; ++k, to += H)
                    units.store(to, Pair<S>{{out[0].saved[k], out[1].saved[k]}});
            }
            if constexpr (Cell::has_c)
                if (kept_c) units.store(kept_c + at * H, Pair<S>{{out[0].c, out[1].c}});
        });
        block.turn();
    }
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        units.store_apart(static_cast<S*>(d.h) + at,
                          Pair<S>{{narrow<S>(h[i][0]), narrow<S>(h[i][1])}});
        if constexpr (Cell::has_c)
            units.store_apart(static_cast<S*>(d.c_n) + at,
                              Pair<S>{{narrow<S>(c[i][0]), narrow<S>(c[i][1])}});
    });
}

template <class Cell, class M>
__global__ void __launch_bounds__(one_block_threads(Cell::gates, sizeof(Stored<M>)))
    one_block_backward(const __grid_constant__ PersistentArguments<BackwardDirection> a) {
    using S = Stored<M>;
    using In = BackwardInputs<Cell, S>;
    constexpr int G = Cell::gates, threads = one_block_threads(G, sizeof(S));
    extern __shared__ float4 shared_memory[];
    const LayerSize& z = a.size;
    const int H = static_cast<int>(z.hidden), gate_width = a.width / G;
    BackwardDirection d = a.direction[blockIdx.z];
    d.h0 = kept<void>(d.h0), d.c0 = kept<void>(d.c0), d.output = kept<void>(d.output);
    d.saved = kept<void>(d.saved), d.kept_c = kept<void>(d.kept_c);
    d.grad_output = kept<void>(d.grad_output);
    d.dgates = kept<void>(d.dgates), d.prev = kept<void>(d.prev);
    const Ahead<S, In::kinds, threads> ahead(shared_memory);
    OneBlock<M> block(a,
                      has_pairs<S>(d.h0, H) && has_pairs<S>(d.c0, H) &&
                          has_pairs<S>(d.output, z.output_stride) && has_pairs<S>(d.saved, H) &&
                          has_pairs<S>(d.kept_c, H) &&
                          has_pairs<S>(d.grad_output, z.grad_output_stride) &&
                          has_pairs<S>(d.dgates, H) && has_pairs<S>(d.prev, H),
                      reinterpret_cast<char*>(shared_memory) +
                          one_block_own_bytes(threads, 0, In::kinds, sizeof(S)));
    const TwoUnits& units = block.units;

    Held<M, G * one_block_chunks(G, sizeof(S)), 1> held;
    held.load_columns(a.chunks, [&](int chunk) {
        const int gate = chunk * chunk_size / gate_width, row = chunk * chunk_size % gate_width;
        return WeightsColumns<S>{static_cast<const S*>(a.weight_hh[blockIdx.z]) +
                                     (int64_t(gate) * H + row) * H + units.first(),
                                 H, H - row, units.count()};
    });
    float dh[2][2] = {}, dc[2][2] = {};  // what is known of them: [row][unit]
    const int all_rows = block.rows_among(static_cast<int>(a.sequence.batch));
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        const Pair<S> dh_n = units.load(row_at<S>(d.dh_n, at));
        for (int u = 0; u < 2; ++u) dh[i][u] = widen(dh_n.of[u]);
        if constexpr (Cell::has_c) {
            const Pair<S> dc_n = units.load(row_at<S>(d.dc_n, at));
            for (int u = 0; u < 2; ++u) dc[i][u] = widen(dc_n.of[u]);
        }
    });
    Walk walk(a.sequence, blockIdx.z == 1);
    const auto ask = [&](int stage, const StepRows& asked, const StepRows& next) {
        block.for_each_row(block.rows_among(asked.rows), [&](int i, int row) {
            const int b = block.first_row + row;
            const BackwardRow at{b, asked.first + b, b < next.rows ? next.first + b : -1};
#pragma unroll
            for (int kind = 0; kind < In::kinds; ++kind) {
                const S* row_of = In::source(d, z, at, kind);
                ahead.ask(stage, i, kind, row_of, row_of, units);
            }
        });
        ahead.asked();
    };
    ask(0, walk[0], walk[1]);
    ask(1, walk[1], walk[2]);

    int linked = 0;  // rows that were alive in the step handled before
    int stage = 0;
    // One step more than there are: the last takes the first step's gradients to the initial state.
    const int steps = static_cast<int>(a.sequence.steps);
    for (int step = 0; step <= steps; ++step, stage = later(stage, 1), walk.go_on(step)) {
        const int rows = block.rows_among(walk[0].rows);
        ask(later(stage, 2), walk[2], rows_of(a.sequence, blockIdx.z == 1, step + 3));
        float sums[1][2][2] = {};  // [][unit][row]
        if (linked > 0) block.multiply(held, a.chunks, sums);
        ahead.arrived();
        block.for_each_row(max(rows, linked), [&](int i, int row) {
            if (row < linked)
                for (int u = 0; u < 2; ++u) dh[i][u] += sums[0][u][i];
            if (row >= rows) return;  // at its initial state
            Pair<S> values[In::kinds];
            for (int kind = 0; kind < In::kinds; ++kind)
                values[kind] = ahead.values(stage, i, kind);
            BackwardOutputs<Cell, S> out[2];
            for (int u = 0; u < 2; ++u) {
                const In in([&](int kind) { return values[kind].of[u]; });
                dh[i][u] += widen(in.value[In::grad_output]);
                out[u] = backward_element<Cell, S>(in, dh[i][u], dc[i][u]);
            }
            for (int g = 0; g < G; ++g)
                block.put(row, g * gate_width, {widen(out[0].of_h(g)), widen(out[1].of_h(g))});
            const int64_t at = walk[0].first + block.first_row + row;
            S* const to = static_cast<S*>(d.dgates) + at * (stored_gradients<Cell> * H);
            out[0].for_each_stored([&](int k, int grad) {
                units.store(to + k * H, Pair<S>{{out[0].dgates[grad], out[1].dgates[grad]}});
            });
            if (d.prev) units.store(static_cast<S*>(d.prev) + at * H, values[In::h_prev]);
        });
        block.turn();
        linked = rows;
    }
    block.for_each_row(all_rows, [&](int i, int row) {
        const int64_t at = int64_t(block.first_row + row) * H;
        units.store_apart(static_cast<float*>(d.dh) + at, Pair<float>{{dh[i][0], dh[i][1]}});
        if constexpr (Cell::has_c)
            units.store_apart(static_cast<float*>(d.dc) + at, Pair<float>{{dc[i][0], dc[i][1]}});
    });
}

}  // namespace fastrnn::cuda

// Defines `one_block_<suffix>`: the kernels of each cell of the registry, in its order.
#define FASTRNN_ONE_BLOCK_ENTRY(name, Cell)                                                       \
    {{reinterpret_cast<const void*>(&one_block_forward<Cell, Multiplied>),                        \
      one_block_chunks(Cell::gates, sizeof(Stored<Multiplied>)) * chunk_size, 1, 2 * Cell::gates, \
      Cell::gates},                                                                               \
     {reinterpret_cast<const void*>(&one_block_backward<Cell, Multiplied>),                       \
      one_block_chunks(Cell::gates, sizeof(Stored<Multiplied>)) * chunk_size, Cell::gates, 0,     \
      BackwardInputs<Cell, Stored<Multiplied>>::kinds}},
#define FASTRNN_DEFINE_ONE_BLOCK(suffix, multiplied)               \
    namespace fastrnn::cuda {                                      \
    namespace {                                                    \
    using Multiplied = multiplied;                                 \
    }                                                              \
    extern const OneBlockKernel one_block_##suffix[cell_count][2]; \
    const OneBlockKernel one_block_##suffix[][2] = {               \
        FASTRNN_FOR_EACH_CELL(FASTRNN_ONE_BLOCK_ENTRY)};           \
    }
