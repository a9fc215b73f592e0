// Memory for results on the CPU: huge pages where it is large, and one block for all that a
// training step saves for backward, which is cached for the next step.
#pragma once
#include <stddef.h>

#include <memory>
#include <vector>

#include "../api.h"

namespace fastrnn::cpu {

// Has the system use huge pages for memory that is fresh because it is large, and touches each page
// once, on up to `threads` threads: one page fault for each 2 MB instead of 512.
FASTRNN_API void use_huge_pages(void* data, size_t bytes, int threads);

// The same for the caller's own memory, of any size, without touching it.
FASTRNN_API void advise_huge_pages(void* data, size_t bytes);

// Places pieces of memory that live about equally long in one block, for one allocation instead of
// several. Replaces their sizes by their offsets, which are multiples of 64, and returns the size
// of the block:
//
//     | piece 0 | padding to 64 | piece 1 | padding | ... |   unused, up to `least` bytes   |
//
// glibc's malloc returns the top of its heap to the system once twice the largest block it has
// freed is free there; the next training step then gets fresh memory, with a page fault every 4 KB.
// If the largest block is half of all that a step allocates, this does not happen: `least` makes it
// so. Its unused end is never touched. With a block for each piece, a step of an LSTM, B = 16, H =
// 256, takes 21.7 ms in some processes and 26.7 in others.
FASTRNN_API size_t place_together(std::vector<size_t>& pieces, size_t least);

// A block of memory, 64-byte aligned, freed with its last copy.
using Block = std::shared_ptr<void>;

// A new block from `allocate`, or, for a size that malloc would not reuse (always_fresh,
// choices.h), the one that a cache of one block has: a block of such a size returns there when it
// is no longer used. Until it is written again, the system may reclaim its pages if it runs out of
// others.
FASTRNN_API Block allocate_block(size_t bytes, int threads, Block (*allocate)(size_t bytes));

}  // namespace fastrnn::cpu
