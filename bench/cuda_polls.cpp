// For cuda_counters.py: counts the loads by which a block waits at a grid barrier, and the bytes of
// the operands of products. It is preloaded before the virtual GPU, which counts the former among
// all loads (no other load of the kernels is volatile or ordered), and the latter not at all.
#include <dlfcn.h>

#include "vgpu_types.h"

struct Thr;

namespace {
u64 count = 0, product_bytes = 0;
}

extern "C" u64 cuda_polls() { return count; }
extern "C" u64 cuda_product_bytes() { return product_bytes; }

extern "C" void vg_count_global(Thr* thread, Site* site, u64 address, u32 size) {
    using Count = void (*)(Thr*, Site*, u64, u32);
    static const Count next = reinterpret_cast<Count>(dlsym(RTLD_NEXT, "vg_count_global"));
    count += (site->flags & (SITE_SYNC | SITE_READ | SITE_ATOMIC)) == (SITE_SYNC | SITE_READ);
    next(thread, site, address, size);
}

// cuBLAS's function, declared without its header: enumerations are ints.
extern "C" int cublasGemmEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha,
                            const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
                            const void* beta, void* c, int c_type, int ldc, int compute,
                            int algorithm) {
    static const auto next =
        reinterpret_cast<decltype(&cublasGemmEx)>(dlsym(RTLD_NEXT, "cublasGemmEx"));
    constexpr int float32 = 0;  // CUDA_R_32F; the others counted here have 16 bits
    product_bytes += (u64(m) * k + u64(k) * n + u64(m) * n) * (c_type == float32 ? 4 : 2);
    return next(handle, ta, tb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type,
                ldc, compute, algorithm);
}
