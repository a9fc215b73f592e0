#include "memory.h"

#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>

#include "busy.h"
#include "choices.h"

namespace fastrnn::cpu {
namespace {

// The huge pages that lie entirely in some memory: what is next to it belongs to others.
//
//     data                                        data + bytes
//      v                                               v
//   ...====|===========|===========|===========|=======...
//          ^first                              ^last
struct HugePages {
    size_t first, last;

    HugePages(void* data, size_t bytes)
        : first((reinterpret_cast<size_t>(data) + huge_page - 1) / huge_page),
          last(std::max(first, (reinterpret_cast<size_t>(data) + bytes) / huge_page)) {}
    char* at(size_t page) const { return reinterpret_cast<char*>(page * huge_page); }
    size_t bytes() const { return (last - first) * huge_page; }
};

// Lets the system take the pages until they are written again.
void mark_reclaimable([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_FREE)
    const HugePages pages(data, bytes);
    madvise(pages.at(pages.first), pages.bytes(), MADV_FREE);
#endif
}

struct CachedBlock {
    Block block;
    size_t bytes;
};

// Never destroyed: a block may return when the process ends.
std::atomic<CachedBlock*> cache{nullptr};

Block allocate_fresh(size_t bytes, int threads, Block (*allocate)(size_t)) {
    Block block = allocate(bytes);
    use_huge_pages(block.get(), bytes, threads);
    return block;
}

Block allocate_cached(size_t bytes, int threads, Block (*allocate)(size_t)) {
    const std::unique_ptr<CachedBlock> earlier(cache.exchange(nullptr));
    const CachedBlock own = earlier && earlier->bytes >= bytes
                                ? *earlier
                                : CachedBlock{allocate_fresh(bytes, threads, allocate), bytes};
    return {own.block.get(), [own](void* data) {
                mark_reclaimable(data, own.bytes);
                delete cache.exchange(new CachedBlock(own));
            }};
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
}

void use_huge_pages(void* data, size_t bytes, int threads) {
    if (bytes < always_fresh) return;
    threads = next_threads(quiet_threads(threads));
    const HugePages pages(data, bytes);
    advise_huge_pages(pages.at(pages.first), pages.bytes());
    // A page is cleared by the thread that touches it first, and by all threads that do so at the
    // same time, as the threads that share the units of a row would. LSTM, H = 256, B = 64, two
    // threads: a training step takes 1.05 times as long if the pages are left to those.
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (size_t page = pages.first; page < pages.last; ++page)
        *static_cast<volatile char*>(pages.at(page)) = 0;
}

size_t place_together(std::vector<size_t>& pieces, size_t least) {
    constexpr size_t alignment = 64;
    size_t total = 0;
    for (size_t& piece : pieces) {
        const size_t offset = total;
        total = (total + piece + alignment - 1) / alignment * alignment;
        piece = offset;
    }
    return least < always_fresh ? std::max(total, least) : total;
}

Block allocate_block(size_t bytes, int threads, Block (*allocate)(size_t bytes)) {
    return bytes < always_fresh || bytes > step_cached ? allocate_fresh(bytes, threads, allocate)
                                                       : allocate_cached(bytes, threads, allocate);
}

}  // namespace fastrnn::cpu
