// Every constant of the CPU code that was chosen by measurement, with what was measured. If nothing
// else is given: 2 cores of Zen 4 (AVX-512, 1 MB of L2 each), float32, T = 100, the best of three
// alternating runs (at_once_rows and few_rows: a single run). "Xeon" is two cores of an Intel Xeon
// (AVX-512, AMX, 2 MB of L2 each). A ratio "without / with" above 1 is the speedup of the choice.
//
// Only the lengths of sums, sum_rows and backward_rows change bits of the results.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastrnn::cpu {

// --- partitions (partition.h) --------------------------------------------------------------------

// Threads share the units of a row, and meet once a step, if each has this many multiply-adds in a
// step. A barrier takes 75 ns on Zen 4, in which a core does 4000, and with the exchange of h 300
// ns on the Xeon, in which a core does 15,000. Xeon, B = 1, in us:
//
//                        multiply-adds a step    one thread    two
//     GRU,  H = 64            12,000                  99       134
//     LSTM, H = 64            16,000                 103       128
//     RNN,  H = 128           16,000                 134       146
//     GRU,  H = 96            28,000                 196       202    (best: 161 and 141)
//     LSTM, H = 96            37,000                 264       238
constexpr int64_t worth_a_barrier = 10000;
// The same where there are more threads than cores for this process, so that one sleeps until
// another wakes it. GRU, B = 1, H = 64, 8 threads on 2 cores without this: 0.79 of the speed of
// torch's layer, which uses one thread.
constexpr int64_t worth_a_sleep = 65536;
// A thread is used for this many multiply-adds in the whole layer. One step of an LSTM, B = 1, in
// us:
//
//                        multiply-adds    one thread    two
//     H = 64                  33,000           1.6       2.0
//     H = 128                131,000           5.8       4.1
//     H = 256                524,000          27        13
constexpr int64_t worth_a_thread = 60000;
// Units are shared in multiples of about this many: a vector of floats of AVX-512.
constexpr int64_t shared_units = 16;

// Threads partition the rows, and never wait for each other, if each gets
// - this many rows (with fewer, tiles are too short to reuse the weights they load),
// - this many rows in all steps together (each thread packs all weights for itself),
// - and a W_hh of fewer values than these, which must stay in the L2 cache of its core.
// Time, relative to shared units, LSTM, B = 16: 0.89 at H = 64, 0.93 at 200, 1.03 at 256, 1.00 at
// 400; and a thread that is interrupted delays no other.
constexpr int64_t rows_per_thread = 8;
constexpr int64_t data_rows_per_thread = 256;
constexpr int64_t values_per_thread = 1 << 18;
// In a backward pass, or with this many rows a thread, W_hh of one direction may have this many
// values. Xeon, time relative to shared units: a training step of LSTM, H = 256, 0.97 at B = 16, 32
// and 64 (0.99 at B = 16 with the forward pass too; inference 1.08); GRU, H = 300, 0.95 and 0.93 at
// B = 16 and 32; RNN, H = 512, 0.98; LSTM, H = 400, B = 32: inference 1.10, training 1.03. Relative
// to one thread for each direction, LSTM, H = 256, B = 32: 1.04.
constexpr int64_t many_rows_per_thread = 16;
constexpr int64_t values_for_many_rows = 300000;

// --- barriers (barrier.cpp) ----------------------------------------------------------------------

// A waiting thread spins this many times, some tens of microseconds, before it does anything else:
// a thread that sleeps is late by as much. With 200, LSTM, B = 1, H = 256, two threads takes 3.6 ms
// instead of 0.9 as soon as one of them is delayed a little. With 2000 and another process on each
// core no measured layer is slower than torch's.
constexpr int spins = 2000;
// Before these it spins so many times, about 2 us, without reading a clock.
constexpr int uncounted_spins = 100;
// With more threads than cores: a spinning thread occupies the core of a thread it waits for.
constexpr int crowded_spins = 200;
// Then it spins this many times more, some hundreds of microseconds: longer than a thread takes to
// wake (240 us on a virtual machine). A thread that slept is late at the next barrier, where the
// other thread would sleep for it, and so on at every step: a training step of an LSTM, B = 16, H =
// 512, two threads, took 110 ms instead of 81.
constexpr int long_spins = 8000;
// If these were in vain, as where the other threads wait for this core, a thread omits them before
// this many of its next sleeps, and twice as many each time they are in vain again.
constexpr int fewest_without_long_spins = 16, most_without_long_spins = 1024;

