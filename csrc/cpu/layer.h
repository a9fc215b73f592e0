// What a kernel is told: one layer of a network, both directions, as plain pointers and sizes. No
// torch here.
//
// Rows. A sequence of T steps is N rows, step after step: all rows of step 0, then those of step 1.
// A padded input has B rows in every step; packed data has fewer and fewer. `void*` points to
// values of the storage type (the dtype of the user's tensors); the arithmetic type is float, or
// double for float64, and is called T.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "barrier.h"

namespace fastrnn::cpu {

struct Sequence {
    int64_t steps;               // T >= 1
    int64_t batch;               // B = batch_sizes[0]
    const int64_t* batch_sizes;  // [T], non-increasing
    const int64_t* offsets;      // [T + 1], offsets[t] is the first row of step t, offsets[T] = N

    int64_t rows() const { return offsets[steps]; }
};

// threads = directions * rows * units: which thread does what in the time loop. Threads of
// different directions or of different rows never wait for each other; those that share the units
// of a row meet once a step.
struct Partition {
    int directions = 1;
    int rows = 1;
    int units = 1;

    int threads() const { return directions * rows * units; }
};

struct Team {
    Partition partition;
    Barrier all;
    Barrier* groups;  // [directions * rows]
};

struct Dimensions {
    int64_t input;      // I
    int64_t hidden;     // H
    int64_t recurrent;  // size of h: H, or P where there is a projection
    bool projected;
    int directions;  // D
};

struct Weights {          // contiguous
    const void* ih;       // [G * H, I]
    const void* hh;       // [G * H, H or P]
    const void* bias_ih;  // [G * H] or null
    const void* bias_hh;  // [G * H] or null
    const void* hr;       // [P, H] or null
};

struct ForwardDirection {
    Weights weights;
    const void* h0;  // [B, H or P]
    const void* c0;  // [B, H] or null
    void* h_n;       // [B, H or P]
    void* c_n;       // [B, H] or null
    void* output;    // [N, H or P], rows output_stride apart
    void* saved;     // [N, saved * H] or null: what backward needs, if it is to be kept
    void* c;         // [N, H] or null: c_t of every step, likewise
};

struct ForwardLayer {
    Sequence sequence;
    Dimensions size;
    const void* input;  // [N, I], contiguous
    int64_t output_stride;
    ForwardDirection direction[2];
    void* workspace;
    Team* team;
};

struct WeightGradients {  // of T, contiguous, null where not wanted
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
    const void* grad_output;  // [N, H or P], rows grad_output_stride apart; or null for zeros
    const void* grad_h_n;     // [B, H or P] of T or null
    const void* grad_c_n;     // [B, H] of T or null
    WeightGradients grads;
    void* grad_h0;  // [B, H or P] of T or null
    void* grad_c0;  // [B, H] of T or null
};

struct BackwardLayer {
    Sequence sequence;
    Dimensions size;
    const void* input;  // [N, I], contiguous
    int64_t output_stride;
    int64_t grad_output_stride;
    bool grad_output_stored;  // whether grad_output is of the storage type, as the user gives it
    BackwardDirection direction[2];
    void* grad_input;  // [N, I] of T or null
    void* workspace;
    Team* team;
};

// The kernels of one cell and one storage type. `forward` and `backward` are called by every thread
// of the team with its rank; the workspace (64-byte aligned, of as many bytes as the other two say)
// is shared by all.
struct Kernel {
    size_t (*forward_workspace)(const ForwardLayer&);
    void (*forward)(const ForwardLayer&, int rank);
    size_t (*backward_workspace)(const BackwardLayer&);
    void (*backward)(const BackwardLayer&, int rank);
};

}  // namespace fastrnn::cpu
