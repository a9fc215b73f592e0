// A thread's share of the time loop, forward and backward: some directions, rows and units.
#pragma once
#include "layer.h"
#include "panels.h"

namespace fastrnn {
namespace FASTRNN_ISA {

using cpu::Barrier;
using cpu::Team;

struct Share {
    Span directions, rows;
    int64_t row_share;    // index of `rows` among the shares of the rows
    int64_t unit, units;  // index of the thread among those that share these rows, and their number
    Barrier* barrier;     // of those threads

    // Each share of the rows has about the same number of steps. In packed data the first rows are
    // the longest:
    //
    //     row 0  * * * * * *
    //     row 1  * * * * *       share 0: 11 steps
    //     ------------------
    //     row 2  * * * *
    //     row 3  * * *           share 1: 10 steps
    //     row 4  * * *
    Share(Team& team, int rank, const Sequence& sequence, int direction_count) {
        const auto& p = team.partition;
        units = p.units;
        unit = rank % p.units;
        const int64_t group = rank / p.units, direction = group / p.rows;
        row_share = group % p.rows;
        barrier = &team.groups[group];
        directions = p.directions == 1 ? Span{0, direction_count} : Span{direction, direction + 1};
        rows = {border(sequence, row_share, p.rows), border(sequence, row_share + 1, p.rows)};
    }

private:
    static int64_t border(const Sequence& s, int64_t part, int64_t parts) {
        if (part == 0) return 0;
        if (part == parts) return s.batch;
        if (s.rows() == s.steps * s.batch) return Span{0, s.batch}.part(part, parts).first;
        // Row b has as many steps as there are t with batch_sizes[t] > b. Count them row by row up
        // to the target.
        const int64_t target = s.rows() * part / parts;
        int64_t t = s.steps - 1, done = 0, b = 0;
        for (; b < s.batch && done < target; ++b) {
            while (s.batch_sizes[t] <= b) --t;
            done += t + 1;
        }
        return b;
    }
};

}  // namespace FASTRNN_ISA
}  // namespace fastrnn
