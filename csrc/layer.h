// What a device's kernels are told: one layer of a network, both directions, as plain pointers and
// sizes. No torch here.
//
// Rows. A sequence of T steps is N rows, step after step: all rows of step 0, then those of step 1.
// A padded input has B rows in every step; packed data has fewer and fewer. `void*` points to values
// of the storage type (the dtype of the user's tensors) on the device. The arithmetic type is float,
// or double for float64; the gradient type is what a device makes its gradients of (Device in
// network.h): either of the two.
#pragma once
#include <stdint.h>

namespace fastrnn {

enum class Storage { float32, float64, bfloat16, float16 };

enum class Pass { forward, backward };

struct Sequence {
    int64_t steps;               // T >= 1
    int64_t batch;               // B = batch_sizes[0]
    const int64_t* batch_sizes;  // [T], non-increasing, on the host
    const int64_t* offsets;      // [T + 1], offsets[t] is the first row of step t, offsets[T] = N

    int64_t rows() const { return offsets[steps]; }
};

struct Dimensions {
    int64_t input;      // I
    int64_t hidden;     // H
    int64_t recurrent;  // R, the size of h: H, or P where there is a projection
    bool projected;
    int directions;  // D
};

struct Weights {          // contiguous
    const void* ih;       // [G * H, I]
    const void* hh;       // [G * H, R]
    const void* bias_ih;  // [G * H] or null
    const void* bias_hh;  // [G * H] or null
    const void* hr;       // [P, H] or null
};

struct ForwardDirection {
    Weights weights;
    const void* h0;  // [B, R]; null for zeros, on a GPU, of B rows in every step
    const void* c0;  // [B, H] or null; likewise
    void* h_n;       // [B, R]
    void* c_n;       // [B, H] or null
    void* output;    // [N, R], rows output_stride apart
    void* again;     // likewise, or null: the output once more
    void* saved;     // [N, saved * H] or null: what backward needs, if it is to be kept
    void* c;         // [N, H] or null: c_t of every step, likewise
};

struct ForwardLayer {
    Sequence sequence;
    Dimensions size;
    const void* input;  // [N, I], contiguous
    int64_t output_stride;
    ForwardDirection direction[2];
};

struct WeightGradients {  // of the gradient type, contiguous, null where not wanted
    void* ih;
    void* hh;
    void* bias_ih;
    void* bias_hh;
    void* hr;
};

struct BackwardDirection {
    Weights weights;
    const void* h0;
    const void* c0;
    const void* output;
    const void* saved;
    const void* c;
    const void* grad_output;  // [N, R], rows grad_output_stride apart; or null for zeros
    const void* grad_h_n;     // [B, R] of the gradient type or null
    const void* grad_c_n;     // [B, H] of the gradient type or null
    WeightGradients grads;
    void* grad_h0;  // [B, R] of the gradient type or null
    void* grad_c0;  // [B, H] of the gradient type or null
};

struct BackwardLayer {
    Sequence sequence;
    Dimensions size;
    const void* input;  // [N, I], contiguous
    int64_t output_stride;
    int64_t grad_output_stride;
    bool
        grad_output_stored;  // whether grad_output is of the storage type, as the user gives it, or
                             // of the gradient type
    BackwardDirection direction[2];
    void* grad_input;  // [N, I] of the gradient type or null
};

}  // namespace fastrnn
