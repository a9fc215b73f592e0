// What the host knows of a kernel of the persistent path, and what it passes to it.
#pragma once
#include "../common/layer_arguments.h"
#include "tiling.h"

namespace fastrnn::cuda {

struct PersistentKernel {
    const void* function;
    int most_threads;  // of a block
    int tile;          // units of a tile
    int outputs;       // of a unit's products: G forward, 1 backward
    int inputs;        // values of a unit that are multiplied: 1 (h) forward, G (gates) backward
    int states;        // floats of an element in shared memory
    int biases;        // floats of a unit in shared memory
    int kinds;         // values of an element that are prefetched
    int grads;  // where blocks exchange partial sums: gate gradients of an element, which the
                // kernel also adds up for the biases; else 0
};

// The first four are LayerArguments. As a base of this struct they cost
// persistent_backward_columns<Lstm, Tf32> 2 registers more.
template <class Arrays>
struct PersistentArguments {
    LayerSize size;
    DeviceSequence sequence;
    Arrays direction[2];
    const void* weight_hh[2];  // [G * H, H]
    Tiling tiling;
    int chunks;      // of a block's contraction
    int width;       // values of a row of the exchange buffer: H or G * H, padded
    void* exchange;  // [2][D][groups][whole tiles][width], zeros at first; where partial sums are
                     // exchanged as PartialSums lays it out; unused where a group is a single
                     // block, which has it in shared memory
    unsigned* counters;  // [D][groups], counter_stride apart, zeros at first
};

constexpr int counter_stride = 32;  // a cache line for each counter

// Threads of a block: a lane that holds 64 registers of weights has 128 in all, one that holds 128
// has 255.
template <class S>
constexpr int most_threads = sizeof(S) == 4 ? 256 : 512;

// Elements of a thread in a tile of rows, with one slice for every 8 units of a tile. More slices
// mean more threads, and fewer elements for each.
constexpr int most_elements = 4;

// Units of a tile. Backward, a row of W_hh has the weights of neighbouring units: with 16 of them a
// warp reads whole sectors.
constexpr int forward_tile = 8, backward_tile = 16;

}  // namespace fastrnn::cuda
