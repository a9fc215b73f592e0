// What kernels are told of a layer: plain pointers and sizes, no torch.
//
// Sizes: T steps, B batch, H hidden units, P projection, R the size of h (P with a projection, else
// H), G gates, N rows. The rows of all steps follow one another, those of step 0 first: padded
// input has B rows in every step, packed data fewer and fewer. `void*` points to values of the
// storage type, the dtype of the user's tensors; "of A" means the arithmetic type, float, or double
// for float64. Arrays are contiguous unless they are called strided.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#include "../../api.h"
#include "../../cells/cell.h"
#include "../../layer.h"

namespace fastrnn::cuda {

// Gate gradients stored per unit, in the layout that the products read: those of W_ih x + b_ih in
// the order of the gates, then those of W_hh h + b_hh, unless both are the same.
template <class Cell>
constexpr int stored_gradients = Cell::grads == Cell::gates ? Cell::gates : 2 * Cell::gates;

struct LayerSize {
    int64_t hidden;              // H
    int64_t recurrent;           // R
    int64_t output_stride;       // between rows of output
    int64_t c_stride;            // between rows of kept_c, forward
    int64_t grad_output_stride;  // between rows of grad_output, and of grad_c
};

// Sequence of ../../layer.h on the device.
struct DeviceSequence {
    const int64_t* offsets;  // [T + 1]: the first row of every step, and N; null if every step has
                             // B rows
    int64_t steps;           // T >= 1
    int64_t batch;           // B
};

// The arrays of one direction, forward.
struct ForwardArrays {
    const void* x;        // [N, G * H]: W_ih x_t
    const void* bias_ih;  // [G * H] or null
    const void* bias_hh;  // [G * H] or null
    const void* h0;       // [B, R], or null for zeros
    const void* c0;       // [B, H], or null for zeros; null for a cell without c
    void* h;              // [B, R]: h_n; on the stepwise path also h_t, where the output has it not
    void* c;              // [B, H] of A: c_t, on the stepwise path, if kept_c does not have it
    void* c_n;            // [B, H]
    void* output;         // [N, R], strided
    void* again;          // [N, R], strided, or null: a second copy of the output
    void* saved;          // [N, saved, H] or null: the cell's values that backward reads
    void* kept_c;         // [N, H], strided, or null: c_t of every step
};

// Where a kernel adds up the gradients of the biases. ih and hh are null where they are not wanted,
// or where another kernel adds them up.
struct BiasGradients {
    void* ih;        // [G * H]
    void* hh;        // [G * H]
    void* sums;      // [blocks of rows][grads][H] of A, if either is wanted: each block's sums
    unsigned* done;  // [blocks of units]: how many blocks of rows have finished
};

// The arrays of one direction, backward.
struct BackwardArrays {
    const void* h0;           // [B, R], or null for zeros
    const void* c0;           // [B, H], or null for zeros; null for a cell without c
    const void* output;       // [N, R], strided, from forward
    const void* saved;        // [N, saved, H], from forward
    const void* kept_c;       // [N, H], from forward
    const void* grad_output;  // [N, R], strided, or null for zeros
    const void* grad_c;       // [N, H], strided as grad_output, or null for zeros
    const void* dh_n;         // [B, R], or null for zeros
    const void* dc_n;         // [B, H], or null for zeros
    void* dh;                 // [B, R] of A: the running dL/dh, finally grad_h0
    void* dc;                 // [B, H] of A: the running dL/dc, finally grad_c0
    void* dgates;             // [N, stored gradients, H]: gradients before the activations
    void* prev;               // [N, R] or null: h_{t-1} of every row
    BiasGradients biases;
};

// What every kernel that runs all steps in one launch is told. Each path adds its own sizes.
template <class Arrays>
struct LayerArguments {
    LayerSize size;
    DeviceSequence sequence;
    Arrays direction[2];
    const void* weight_hh[2];  // [G * H, H]
};

// Copies the host's offsets [T + 1] to `to`, on the device. They travel as kernel arguments: the
// host's memory is not read after the call returns, so that a CUDA graph can capture it.
FASTRNN_API cudaError_t launch_store_offsets(const int64_t* offsets, int64_t steps, int64_t* to,
                                             cudaStream_t stream);

}  // namespace fastrnn::cuda
