// Which way a layer goes: in one launch where that fits, of blocks on their own or of blocks that wait
// for one another (plan.h), or step by step.
#pragma once
#include "../torch/network.h"
#include "persistent.h"
#include "tensors.h"

namespace fastrnn::cuda {

// The plan for a layer; one that does not fit sends it step by step. The environment variable
// FASTRNN_CUDA_PATH, read at every call, can say "stepwise", "persistent" or "one_block": what does not
// fit is an error then.
PersistentPlan choose_path(Pass pass, const Problem& problem);

// What a persistent launch needs beside its plan and the directions.
struct PersistentMemory {
    Tensor workspace;  // [bytes]
    Tensor offsets;    // [T + 1] int64, of packed data
    Sequence sequence;

    PersistentMemory(const PersistentPlan& plan, const Problem& problem,
                     const fastrnn::Sequence& sequence, cudaStream_t stream);
};

}  // namespace fastrnn::cuda
