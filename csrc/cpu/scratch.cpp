#include "scratch.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn::cpu {
namespace {

constexpr size_t huge_page = 2 << 20;

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
}

void* allocate(size_t bytes) {
    const bool huge = bytes >= huge_page;
    const size_t alignment = huge ? huge_page : 64;
    void* data = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    TORCH_CHECK(data, "fastrnn: could not allocate ", bytes, " bytes of scratch memory");
    if (huge) advise_huge_pages(data, bytes);
    return data;
}

// What the thread keeps.
struct Kept {
    void* data = nullptr;
    size_t size = 0;
    bool in_use = false;

    ~Kept() { free(data); }
};
thread_local Kept kept;

}  // namespace

void in_huge_pages(void* data, size_t bytes) {
    if (bytes < size_t(always_fresh)) return;
    // Whole pages of it: what lies beside it is not ours.
    const size_t begin = (reinterpret_cast<size_t>(data) + huge_page - 1) / huge_page * huge_page,
                 end = (reinterpret_cast<size_t>(data) + bytes) / huge_page * huge_page;
    if (begin >= end) return;
    advise_huge_pages(reinterpret_cast<void*>(begin), end - begin);
    // A page is cleared by whoever touches it first, and by all who do so at the same time, as threads do
    // that share the units of a row. LSTM, H = 256, B = 64, on two: a training step takes 1.05 times as
    // long if the pages are left to those.
    const int64_t pages = (end - begin) / huge_page;
    at::parallel_for(0, pages, 1, [&](int64_t first, int64_t last) {
        for (int64_t page = first; page < last; ++page)
            *reinterpret_cast<volatile char*>(begin + page * huge_page) = 0;
    });
}

Scratch::Scratch(size_t bytes) : kept_(bytes <= scratch_kept && !kept.in_use) {
    if (!kept_) {
        data_ = allocate(bytes);
        return;
    }
    if (kept.size < bytes) {
        free(kept.data);
        kept = {};
        kept.data = allocate(bytes);
        kept.size = bytes;
    }
    kept.in_use = true;
    data_ = kept.data;
}

Scratch::~Scratch() {
    if (kept_)
        kept.in_use = false;
    else
        free(data_);
}

}  // namespace fastrnn::cpu
