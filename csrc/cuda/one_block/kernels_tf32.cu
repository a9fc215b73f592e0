#include "kernel_table.h"

FASTRNN_DEFINE_ONE_BLOCK(tf32, Tf32)
