#include "backward.cuh"
#include "forward.cuh"
#include "kernel_table.h"

FASTRNN_DEFINE_PERSISTENT(float16, __half, backward_kernel)
