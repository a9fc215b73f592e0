// The arguments of a CPU kernel: a layer (../layer.h), and how threads partition its work.
// Gradients are of the arithmetic type, called T in the kernels.
#pragma once
#include <stddef.h>

#include "../layer.h"
#include "barrier.h"

namespace fastrnn::cpu {

// How the threads partition the time loop: threads = directions * rows * units. Threads of
// different directions, or of different rows of the batch, never wait for each other in it. Threads
// that share the units of the same rows meet once a step. Two of each:
//
//                       units [0, H/2)   units [H/2, H)
//     direction 0
//       rows [0, B/2)      thread 0         thread 1      <- these two meet
//       rows [B/2, B)      thread 2         thread 3
//     direction 1
//       rows [0, B/2)      thread 4         thread 5
//       rows [B/2, B)      thread 6         thread 7
struct Partition {
    int directions = 1;
    int rows = 1;
    int units = 1;

    int threads() const { return directions * rows * units; }
};

struct Team {
    Partition partition;
    Barrier all;
    Barrier* groups;  // [directions * rows]: for threads that share units
};

struct ForwardTask : ForwardLayer {
    void* workspace = nullptr;
    Team* team = nullptr;
};

struct BackwardTask : BackwardLayer {
    void* workspace = nullptr;
    Team* team = nullptr;
};

// The shape of a step's register tiles, for explain: up to `rows` rows of `vectors` vectors of
// `lanes`.
struct TileShape {
    int lanes, vectors, rows;
    const char* operands;  // their name
};

// The kernels of one cell and one storage type. Every thread of the team calls `forward` or
// `backward` with its rank. They share the workspace, which is 64-byte aligned and of as many bytes
// as forward_workspace or backward_workspace returns.
struct Kernel {
    size_t (*forward_workspace)(const ForwardTask&);
    void (*forward)(const ForwardTask&, int rank);
    size_t (*backward_workspace)(const BackwardTask&);
    void (*backward)(const BackwardTask&, int rank);
    TileShape (*forward_tile)(const ForwardTask&);
    TileShape (*backward_tile)(const BackwardTask&);
};

}  // namespace fastrnn::cpu
