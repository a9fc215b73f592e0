// The user's own cells on a GPU (../cells/known.h): own_cell.cuh compiles their kernels into a
// library of each, which adds them here.
#pragma once
#include "../api.h"
#include "../layer.h"
#include "one_block/kernel.h"
#include "persistent/kernel.h"
#include "stepwise/step.h"

namespace fastrnn::cuda {

// Of one cell and one storage type. The one-launch kernels are those of both passes, in the order
// of Pass, by whether products may be rounded to TF32; null where the path has none.
struct OwnKernels {
    StepKernel<ForwardStep, ForwardArrays> forward_step;
    StepKernel<BackwardStep, BackwardArrays> backward_step;
    const PersistentKernel* persistent[2];
    const OneBlockKernel* one_block[2];
};

// Adds the kernels of a cell that add_own_cell has added. They stay for the rest of the process.
FASTRNN_API void add_own_kernels(int cell, Storage storage, const OwnKernels& kernels);

// The added kernels of a cell, or null.
FASTRNN_API const OwnKernels* own_kernels(int cell, Storage storage);

}  // namespace fastrnn::cuda
