// How a persistent kernel is cut into blocks and warps, for the host that chooses it and the
// kernels that follow it.
//
// A block owns `tiles` tiles of 8 or 16 hidden units, with all their gates, and a group of rows of
// the batch. Its warps are [tiles][slices]: one multiplies its tile with one slice of the
// contraction, which is cut into chunks of 32 values.
#pragma once
#include <stdint.h>

#include "../cells/cell.h"

namespace fastrnn::cuda {

constexpr int tile_rows = 16;   // rows of the batch that are multiplied at a time
constexpr int chunk_size = 32;  // values of the contraction

// Where partial sums are exchanged (persistent_columns.cuh): rows that are multiplied at a time; chunks
// of 16 columns whose weights a warp holds, in 64 registers a lane; threads of a block.
constexpr int column_rows = 8;
constexpr int column_chunks = 4;
constexpr int column_threads = 512;
constexpr int own_gradients = 2;  // of each kind that a thread keeps in shared memory

FASTRNN_FN constexpr int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// A unit's outputs lie together, to be written and read at once.
FASTRNN_FN constexpr int stored_outputs(int outputs) { return outputs > 2 ? 4 : outputs; }

struct Tiling {
    int tile;        // units of a tile: 8, or 16 for all outputs of two tiles of 8
    int tiles;       // WU
    int slices;      // WK
    int slice;       // chunks of a slice
    int group_rows;  // rows of a group
    int sums_pad;    // floats between rows of sums of several outputs
    int columns;     // where partial sums are exchanged: tiles of 16 columns of a warp,
    int turn;        // and rows of the group that take a turn: up to 8, an element for a thread

    FASTRNN_FN int units() const { return tiles * tile; }
    // The group's rows, and those that fill its last tile.
    FASTRNN_FN int whole_tiles() const {
        return (group_rows + tile_rows - 1) / tile_rows * tile_rows;
    }
    FASTRNN_FN int threads() const { return tiles * slices * 32; }

    // Sums of a tile are [tile_rows][tile][stored outputs]: floats from one row to the next, and from
    // one tile to the next. Such that a warp that writes sums of several rows, or reads those of
    // several rows and tiles, finds them in different banks.
    FASTRNN_FN int sums_row(int outputs) const {
        return tile * stored_outputs(outputs) + (outputs > 2 ? sums_pad : 0);
    }
    FASTRNN_FN int sums_tile(int outputs) const {
        const int pad = outputs > 2 || tiles == 1 ? 0 : tiles == 2 || tile == 16 ? 16 : 24;
        return tile_rows * sums_row(outputs) + pad;
    }
    // Floats of the sums of all warps: [slices][tiles], and there are two of them.
    FASTRNN_FN int sums(int outputs) const { return slices * tiles * sums_tile(outputs); }
    // Floats from one row of what is multiplied with columns to the next, for so many gates: such that
    // rows 4 apart are in different banks.
    FASTRNN_FN int operands_row(int gates) const {
        return int(round_up(gates * units(), chunk_size)) + 4;
    }
    // Floats of a state: [group_rows][units].
    FASTRNN_FN int state() const { return group_rows * units(); }
    // Rows of the largest tile, and values of so many kinds that two of them need beside the product.
    FASTRNN_FN int most_rows() const { return group_rows < tile_rows ? group_rows : tile_rows; }
    FASTRNN_FN int inputs(int kinds) const { return 2 * kinds * most_rows() * units(); }
};

// Chunks of the contraction whose weights a warp can hold in registers, for so many outputs of each
// unit of its tile: 64 registers a lane, or 128 for float32. `inputs`: how often the units are in
// the contraction, once forward and once a gate backward. Where both are one, three quarters are
// enough for any size that the others allow, and leave registers for the rest of the kernel.
FASTRNN_FN constexpr int most_chunks(int outputs, int inputs, int tile) {
    const int most = (outputs == 1 && inputs == 1 ? 12 : 16) / (outputs * tile / 8);
    return most >= 4 ? most / 2 * 2 : most > 1 ? most : 1;
}

// Lanes of a warp that share a row of float32, with 4 values each at a time: the fewer outputs, the
// more of them, so that a value that was read is multiplied with several weights.
FASTRNN_FN constexpr int float32_lanes(int outputs) {
    return outputs >= 3 ? 8 : outputs == 2 ? 16 : 32;
}

}  // namespace fastrnn::cuda
