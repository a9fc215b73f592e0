// Whether a layer runs on the persistent path, and how it is cut.
#pragma once
#include <stddef.h>

#include "layer.h"
#include "tiling.h"

namespace fastrnn::cuda {

struct PersistentKernel;

struct PersistentPlan {
    bool fits;
    const char* reason;  // why it does not, or "fits"
    const PersistentKernel* kernel;
    const char* product;  // what multiplies
    Tiling tiling;
    int unit_blocks;      // blocks that share the units of a direction
    int groups;           // of rows of the batch; blocks = unit_blocks * groups * directions
    int threads;          // of a block
    int registers;        // of a thread
    size_t shared_bytes;  // of a block
    size_t workspace;     // bytes
    int exchange_width;   // values of a row of the exchange buffer
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
//   5. float32 is multiplied on the tensor cores, rounded to TF32, where that is allowed.
// Never an error: where the device cannot be asked, the plan does not fit. `device` must be the
// current one.
PersistentPlan plan_persistent(Pass pass, int cell, Storage storage, int64_t hidden, int64_t batch,
                               int directions, bool projected, bool tf32, int device);

// Bytes of shared memory that a block of the plan needs, for values of so many bytes.
int64_t shared_bytes(const PersistentPlan& plan, int value_bytes);

}  // namespace fastrnn::cuda
