// What the host must know of a kernel of small layers.
#pragma once
#include "persistent_kernel.h"

namespace fastrnn::cuda {

struct OneBlockKernel {
    const void* function;
    int most_units;  // of the layer
    int inputs;      // values a unit puts into the exchange buffer: 1 in the forward pass, G in the
                     // backward
    int biases;      // floats of a unit that stay in shared memory
    int kinds;       // values of an element that are asked for ahead
};

// How many steps' values the asking ahead has room for.
constexpr int ahead_stages = 3;
// Rows of a block: mma's 8 columns.
constexpr int one_block_rows = 8;

// Chunks of 32 hidden units of a layer with so many gates and values of so many bytes, whose W_hh fits
// into the registers of a block, beside 60 that a thread needs for the rest. Its two warps a chunk
// share four schedulers, each of which has 512 registers a lane.
FASTRNN_FN constexpr int one_block_chunks(int gates, int bytes) {
    int chunks = 0;
    for (int more = 1; more <= 16; ++more) {
        const int registers = more * gates * (bytes == 4 ? 16 : 8) + 60;
        if (registers <= 255 && registers * ((more + 1) / 2) <= 512) chunks = more;
    }
    return chunks;
}
// A warp has 16 units.
FASTRNN_FN constexpr int threads_of_units(int units) { return (units + 15) / 16 * 32; }
FASTRNN_FN constexpr int one_block_threads(int gates, int bytes) {
    return threads_of_units(one_block_chunks(gates, bytes) * chunk_size);
}

// Bytes of shared memory that so many threads have for themselves: biases of their two units, and values
// of some kinds of their two units and rows, asked for ahead.
FASTRNN_FN constexpr int one_block_own_bytes(int threads, int biases, int kinds, int bytes) {
    return threads * 2 * (biases * 4 + ahead_stages * 2 * kinds * bytes);
}

// Values from one row of the exchange buffer to the next: such that the rows r and r + 4 that a
// quarter of a warp reads are in different banks.
FASTRNN_FN constexpr int one_block_stride(int width, int bytes) { return width + 16 / bytes; }

}  // namespace fastrnn::cuda
