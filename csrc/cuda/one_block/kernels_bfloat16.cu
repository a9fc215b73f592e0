#include "kernel_table.h"

FASTRNN_DEFINE_ONE_BLOCK(bfloat16, __nv_bfloat16)
