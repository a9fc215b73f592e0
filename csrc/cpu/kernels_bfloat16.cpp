#include "kernels.h"

#ifndef __AVX512BF16__  // of those sets, these are the only kernels
FASTRNN_TILES(extern, float)
#endif
FASTRNN_DEFINE_KERNELS(bfloat16, float, BFloat16)
