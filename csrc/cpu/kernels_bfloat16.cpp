#include "kernels.h"

#ifndef FASTRNN_BFLOAT16_PAIRS  // those instruction sets have no other kernels than these
FASTRNN_TILES(extern, float)
#endif
FASTRNN_DEFINE_KERNELS(bfloat16, float, BFloat16)