// --- other processes (busy.cpp, cores.cpp) -------------------------------------------------------

// Measured on two cores beside a process that computes without end, on Linux 6.18, with an LSTM,
// T = 100, B = 1, H = 128, whose call takes 0.22 ms on two threads of a quiet machine and 0.25
// on one.
constexpr int64_t millisecond = 1000000;

// Pauses and trials are counted in runs. A shorter run than this counts as a part of one, so
// that very short runs do not try more threads all the time.
constexpr int64_t whole_run = millisecond;
// Runs measure what they lose for so long after a run of a millisecond. A run that met another
// process took 2 to 80 ms. Reading the clock of a thread's time on a core takes 0.3 to 0.6 us;
// short runs on a quiet machine never do it.
constexpr int64_t watched_run = millisecond, watched_time = 50 * millisecond;
// What a run may lose on a quiet machine: a sleeping thread takes up to 240 us to wake.
constexpr int64_t usual_loss = millisecond / 4;
// A run with fewer threads takes longer by about this share of its time: on one thread instead
// of two, 0.1 (LSTM, B = 1, H = 128) to 1. Less time lost than that is no reason for fewer
// threads.
constexpr double saved = 0.5;
// Fewer threads are used after so many runs were lost, and a single run adds at most so many,
// however long it took. So two bad runs in succession are needed, or three among some more: any
// machine has other work for one time slice (4 ms) now and then.
constexpr double lost_runs = 6, most_lost_in_a_run = 4;
// After a pause more threads are tried for trial_runs. One bad run ends the trial, and the next
// pause is twice as long. A trial that fails costs one run of 4 to 20 ms. When the load had gone,
// two threads were used again after 10 to 50 runs of an LSTM of 2.5 ms (T = 80, B = 16, H = 160),
// and after 60 to 160 runs of a GRU of 0.37 ms (T = 60, B = 2, H = 200).
constexpr double trial_runs = 16, lost_in_trial = 2;
constexpr double shortest_pause = 8, longest_pause = 64;
// A thread reads its affinity mask, which takes 0.3 us, at every so many calls of cores().
constexpr int cores_known = 64;

// --- register tiles (operands.h, tile.h) ---------------------------------------------------------

// Vectors of a panel: an LSTM's four gates of one vector of units.
constexpr int max_panel_vectors = 4;
// Rows of a tile, so that the sums and a step's weights fit into the vector registers. NEON needs a
// register for the values of each row too: 6 rows of 4 vectors leave two for weights.
constexpr int tile_rows(int registers, int vectors, bool by_lane) {
    if (by_lane) return vectors == 4 ? 6 : vectors == 3 ? 7 : 9;
    if (registers == 32) return vectors == 4 ? 7 : 9;
    return vectors == 4 ? 3 : vectors == 3 ? 4 : vectors == 2 ? 6 : 9;
}
// Up to this many rows a tile is of two panels: a few rows alone have too few independent sums to
// hide the latency of a multiply-add.
constexpr int paired_rows(int registers, int vectors) {
    return registers == 32 ? (vectors == 4 ? 2 : 3) : (vectors >= 3 ? 1 : 2);
}

// --- forward (forward.h) -------------------------------------------------------------------------

