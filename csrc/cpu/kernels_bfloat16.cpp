#include "kernels.h"

FASTRNN_DEFINE_KERNELS(bfloat16, float, BFloat16)
