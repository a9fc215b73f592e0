// For cuda_counters.py: counts apart the loads by which a block waits at a grid barrier. Preloaded in
// front of the virtual GPU, whose counters have them among the others; no other load of the kernels
// is volatile or ordered.
#include <dlfcn.h>

#include "vgpu_types.h"

struct Thr;

namespace {
u64 count = 0;
}

extern "C" u64 cuda_polls() { return count; }

extern "C" void vg_count_global(Thr* thread, Site* site, u64 address, u32 size) {
    using Count = void (*)(Thr*, Site*, u64, u32);
    static const Count next = reinterpret_cast<Count>(dlsym(RTLD_NEXT, "vg_count_global"));
    count += (site->flags & (SITE_SYNC | SITE_READ | SITE_ATOMIC)) == (SITE_SYNC | SITE_READ);
    next(thread, site, address, size);
}
