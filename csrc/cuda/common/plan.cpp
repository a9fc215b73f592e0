#include "plan.h"

#include <cuda_runtime_api.h>

namespace fastrnn::cuda {

DeviceLimits::DeviceLimits(int device) {
    const auto get = [&](int& value, cudaDeviceAttr attribute) {
        if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
            value = 0;
            cudaGetLastError();
        }
    };
    get(major, cudaDevAttrComputeCapabilityMajor);
    get(cooperative, cudaDevAttrCooperativeLaunch);
    get(multiprocessors, cudaDevAttrMultiProcessorCount);
    get(shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

const char* product_name(Storage storage, bool tf32) {
    return storage != Storage::float32 ? "tensor cores"
           : tf32                      ? "tensor cores, in TF32"
                                       : "multiply-adds of float32";
}

std::optional<int> registers_of(const void* function) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, function) != cudaSuccess) {
        cudaGetLastError();
        return std::nullopt;
    }
    return attributes.numRegs;
}

bool allow_shared_memory(const void* function, const DeviceLimits& limits) {
    if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             limits.shared_per_block) == cudaSuccess)
        return true;
    cudaGetLastError();
    return false;
}

}  // namespace fastrnn::cuda
