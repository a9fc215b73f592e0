#include "columns_backward.cuh"
#include "forward.cuh"
#include "kernel_table.h"

FASTRNN_DEFINE_PERSISTENT(tf32, Tf32, columns_backward_kernel)
