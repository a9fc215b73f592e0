// Whether the one-block path can run a layer, and with which sizes.
#pragma once
#include <stddef.h>

#include "../common/plan.h"
#include "kernel.h"

namespace fastrnn::cuda {

struct OneBlockPlan {
    const OneBlockKernel* kernel;
    const char* product;  // how it multiplies
    int group_rows;       // rows of the batch of a block
    int groups;           // of rows; blocks = groups * directions
    int directions;
    int threads;    // of a block
    int registers;  // of a thread
    size_t shared_bytes;
    int chunks;  // of the contraction
    int width;   // of a row that is multiplied
};

// For small layers without a projection: one block runs all steps of a direction for up to 8 rows,
// and waits for its own warps alone. It multiplies on the tensor cores, so that float32 is run only
// where TF32 is allowed. W_hh must fit into the registers of one block (one_block_chunks): up to
// 128 units of an LSTM in 16 bits, 96 in TF32. The rows are divided among as many blocks as there
// are multiprocessors, from there on 8 to a block.
FASTRNN_API PlanOrUnfit<OneBlockPlan> plan_one_block(const PlanRequest& request);

}  // namespace fastrnn::cuda
