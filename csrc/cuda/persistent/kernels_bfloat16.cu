#include "backward.cuh"
#include "forward.cuh"
#include "kernel_table.h"

FASTRNN_DEFINE_PERSISTENT(bfloat16, __nv_bfloat16, backward_kernel)
