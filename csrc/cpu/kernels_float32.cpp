#include "kernels.h"

FASTRNN_DEFINE_KERNELS(float32, float, float)
