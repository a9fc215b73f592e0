// Whether the persistent path can run a layer, and how the work is divided.
#pragma once
#include <stddef.h>

#include "../common/plan.h"
#include "kernel.h"

namespace fastrnn::cuda {

struct PersistentPlan {
    const PersistentKernel* kernel;
    const char* product;  // how it multiplies
    Tiling tiling;
    int unit_blocks;  // blocks that share the units of a direction
    int groups;       // of rows of the batch; blocks = unit_blocks * groups * directions
    int directions;
    int threads;    // of a block
    int registers;  // of a thread
    size_t shared_bytes;
    int chunks;             // of a block's contraction
    int exchange_width;     // values of a row of the exchange buffer
    int64_t exchange_size;  // values of a group in one of the two exchange buffers
    // The workspace on the device, in bytes. From 0 on it has the counters of the barriers.
    size_t done_offset;      // BiasGradients::done,
    size_t sums_offset;      // and ::sums, both empty if the kernel adds up no biases' gradients
    size_t exchange_offset;  // the exchange buffers, unless they are in shared memory
    size_t workspace;        // bytes of all
    size_t cleared;          // bytes from 0 on that are to be 0

    // Whether the kernel adds up the gradients of the biases.
    bool adds_up_biases() const { return kernel->grads > 0; }
};

// The rule, except for speed (choose_path):
//   1. float32, float16 or bfloat16; no projection; compute capability 8.0 and cooperative
//      launches.
//   2. A warp holds the weights of a tile of units for a slice of the contraction (tiling.h), and a
//      block has as many slices as the contraction: they must not need more warps than the kernel
//      allows.
//   3. If one block has room for all units, it has them all, and no grid barrier is needed. Else a
//      block has as few units as still fill a 32-byte sector, or more where the device has no room
//      for so many blocks. It has at least four warps, one for each scheduler of a multiprocessor,
//      if the contraction can be divided so far.
//   4. The batch is divided among groups of blocks, down to so few rows that each thread has one
//      element a step. All blocks must be resident at once: the number that
//      cudaOccupancyMaxActiveBlocksPerMultiprocessor returns, times the multiprocessors.
//   5. A backward pass in float32 exchanges partial sums instead (columns_backward.cuh): a warp
//      holds some columns of the rows of W_hh that belong to the block. One block has all units if
//      the columns fit into its registers; else a block has as many as fit, a whole number of
//      chunks if possible, and the rows of one product, or more where the device has no room for so
//      many blocks.
//   6. float32 is multiplied on the tensor cores, rounded to TF32, where that is allowed.
// Never an error: if the device cannot be asked, nothing fits.
FASTRNN_API PlanOrUnfit<PersistentPlan> plan_persistent(const PlanRequest& request);

// Sets what follows from the number of groups and their rows: shared memory and workspace.
void set_memory(PersistentPlan& plan, int64_t hidden, int value_bytes);

}  // namespace fastrnn::cuda
