#include "persistent.cuh"

FASTRNN_DEFINE_PERSISTENT(bfloat16, __nv_bfloat16, backward_kernel)
