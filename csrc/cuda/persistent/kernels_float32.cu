#include "columns_backward.cuh"
#include "forward.cuh"
#include "kernel_table.h"

FASTRNN_DEFINE_PERSISTENT(float32, float, columns_backward_kernel)
