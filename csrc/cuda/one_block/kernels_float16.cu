#include "kernel_table.h"

FASTRNN_DEFINE_ONE_BLOCK(float16, __half)
