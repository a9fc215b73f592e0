// What the CUDA kernels are told: one direction of one layer, as plain pointers and sizes. No torch
// here.
//
// Sizes: T steps, B batch, H hidden, P projection, R the size of h (H, or P where there is a
// projection), G gates, N rows: all rows of step 0, then those of step 1. A padded input has B rows
// in every step; packed data has fewer and fewer. `void*` points to values of the storage type (the
// dtype of the user's tensors); `void* ... of A` to the arithmetic type: float, or double for
// float64. What is not called strided is contiguous.
#pragma once
#include <stdint.h>

#include "../cells/cell.h"
#include "../layer.h"

namespace fastrnn::cuda {

// Gradients of a unit's gates, as products take them: those of W_ih x + b_ih in the order of the gates,
// and behind them, unless they are the same, those of W_hh h + b_hh.
template <class Cell>
constexpr int stored_gradients = Cell::grads == Cell::gates ? Cell::gates : 2 * Cell::gates;

struct LayerSize {
    int64_t hidden;              // H
    int64_t recurrent;           // R
    int64_t output_stride;       // between rows of output
    int64_t grad_output_stride;  // between rows of grad_output
};

struct ForwardDirection {
    const void* x;        // [N, G * H]: W_ih x_t
    const void* bias_ih;  // [G * H] or null
    const void* bias_hh;  // [G * H] or null
    const void* h0;       // [B, R], or null for zeros
    const void* c0;       // [B, H], likewise, or null for a cell without c
    void* h;              // [B, R]: h_n, and on the stepwise path maybe h_t
    void* c;              // [B, H] of A: c_t, on the stepwise path, if it is not kept
    void* c_n;            // [B, H]
    void* output;         // [N, R], strided
    void* again;          // likewise, or null: the output once more
    void* saved;          // [N, saved, H] or null: what backward needs, if it is to be kept
    void* kept_c;         // [N, H] or null: c_t of every step, likewise
};

// Where the gradients of the biases go: null where not wanted, or where others add them up.
struct BiasGradients {
    void* ih;    // [G * H]
    void* hh;    // [G * H]
    void* sums;  // [blocks of rows][grads][H] of A, if either is wanted: what a block has of them
    unsigned* done;  // [blocks of units]: blocks of rows that have ended
};

struct BackwardDirection {
    const void* h0;           // [B, R], or null for zeros
    const void* c0;           // [B, H], likewise, or null for a cell without c
    const void* output;       // [N, R], strided: as forward left it
    const void* saved;        // [N, saved, H], likewise
    const void* kept_c;       // [N, H], likewise
    const void* grad_output;  // [N, R], strided; or null for zeros
    const void* dh_n;         // [B, R]; or null for zeros
    const void* dc_n;         // [B, H]; or null for zeros
    void* dh;                 // [B, R] of A: what is known of dL/dh, and in the end grad_h0
    void* dc;                 // [B, H] of A: likewise, grad_c0
    void* dgates;             // [N, stored gradients, H]: gradients before the activations
    void* prev;               // [N, R] or null: h_{t-1} of every row
    BiasGradients biases;
};

}  // namespace fastrnn::cuda
