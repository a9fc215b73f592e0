// What the host must know of a persistent kernel, and what it passes to one.
#pragma once
#include "layer.h"
#include "persistent.h"
#include "plan.h"
#include "tiling.h"

namespace fastrnn::cuda {

constexpr int counter_stride = 32;  // a cache line each

struct PersistentKernel {
    const void* function;
    int most_threads;  // of a block
    int tile;          // units of a tile
    int outputs;       // of a unit: G in the forward pass, 1 in the backward
    int inputs;        // values a unit puts into the exchange buffer: 1 in the forward pass, G in
                       // the backward
    int states;        // floats of an element that stay in shared memory
    int biases;        // floats of a unit, likewise
    int kinds;         // values of an element that are asked for ahead
    int grads;         // where partial sums are exchanged: gradients of an element; else 0
};

// Where what is beside the exchange buffer is in the workspace, in bytes: counters from 0 on, then, where
// the kernel adds up the gradients of the biases, those of blocks that have ended, and the sums.
struct Workspace {
    int64_t done, sums, exchange;

    Workspace(const PersistentPlan& plan, int64_t hidden, int directions) {
        done = int64_t(sizeof(unsigned)) * counter_stride * directions * plan.groups;
        const int grads = plan.kernel->grads;
        sums = done + (grads > 0) * round_up(4 * int64_t(directions) * plan.unit_blocks, 16);
        exchange = sums + round_up(4 * int64_t(directions) * plan.groups * grads * hidden, 16);
    }
};

template <class Direction>
struct PersistentArguments {
    LayerSize size;
    Sequence sequence;
    Direction direction[2];
    const void* weight_hh[2];  // [G * H, H]
    Tiling tiling;
    int chunks;      // of a block's contraction
    int width;       // H or G * H with padding: of a row of the exchange buffer
    void* exchange;  // [2][D][groups][whole tiles][width], zeros at first; where partial sums are
                     // exchanged as PartialSums has it; in shared memory instead where a group
                     // is a single block
    unsigned* counters;  // [D][groups], counter_stride apart, likewise
};

// Lanes that hold 64 registers of weights have up to 128, those with 128 have up to 255.
template <class S>
constexpr int most_threads = sizeof(S) == 4 ? 256 : 512;

// Elements of a thread in a tile of rows: with one slice for every 8 units of a tile; fewer with more
// slices.
constexpr int most_elements = 4;

// Units of a tile. Backward, a value is one of a row of weights that has the units side by side: a warp
// reads whole sectors of 16.
constexpr int forward_tile = 8, backward_tile = 16;

}  // namespace fastrnn::cuda
