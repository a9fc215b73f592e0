#include "kernels.h"

FASTRNN_DEFINE_KERNELS(float16, float, Half)
