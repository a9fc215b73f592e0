#include "persistent_columns.cuh"

FASTRNN_DEFINE_PERSISTENT(tf32, Tf32, columns_backward_kernel)
