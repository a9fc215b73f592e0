#include "persistent_columns.cuh"

FASTRNN_DEFINE_PERSISTENT(float32, float, columns_backward_kernel)
