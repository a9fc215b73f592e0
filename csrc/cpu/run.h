// The CPU as a Device (../network.h): a layer's kernel run by as many threads as it is worth.
#pragma once
#include "../network.h"

namespace fastrnn::cpu {

extern const Device device;

}  // namespace fastrnn::cpu