// The input projection of about this many rows is computed at a time: enough to read its weights
// seldom, few enough that the result is still in the cache when the time loop reads it. LSTM, H =
// 512, B = 16, in GFLOP/s: 203 with 32, 206 with 64, 202 with 128, 203 with 256.
constexpr int64_t chunk_rows = 64;
// With AMX, whose products are so fast that reading the weights counts more. Xeon, LSTM, bfloat16,
// H = 512, B = 64, speedup over torch's layer: 0.95 with 64, 0.97 with 128.
constexpr int64_t amx_chunk_rows = 128;
// A whole sequence of up to this many rows is projected at a time: a panel of W_ih is packed, used
// and overwritten by the next. Packing the 16 MB of an LSTM's W_ih at H = 1024 into memory of its
// own took 2 of 19 ms at B = 1.
constexpr int64_t at_once_rows = 256;
// Up to this many rows a step is bound by reading the weights: 16-bit weights are packed as 16
// bits. LSTM, float16, B = 1: 3.1 ms instead of 3.8 at H = 512, 13.3 instead of 15.9 at 1024.
constexpr int64_t compact_rows = 3;
// Also up to this many rows, where a thread's share of the weights has more values than this, which
// do not fit into its L2 cache as 32 bits. Xeon, without / with, LSTM, H = 1024, B = 4, 8, 16:
// bfloat16 1.51, 1.21, 1.01, float16 1.42, 1.11; H = 512 (524,288 values), B = 4, 8: bfloat16 1.11,
// 1.05, float16 1.02. Where it is not done: GRU, float16, H = 512, B = 7: 0.94; LSTM, float16, H =
// 256, B = 8: 0.88.
constexpr int64_t compact_rows_outside_l2 = 8;
constexpr int64_t values_outside_l2 = 500000;

// --- prefetch and cache blocking (tile.h, panels.h, pack.h) --------------------------------------

constexpr int64_t cache_line = 64;
// A tile prefetches its panel into the L1 cache this many k before it multiplies them. One core of
// the Xeon, the product of a step of an LSTM, H = 512: 8 and 16 give 133 and 145 GFLOP/s at B = 7,
// 160 and 160 at 16.
constexpr int64_t prefetch_steps = 16;
// Not with AVX2, whose vectors are half a line: the prefetches take the load ports' time. Zen 3,
// LSTM, torch's time / ours with and without: inference, B = 16, H = 256: 0.88 and 1.10, 512: 0.76
// and 0.94, 1024: 1.13 and 1.35; a training step, H = 512: 0.86 and 1.02.
constexpr bool prefetches_panel(int vector_bytes) { return vector_bytes != 32; }
// A panel that several tiles read is multiplied by blocks of this many k, which stay in the L2
// cache. Xeon, backward, LSTM, H = 1024, B = 64, the products with W_hh and W_ih (4096 k): 158 and
// 163 GFLOP/s whole, 182 and 193 in blocks.
constexpr int64_t k_block = 1024;
// Rows multiplied with one k block after another: their sums, 16 KB, stay in the L1 cache.
constexpr int64_t k_block_rows = 64;
// With AMX's tiles: 32 rows of a k block stay in the L1 cache while the columns of a panel are
// read. Xeon, LSTM, bfloat16, H = 1024, B = 64, speedup over torch's layer: 0.94 whole, 0.89 with
// 128, 0.93 with 256, 0.98 with 512.
constexpr int64_t amx_k_block = 512;
// Of rows that other threads have just written, this many, about a tile, are prefetched together.
// Xeon, B = 1, without / with: inference of RNN, H = 256, 1.12, of LSTM, H = 128, 256, 512, 1.08,
// 1.04, 1.00; training of LSTM, H = 256, 1.02. With 64 rows at B = 16, H = 512: 0.98.
constexpr int64_t exchanged_rows = 8;
// Rows that are too far apart for the CPU's own prefetcher are prefetched this many rows ahead. One
// core of the Xeon, a training step of a GRU, T = 1, B = 32, H = 1024: 0.64 of torch's speed
// without, 0.79 with it (and with no division a row).
constexpr int64_t prefetch_distance = 16;
// Rows are transposed by this many values of each, from a buffer: rows a multiple of 4 KB apart
// share few places of the L1 cache, and a line would leave it before all of its values are used.
constexpr int64_t staged = 64;

// --- one step: unpacked weights (unpacked.h, row_lanes.h) ----------------------------------------

// From this many rows on, rows are transposed, so that a lane is a row, and multiplied
// transposed_at_once at a time, a multiple of a tile's. Xeon, dot products / so: GRU, B = 24, 32,
// 48: 0.87, 1.02, 1.2 at H = 256, 256, 200; RNN, H = 650, where rows of weights are unaligned, B =
// 24, 32: 1.00, 1.29.
constexpr int64_t transposed_rows = 28;
constexpr int64_t transposed_at_once = 96;
// A transposed tile has at most this many vectors of rows, and this many units: their sums are in
// registers.
constexpr int lane_vectors(int registers) { return registers == 32 ? 3 : 2; }
constexpr int lane_units(int registers, int lanes) {
    return lanes < registers / 4 ? lanes : registers / 4;
}
// Backward, the gradients of up to this many rows are computed with unpacked weights. A step of a
// GRU, H = 1024, one thread, relative to torch's time, without and with: 1.6 and 1.0 at B = 1, 0.66
// and 0.54 at 4, 0.78 and 0.65 at 8.
constexpr int64_t unpacked_rows = 8;
// Rows of unpacked weights that are read side by side.
constexpr int unpacked_columns_step = 8;

