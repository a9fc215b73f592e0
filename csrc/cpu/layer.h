// What a CPU kernel is told: a layer (../layer.h), and how the threads share its work. Gradients are
// of the arithmetic type, called T. No torch here.
#pragma once
#include <stddef.h>

#include "../layer.h"
#include "barrier.h"

namespace fastrnn::cpu {

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

struct ForwardLayer : fastrnn::ForwardLayer {
    void* workspace;
    Team* team;
};

struct BackwardLayer : fastrnn::BackwardLayer {
    void* workspace;
    Team* team;
};

// How the product of a step is cut, for who asks (explain.cpp).
struct Cut {
    int lanes, vectors, tile_rows;  // a tile is up to so many rows of so many vectors
    const char* operands;           // of what
};

// The kernels of one cell and one storage type. `forward` and `backward` are called by every thread
// of the team with its rank; the workspace (64-byte aligned, of as many bytes as the other two say)
// is shared by all.
struct Kernel {
    size_t (*forward_workspace)(const ForwardLayer&);
    void (*forward)(const ForwardLayer&, int rank);
    size_t (*backward_workspace)(const BackwardLayer&);
    void (*backward)(const BackwardLayer&, int rank);
    Cut (*forward_cut)(const ForwardLayer&);
    Cut (*backward_cut)(const BackwardLayer&);
};

}  // namespace fastrnn::cpu
