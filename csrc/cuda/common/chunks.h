// The contraction in chunks, and how sizes are rounded up to whole ones.
#pragma once
#include <stdint.h>

#include "../../cells/cell.h"

namespace fastrnn::cuda {

constexpr int chunk_size = 32;  // values of the contraction; W_hh is read by whole chunks

FASTRNN_FN int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
constexpr int divide_up(int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); }

}  // namespace fastrnn::cuda
