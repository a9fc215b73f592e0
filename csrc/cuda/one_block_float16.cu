#include "one_block.cuh"

FASTRNN_DEFINE_ONE_BLOCK(float16, __half)
