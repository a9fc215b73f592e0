#include "one_block.cuh"

FASTRNN_DEFINE_ONE_BLOCK(tf32, Tf32)