// --- lengths of sums (panels.h) ------------------------------------------------------------------

// This many products are summed before their sum is added to the total: a sum of short sums loses
// less to rounding than one long sum. LSTM, H = 512, B = 16: 64, 128, 256 and no limit give 193,
// 202, 206 and 206 GFLOP/s. Gradients are sums over all gates of all units, or over all rows of
// data: with 64, 128 and 256, a GRU's gradient of the input (H = 64, the worst case) has 1.0, 1.4
// and 1.7 times torch's error against float64.
constexpr int64_t forward_sum = 256;
constexpr int64_t backward_sum = 128;
// Of pairs of bfloat16, whose own rounding error is 2^16 times as large.
constexpr int64_t bfloat16_sum = 1 << 20;

// --- backward (backward.h, gradients.h) ----------------------------------------------------------

// Rows of data whose products are summed before the sum is added to a weight's gradient in memory:
// few enough that the packed rows stay in the L2 cache.
constexpr int64_t sum_rows = 384;
// Rows of data whose gate gradients are stored at a time. Their share of the gradients of input and
// weights is computed before the time loop continues, while they are in the L2 cache, and memory
// does not grow with the sequence. Four times as many rows where steps of this batch size fill less
// than nine tenths of sum_rows. Zen 5, LSTM, backward in ms, four times as many and so: AVX2, B =
// 16, H = 256: 17.8 and 17.0, 512: 68.2 and 65.7; AVX-512, B = 16, H = 256: 10.8 and 10.3, B = 64,
// H = 128: 11.8 and 11.3; but B = 300, H = 64: 18.7 and 20.0.
constexpr int64_t backward_rows(int64_t batch) {
    return sum_rows / batch * batch * 10 >= sum_rows * 9 ? sum_rows : 4 * sum_rows;
}
// A gradient of a weight is a product of columns of the gate gradients, which are far apart in
// memory. The columns of this many tiles are packed at a time, and stay in the L2 cache while the
// panels of rows are read. Xeon, unpacked and packed columns: LSTM, H = 256, B = 16, 155 and 187
// GFLOP/s; GRU, H = 512, B = 64, 125 and 157.
constexpr int64_t tiles_at_once = 16;
// Rows of input and of h_{t-1} of up to this many bytes are multiplied one after the other with the
// same packed columns: both must stay in the L2 cache. Xeon, a training step of an LSTM, B = 16,
// without / with: 1.03 at H = 64, 1.07 at 128, 1.2 at 200; 0.98 at 256, B = 32.
constexpr int64_t summed_bytes = 640 << 10;
// Rows of the input's gradient for which a panel of W_ih is read once: a multiple of a tile's.
constexpr int64_t input_rows = 63;
// With fewer rows of data, gradients of weights are bound by writing them, and are computed row by
// row instead of panel by panel: a step of RNN, H = 1024, B = 1, takes 1.1 ms instead of 4.3.
constexpr int64_t few_rows = 32;
// A sum over rows of up to this many is sequential, a longer one is of two halves.
constexpr int64_t sequential_rows = 8;

// --- memory (scratch.cpp, memory.cpp) ------------------------------------------------------------

constexpr size_t huge_page = 2 << 20;
// A thread keeps scratch memory of up to this many bytes from call to call.
constexpr size_t scratch_kept = 64 << 20;
// From this many bytes on, the most that M_MMAP_THRESHOLD grows to, glibc's free returns memory to
// the system: such a block is fresh at every call.
constexpr size_t always_fresh = 32 << 20;
// What a training step saves for backward, from always_fresh up to this many bytes, is cached for
// the next step. Xeon, without / with, a training step of LSTM: 1.1 at B = 32, H = 512, 1.05 at B =
// 64, H = 256.
constexpr size_t step_cached = 256 << 20;

}  // namespace fastrnn::cpu
