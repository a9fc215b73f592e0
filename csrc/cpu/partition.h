// The choice of a Partition (layer.h) for a layer and a number of threads. No choice changes a bit
// of the results.
#pragma once
#include "../cells/known.h"
#include "choices.h"
#include "cores.h"
#include "layer.h"

namespace fastrnn::cpu {

// n, but from 1 to `most`.
inline int at_most(int most, int64_t n) {
    return most < n ? most : static_cast<int>(n < 1 ? 1 : n);
}

inline Partition choose_partition(Pass pass, const Layer& layer, int threads) {
    const Sequence& sequence = layer.sequence;
    const Dimensions& d = layer.size;
    const int gates = info_of(layer.cell).gates;
    Partition p;
    const int64_t step = sequence.batch * gates * d.hidden * d.recurrent;
    const int64_t total =
        sequence.rows() * gates * d.hidden * (d.recurrent + d.input) * d.directions;
    threads = at_most(threads, total / worth_a_thread);
    const bool many_rows =
        pass == Pass::backward || sequence.batch >= many_rows_per_thread * threads;
    const int64_t values =
        d.directions == 1 && many_rows ? values_for_many_rows : values_per_thread;
    if (sequence.batch >= rows_per_thread * threads &&
        sequence.rows() >= data_rows_per_thread * threads &&
        gates * d.hidden * d.recurrent < values) {
        p.rows = threads;  // no barrier at all
        return p;
    }
    if (d.directions == 2 && threads % 2 == 0) {
        p.directions = 2;
        threads /= 2;
    }
    const auto share = [&](int64_t worth) {
        return at_most(at_most(threads, step / worth),
                       (d.hidden + shared_units - 1) / shared_units);
    };
    p.units = share(worth_a_barrier);
    if (p.units > 1 && p.threads() > cores()) p.units = share(worth_a_sleep);
    return p;
}

}  // namespace fastrnn::cpu
