#include "persistent.h"

namespace fastrnn::cuda {
namespace {

constexpr int sizes_a_launch = 960;  // within the 4096 bytes that all devices allow for arguments

struct Sizes {
    int value[sizes_a_launch];
};

__global__ void store_sizes(const __grid_constant__ Sizes sizes, int count, int* to) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = sizes.value[i];
}

}  // namespace

cudaError_t launch_store_batch_sizes(const int64_t* sizes, int64_t steps, int* device_sizes,
                                     cudaStream_t stream) {
    for (int64_t first = 0; first < steps; first += sizes_a_launch) {
        const int count =
            static_cast<int>(steps - first < sizes_a_launch ? steps - first : sizes_a_launch);
        Sizes part{};
        for (int i = 0; i < count; ++i) part.value[i] = static_cast<int>(sizes[first + i]);
        store_sizes<<<1, 256, 0, stream>>>(part, count, device_sizes + first);
        if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace fastrnn::cuda
