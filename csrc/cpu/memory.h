// Memory for results on the CPU: huge pages where it is large, and one block for all that a training
// step saves for backward, which is cached for the next step.
#pragma once
#include <stddef.h>

#include <memory>
#include <vector>

namespace fastrnn::cpu {

// Has the system use huge pages for memory that is fresh because it is large, and touches each page
// once, on up to `threads` threads: one page fault for each 2 MB instead of 512.
void use_huge_pages(void* data, size_t bytes, int threads);

// The same for the caller's own memory, of any size, without touching it.
void advise_huge_pages(void* data, size_t bytes);

// A block of memory, 64-byte aligned, freed with its last copy.
using Block = std::shared_ptr<void>;

struct Pieces {
    Block block;
    std::vector<void*> data;  // of each piece, 64-byte aligned
};

// Memory for pieces of these sizes that live about equally long, in one block:
//
//     | piece 0 | padding to 64 | piece 1 | padding | ... |   unused, up to `least` bytes   |
//
// glibc's malloc returns the top of its heap to the system once twice the largest block it has freed
// is free there; the next training step then gets fresh memory, with a page fault every 4 KB. If the
// largest block is half of all that a step allocates, this does not happen: `least` makes it so. Its
// unused end is never touched. A step of an LSTM, B = 16, H = 256: 21.7 ms in some processes and 26.7
// in others with three blocks, 21.7 in all with one.
//
// A block that malloc would not reuse (always_fresh, choices.h) is taken from a cache of one block, to
// which it returns when it is no longer used. `allocate` returns a new block. Until the next step writes
// a cached block, the system may reclaim its pages if it runs out of others.
Pieces allocate_together(const std::vector<size_t>& bytes, size_t least, int threads,
                         Block (*allocate)(size_t bytes));

}  // namespace fastrnn::cpu
