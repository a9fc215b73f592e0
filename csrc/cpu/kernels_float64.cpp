#include "kernels.h"

FASTRNN_DEFINE_KERNELS(float64, double, double)
