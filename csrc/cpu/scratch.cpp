#include "scratch.h"

#include <stdlib.h>

#include <stdexcept>
#include <string>

#include "choices.h"
#include "memory.h"

namespace fastrnn::cpu {
namespace {

void* allocate(size_t bytes) {
    const bool huge = bytes >= huge_page;
    const size_t alignment = huge ? huge_page : 64;
    void* data = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (!data)
        throw std::runtime_error("fastrnn: could not allocate " + std::to_string(bytes) +
                                 " bytes of scratch memory");
    if (huge) advise_huge_pages(data, bytes);
    return data;
}

// The memory that a thread keeps.
struct KeptMemory {
    void* data = nullptr;
    size_t size = 0;
    bool in_use = false;

    ~KeptMemory() { free(data); }
};
thread_local KeptMemory kept;

}  // namespace

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
