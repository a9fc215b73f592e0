#include "kernels.h"

FASTRNN_TILES(, double)
FASTRNN_DEFINE_KERNELS(float64, double, double)
FASTRNN_DEFINE_DUAL_KERNELS(float64, double)
