// Whether a layer runs on the persistent path, and how it is cut.
#pragma once
#include <stddef.h>

#include "layer.h"
#include "tiling.h"

namespace fastrnn::cuda {

struct PersistentKernel;

struct PersistentPlan {
    bool fits;
    const char* reason;              // why it does not, or "fits"
    const PersistentKernel* kernel;  // null on the path of one block, which counts in rows alone
    const void* function;
    const char* product;  // what multiplies
    Tiling tiling;
    int unit_blocks;      // blocks that share the units of a direction
    int groups;           // of rows of the batch; blocks = unit_blocks * groups * directions
    int threads;          // of a block
    int registers;        // of a thread
    size_t shared_bytes;  // of a block
    size_t workspace;     // bytes
    size_t cleared;       // of them the first, which are to be 0
    int chunks;           // of a block's contraction
    int exchange_width;   // values of a row of the exchange buffer
    bool adds_up_biases;  // whether the gradients of the biases are the kernel's work
};

// The rule, but for the speed: see choose_path.
//   1. float32, float16 or bfloat16; no projection; compute capability 8.0 and cooperative
//      launches.
//   2. A warp holds the weights of 8 units for a slice of the contraction (tiling.h), and a block
//      as many slices as the contraction has: they must not need more warps than the kernel allows.
//   3. If all units fit into one block, they are one block, and no grid barrier is needed. Else a
//      block owns as few units as still fill a 32-byte sector, or more where the device has not
//      room for so many blocks. It has four warps at least, one for each scheduler of a
//      multiprocessor, if the contraction can be cut so.
//   4. The batch is shared out among groups of blocks, down to rows of which each thread has one
//      element a step. All blocks must be resident at once: what cudaOccupancyMaxActiveBlocksPerMultiprocessor
//      says, times the multiprocessors.
//   5. A backward pass in float32 exchanges partial sums instead (persistent_columns.cuh): a warp holds
//      some columns of the rows of W_hh that are the block's. All units are one block's if the columns
//      fit into its registers; else a block owns as many as fit, a whole number of chunks if possible,
//      and its rows are those of one product, or more where the device has not room for so many blocks.
//   6. float32 is multiplied on the tensor cores, rounded to TF32, where that is allowed.
// Never an error: where the device cannot be asked, the plan does not fit. `device` must be the
// current one.
PersistentPlan plan_persistent(Pass pass, int cell, Storage storage, int64_t hidden, int64_t batch,
                               int directions, bool projected, bool tf32, int device);

// Bytes of shared memory that a block of such a plan needs, for values of so many bytes.
int64_t shared_bytes(const PersistentPlan& plan, int value_bytes);

// The same for the kernels of small layers (one_block.cuh), of which one block runs all steps of a
// direction for up to 8 rows: nothing is waited for but the block's own warps. They multiply on the
// tensor cores, so that float32 is theirs where TF32 is allowed; and W_hh must fit into the registers of
// one block (one_block_chunks): up to 128 units of an LSTM in 16 bits, 96 in TF32. The rows are shared
// out among as many blocks as there are multiprocessors, then 8 to a block.
PersistentPlan plan_one_block(Pass pass, int cell, Storage storage, int64_t hidden, int64_t batch,
                              int directions, bool projected, bool tf32, int device);

}  // namespace fastrnn::cuda
