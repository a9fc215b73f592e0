#include "kernels.h"

FASTRNN_TILES(extern, float)
FASTRNN_DEFINE_KERNELS(float16, float, Half)
