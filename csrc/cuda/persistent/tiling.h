// How a persistent kernel is divided into blocks and warps: chosen on the host, followed by the
// kernels.
//
// A block has `tiles` tiles of 8 or 16 hidden units, with all their gates, for a group of rows of
// the batch. The contraction of its products is cut into chunks of 32 values and divided into
// slices; each warp multiplies one tile of units with one slice. With 2 tiles and 3 slices:
//
//                          contraction: chunks of 32 values
//                          | slice 0 | slice 1 | slice 2 |
//   units of tile 0        | warp 0  | warp 2  | warp 4  |
//   units of tile 1        | warp 1  | warp 3  | warp 5  |
#pragma once
#include <stdint.h>

#include "../common/chunks.h"

namespace fastrnn::cuda {

constexpr int tile_rows = 16;  // rows of the batch that are multiplied at a time

// Where partial sums are exchanged (columns_backward.cuh):
constexpr int column_rows = 8;       // rows that are multiplied at a time
constexpr int column_chunks = 4;     // chunks of 16 columns of a warp, in 64 registers of a lane
constexpr int column_threads = 512;  // of a block, at most
constexpr int gradient_slots = 2;    // floats of a thread and gradient (ThreadGradients)

// The outputs of a unit are contiguous and padded, to be written and read in one access.
FASTRNN_FN int stored_outputs(int outputs) { return outputs > 2 ? 4 : outputs; }

struct Tiling {
    int tile;        // units of a tile: 8, or 16 for all outputs of two tiles of 8
    int tiles;       // of a block
    int slices;      // of the contraction
    int slice;       // chunks of a slice
    int group_rows;  // rows of a group
    int sums_pad;    // floats between rows of sums of several outputs
    // Where partial sums are exchanged:
    int column_tiles;  // tiles of 16 columns of a warp
    int rows_at_once;  // rows of which each thread has one element, up to column_rows

    FASTRNN_FN int units() const { return tiles * tile; }
    // The rows of a group, padded to whole tiles of rows.
    FASTRNN_FN int whole_tiles() const {
        return (group_rows + tile_rows - 1) / tile_rows * tile_rows;
    }
    FASTRNN_FN int threads() const { return tiles * slices * 32; }

    // The sums of a tile are [tile_rows][tile][stored outputs]. Floats from one row to the next and
    // from one tile to the next: padded so that what a warp accesses at once, in several rows or
    // tiles, is in different banks.
    FASTRNN_FN int sums_row(int outputs) const {
        return tile * stored_outputs(outputs) + (outputs > 2 ? sums_pad : 0);
    }
    FASTRNN_FN int sums_tile(int outputs) const {
        const int pad = outputs > 2 || tiles == 1 ? 0 : tiles == 2 || tile == 16 ? 16 : 24;
        return tile_rows * sums_row(outputs) + pad;
    }
    // Floats of the sums of all warps, [slices][tiles]. There are two such buffers.
    FASTRNN_FN int sums(int outputs) const { return slices * tiles * sums_tile(outputs); }
    // Floats from one row of operands [rows][gates][units] to the next: padded so that rows 4 apart
    // are in different banks.
    FASTRNN_FN int operands_row(int gates) const {
        return int(round_up(gates * units(), chunk_size)) + 4;
    }
    // Floats of a state: [group_rows][units].
    FASTRNN_FN int state() const { return group_rows * units(); }
    // The rows of the group's largest tile, and the prefetched values of two such tiles.
    FASTRNN_FN int most_rows() const { return group_rows < tile_rows ? group_rows : tile_rows; }
    FASTRNN_FN int inputs(int kinds) const { return 2 * kinds * most_rows() * units(); }
};

// The most chunks of the contraction whose weights fit into a warp's registers: 64 registers a
// lane, or 128 for float32. outputs and inputs: as in PersistentKernel. Where both are 1 (an RNN),
// three quarters of that are enough for every size that the other limits allow, and leave registers
// for the rest of the kernel.
FASTRNN_FN int most_chunks(int outputs, int inputs, int tile) {
    const int most = (outputs == 1 && inputs == 1 ? 12 : 16) / (outputs * tile / 8);
    return most >= 4 ? most / 2 * 2 : most > 1 ? most : 1;
}

// K of RegisterTile<float, ...>: lanes of a warp that share the contraction of a row, 4 values each
// at a time. The fewer outputs, the more lanes, so that a value is multiplied with several weights.
FASTRNN_FN int float32_lanes(int outputs) { return outputs >= 3 ? 8 : outputs == 2 ? 16 : 32; }

}  // namespace fastrnn::cuda
