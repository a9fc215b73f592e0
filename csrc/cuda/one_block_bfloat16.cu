#include "one_block.cuh"

FASTRNN_DEFINE_ONE_BLOCK(bfloat16, __nv_bfloat16)
