// Scratch memory for the kernels.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastrnn::cpu {

// Memory of at least so many bytes, 64-byte aligned, while this object lives. A thread keeps up to
// `scratch_kept` bytes: fresh memory costs a page fault every 4 KB, which for a layer of some hundred
// units takes longer than the layer. Throws c10::Error if there is none.
class Scratch {
public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* data() const { return data_; }

private:
    void* data_;
    bool kept_;
};

constexpr size_t scratch_kept = 64 << 20;

// malloc gives back what is freed of so many bytes and more (the most that M_MMAP_THRESHOLD grows to):
// such a tensor is made of fresh memory at every call.
constexpr int64_t always_fresh = 32 << 20;

// Of what a training step has kept for backward so many bytes at most wait for the next step. Until that
// writes them, the system may take their pages (`lend`), if it has no others.
constexpr int64_t step_kept = 256 << 20;
void lend(void* data, size_t bytes);

// Asks for pages of 2 MB where memory of so many bytes is fresh: one page fault instead of 512, of which
// torch's threads take an equal part each.
void in_huge_pages(void* data, size_t bytes);

}  // namespace fastrnn::cpu
