#include "persistent.cuh"

FASTRNN_DEFINE_PERSISTENT(tf32, Tf32)
