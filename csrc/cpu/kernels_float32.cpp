#include "kernels.h"

FASTRNN_TILES(, float)
FASTRNN_DEFINE_KERNELS(float32, float, float)
