#include "persistent.cuh"

FASTRNN_DEFINE_PERSISTENT(float32, float)
