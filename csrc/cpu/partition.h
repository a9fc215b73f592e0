// Who does what: the choice of a Partition (layer.h) for a layer and a number of threads. No choice
// changes a bit of the results.
#pragma once
#include "layer.h"

namespace fastrnn::cpu {

// Below so many multiply-adds a step and thread, a barrier costs more than the thread saves.
constexpr int64_t worth_a_barrier = 4096;
// Below so many in the whole layer, waking the threads costs more.
constexpr int64_t worth_a_thread = 100000;
// A thread takes rows of its own, and then waits for nobody, only if it gets so many: with fewer, tiles
// are too short to use the weights they load. It packs all weights for itself, which pays while
// W_hh (so many values) leaves room in its L2 cache and there are enough rows of data in all steps.
// Measured on 2 cores with 1 MB of L2 (LSTM, B = 16): at H = 64, 200 and 256 rows take 0.85, 0.93 and
// 1.0 of the time that units take; from H = 400 on 1.05 and more.
constexpr int64_t rows_per_thread = 8;
constexpr int64_t values_per_thread = 1 << 18;
constexpr int64_t data_rows_per_thread = 256;

inline int at_most(int a, int64_t b) { return a < b ? a : static_cast<int>(b < 1 ? 1 : b); }

inline Partition choose_partition(const Sequence& sequence, const Dimensions& d, int gates,
                                  int threads) {
    Partition p;
    const int64_t step = sequence.batch * gates * d.hidden * d.recurrent;
    const int64_t total =
        sequence.rows() * gates * d.hidden * (d.recurrent + d.input) * d.directions;
    threads = at_most(threads, total / worth_a_thread);
    if (sequence.batch >= rows_per_thread * threads &&
        sequence.rows() >= data_rows_per_thread * threads &&
        gates * d.hidden * d.recurrent <= values_per_thread) {
        p.rows = threads;  // no barrier at all
        return p;
    }
    if (d.directions == 2 && threads % 2 == 0) {
        p.directions = 2;
        threads /= 2;
    }
    p.units = at_most(at_most(threads, step / worth_a_barrier), (d.hidden + 15) / 16);
    return p;
}

}  // namespace fastrnn::cpu
