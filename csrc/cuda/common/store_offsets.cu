#include "layer_arguments.h"

namespace fastrnn::cuda {
namespace {

// Offsets in one launch: every device allows 4096 bytes of arguments.
constexpr int64_t most_offsets = 480;

struct Offsets {
    int64_t value[most_offsets];
};

__global__ void store_offsets(const __grid_constant__ Offsets offsets, int count, int64_t* to) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = offsets.value[i];
}

}  // namespace

cudaError_t launch_store_offsets(const int64_t* offsets, int64_t steps, int64_t* to,
                                 cudaStream_t stream) {
    for (int64_t first = 0; first <= steps; first += most_offsets) {
        const int64_t left = steps + 1 - first;
        const int count = static_cast<int>(left < most_offsets ? left : most_offsets);
        Offsets part{};
        for (int i = 0; i < count; ++i) part.value[i] = offsets[first + i];
        store_offsets<<<1, 256, 0, stream>>>(part, count, to + first);
        if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace fastrnn::cuda
