// The arguments of a device's kernels: one layer of a network, both directions, as plain pointers
// and sizes. Nothing of torch.
//
// Rows. A sequence of T steps is N rows: all rows of step 0, then those of step 1, and so on. A
// padded input has B rows in every step; packed data has fewer and fewer:
//
//     padded, T = 3, B = 3               packed, batch_sizes = {3, 2, 1}
//     step 0   | row 0 | 1 | 2 |         step 0   | row 0 | 1 | 2 |      offsets = {0, 3, 5, 6}
//     step 1   | 3     | 4 | 5 |         step 1   | 3     | 4 |
//     step 2   | 6     | 7 | 8 |         step 2   | 5     |
//
// Events. A row of padded input may have resets and an end, by one of these for each step. In the
// reverse direction, too, no state passes between the step of a reset and the one before it:
//
//     step                 0     1     2     3     4     5
//     event                               reset          past_end
//     forward direction    0 --> 1 --> 2     3 --> 4
//     reverse direction    0 <-- 1 <-- 2     3 <-- 4            the first step is 4
//
// C is c_states * H: the values of c of one row, those of a second state after those of the first.
//
// Types. `void*` points to values of the storage type (the dtype of the user's tensors) on the
// device. The arithmetic type is float, or double for float64. The gradient type is the type in
// which a device returns gradients: the storage type or the arithmetic type
// (Device::stores_gradients, device.h).
#pragma once
#include <stdint.h>

#include "cells/cell.h"

namespace fastrnn {

enum class Storage { float32, float64, bfloat16, float16 };

enum class Pass { forward, backward };

enum Event : uint8_t {
    no_event,
    reset,     // the state that enters the step is zeros
    past_end,  // the row has ended: the output is zeros, and states stay as they are. All that
               // follows in a row is past_end
};

struct Sequence {
    int64_t steps;               // T >= 1
    int64_t batch;               // B = batch_sizes[0]
    const int64_t* batch_sizes;  // [T], non-increasing, on the host
    const int64_t* offsets;      // [T + 1], offsets[t] is the first row of step t, offsets[T] = N
    const uint8_t* events;       // [T, B] of Event on the device, for padded input; or null
    const void* zeros;           // with events, a row of max(R, C) zeros on the device

    int64_t rows() const { return offsets[steps]; }
    // The events [B] at which a direction enters step t, which are `reset` or decide where it
    // begins; or null.
    const uint8_t* entering(int64_t t, bool reverse) const {
        t += reverse;
        return events && t < steps ? events + t * batch : nullptr;
    }
};

struct Dimensions {
    int64_t input;      // I
    int64_t hidden;     // H
    int64_t recurrent;  // R, the size of h: H, or P where there is a projection
    bool projected;
    int directions;  // D
};

// What a forward and a backward pass over a layer have in common.
struct Layer {
    int cell;  // its index (cells/known.h)
    Storage storage;
    int device_index;  // of the GPU; not used on the CPU
    int threads;       // the most CPU threads that may compute it; not used on a GPU
    Sequence sequence;
    Dimensions size;
};

struct Weights {                       // contiguous
    const void* ih;                    // [G * H, I]
    const void* hh;                    // [G * H, R], or [G * H] of a diagonal cell
    const void* bias_ih;               // [G * H] or null
    const void* bias_hh;               // [G * H] or null
    const void* hr;                    // [P, H] or null
    const void* vectors[max_vectors];  // [H] each, as many as the cell has
};

struct ForwardDirection {
    Weights weights;
    const void* h0;     // [B, R]. A GPU also takes null, for zeros, of a padded input
    const void* c0;     // [B, C], or null for a cell without c. A GPU takes null as for h0
    void* h_n;          // [B, R]
    void* c_n;          // [B, C] or null
    void* output;       // [N, R], rows output_stride apart
    void* output_copy;  // a second copy of the output, with the same strides, or null
    void* saved;        // [N, saved * H] or null: what backward needs, if it is saved
    void* c;            // [N, C], rows c_stride apart, or null: c_t of every step, if it is saved
};

struct ForwardLayer : Layer {
    const void* input;  // [N, I], contiguous
    int64_t output_stride;
    int64_t c_stride;
    ForwardDirection direction[2];
};

struct WeightGradients {  // of the gradient type, contiguous, null where not required
    void* ih;
    void* hh;
    void* bias_ih;
    void* bias_hh;
    void* hr;
    void* vectors[max_vectors];
};

struct BackwardDirection {
    Weights weights;
    const void* h0;
    const void* c0;
    const void* output;
    const void* saved;
    const void* c;
    const void* grad_output;  // [N, R], rows grad_output_stride apart; or null for zeros
    const void* grad_c;    // [N, C], rows grad_output_stride apart: of c_t of every step, besides
                           // what reaches it through the cell; of the storage type; or null
    const void* grad_h_n;  // [B, R] of the gradient type or null
    const void* grad_c_n;  // [B, C] of the gradient type or null
    WeightGradients grads;
    void* grad_h0;  // [B, R] of the gradient type or null
    void* grad_c0;  // [B, C] of the gradient type or null
};

struct BackwardLayer : Layer {
    const void* input;  // [N, I], contiguous
    int64_t output_stride;
    int64_t grad_output_stride;
    // Whether grad_output is of the storage type, as the user's is, or of the gradient type.
    bool grad_output_stored;
    BackwardDirection direction[2];
    void* grad_input;  // [N, I] of the gradient type or null
};

}  // namespace fastrnn
