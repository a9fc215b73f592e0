// What the host knows of a kernel of the one-block path, and what it passes to it.
#pragma once
#include "../common/chunks.h"
#include "../common/layer_arguments.h"

namespace fastrnn::cuda {

struct OneBlockKernel {
    const void* function;
    int most_units;  // of the layer
    int inputs;      // values of a unit that are multiplied: 1 (h) forward, G (gates) backward
    int biases;      // floats of a unit in shared memory
    int kinds;       // values of an element that are prefetched
};

// The order of the fields is measured: with group_rows first, ptxas gives the kernels up to 6 more
// registers.
template <class Arrays>
struct OneBlockArguments : LayerArguments<Arrays> {
    int chunks;      // of the contraction
    int width;       // values of a row that is multiplied: H or G * H, padded to whole chunks
    int group_rows;  // rows of the batch of a block
};

// Steps whose values the prefetch has room for: the current one and the next two.
constexpr int prefetch_stages = 3;
// Rows of a block: the 8 columns of mma's second operand.
constexpr int one_block_rows = 8;

// The most chunks of hidden units for which W_hh fits into the registers of a block, for so many
// gates and values of so many bytes, besides the 60 registers that a thread needs for the rest. A
// chunk of units is two warps; the warps share four schedulers, each with 512 registers a lane.
FASTRNN_FN int one_block_chunks(int gates, int bytes) {
    int chunks = 0;
    for (int more = 1; more <= 16; ++more) {
        const int registers = more * gates * (bytes == 4 ? 16 : 8) + 60;
        if (registers <= 255 && registers * ((more + 1) / 2) <= 512) chunks = more;
    }
    return chunks;
}
// A warp has 16 units.
FASTRNN_FN int threads_of_units(int units) { return (units + 15) / 16 * 32; }
FASTRNN_FN int one_block_threads(int gates, int bytes) {
    return threads_of_units(one_block_chunks(gates, bytes) * chunk_size);
}

// Bytes of shared memory that the threads use privately: the biases of their two units, and the
// prefetched values of their two units and two rows.
FASTRNN_FN int one_block_private_bytes(int threads, int biases, int kinds, int bytes) {
    return threads * 2 * (biases * 4 + prefetch_stages * 2 * kinds * bytes);
}

// Values from one row that is multiplied to the next: padded so that rows r and r + 4, which a
// quarter of a warp reads together, are in different banks.
FASTRNN_FN int one_block_stride(int width, int bytes) { return width + 16 / bytes; }

}  // namespace fastrnn::cuda
