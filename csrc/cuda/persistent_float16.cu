#include "persistent.cuh"

FASTRNN_DEFINE_PERSISTENT(float16, __half, backward_kernel)
