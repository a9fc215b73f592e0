#include "kernels.h"

FASTRNN_TILES(, float)
FASTRNN_DEFINE_KERNELS(float32, float, float)
FASTRNN_DEFINE_DUAL_KERNELS(float32, float)
