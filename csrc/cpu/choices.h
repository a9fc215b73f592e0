// Every choice of the CPU kernels that depends on sizes, and what was measured for it: on 2 cores (Zen
// 4, AVX-512, 1 MB of L2 a core), float32, T = 100 unless said; the best of three runs by turns, but
// for at_once_rows and few_rows, which were seen once. None but the lengths of sums, sum_rows and
// backward_rows changes a bit of the results.
#pragma once
#include <stdint.h>

namespace fastrnn::cpu {

// --- who does what (partition.h) ---------------------------------------------------------------------

// Threads that share the units of a row meet once a step, if that has so many multiply-adds a thread:
// a barrier takes 75 ns on Zen 4, in which a core does 4000, and with what is exchanged 300 ns on two
// cores of an Intel Xeon, in which one does 15,000. There, B = 1, on one thread and on two, in us: GRU,
// H = 64 (12,000 a step) 99 and 134; LSTM, H = 64, and RNN, H = 128 (16,000) 103 and 128, 134 and 146;
// GRU, H = 96 (28,000) 196 and 202, at best 161 and 141; LSTM, H = 96 (37,000) 264 and 238.
constexpr int64_t worth_a_barrier = 10000;
// Where they are more than the cores that the process may use, one sleeps there until another wakes it.
// GRU, B = 1, H = 64, 8 threads on 2 cores: 0.79 of the speed of torch's layer, which takes one thread.
constexpr int64_t worth_a_sleep = 65536;
// A thread is woken for so many multiply-adds in the whole layer. One step of an LSTM, B = 1, on one
// thread and on two: 33,000 (H = 64) take 1.6 and 2.0 us, 131,000 (H = 128) 5.8 and 4.1, 524,000 (H =
// 256) 27 and 13.
constexpr int64_t worth_a_thread = 60000;
// A thread takes rows of its own, and then waits for nobody, if it gets so many (with fewer, tiles are
// too short to use the weights they load), so many in all steps together (it packs all weights for
// itself), and if W_hh has fewer values than these (they are to stay in its L2 cache). Of the time
// that shared units take, LSTM, B = 16: 0.89 at H = 64, 0.93 at 200, 1.03 at 256, 1.00 at 400; and no
// thread that is held up holds up another.
constexpr int64_t rows_per_thread = 8;
constexpr int64_t data_rows_per_thread = 256;
constexpr int64_t values_per_thread = 1 << 18;
// Backward, or with so many rows, W_hh may have so many values, if there is one direction. Of the time
// that shared units take, on two cores of an Intel Xeon with 2 MB of L2 each: a training step of LSTM, H =
// 256, 0.97 at B = 16 (0.99 if forward too: inference takes 1.08), 32 and 64, GRU, H = 300, 0.95 and 0.93
// at B = 16 and 32, RNN, H = 512, 0.98. LSTM, H = 400, B = 32: inference 1.10, training 1.03. Of the time
// that a thread a direction takes, LSTM, H = 256, B = 32: 1.04.
constexpr int64_t many_rows_per_thread = 16;
constexpr int64_t values_for_many_rows = 300000;

// --- forward (forward.h) -----------------------------------------------------------------------------

// The input projection of about so many rows is made at once: enough to read its weights seldom, few
// enough that the result is still in the cache when the steps come to it. LSTM, H = 512, B = 16, in
// GFLOP/s: 203 with 32, 206 with 64, 202 with 128, 203 with 256.
constexpr int64_t chunk_rows = 64;
// Of AMX, whose products are so fast that the weights had better be read more seldom. LSTM, bfloat16, H =
// 512, B = 64, two cores of an Intel Xeon, time of torch's layer / ours: 0.95 with 64, 0.97 with 128.
constexpr int64_t tile_chunk_rows = 128;
// A whole sequence of up to so many rows is projected at once: a panel of W_ih is packed, used and
// done with. Packing the 16 MB of an LSTM's at H = 1024 into memory took 2 ms, of 19 in all at B = 1.
constexpr int64_t at_once_rows = 256;
// Up to so many rows a step is bound by the reading of the weights: those of 16 bits stay so. LSTM,
// float16, B = 1: 3.1 ms instead of 3.8 at H = 512, 13.3 instead of 15.9 at 1024.
constexpr int64_t compact_rows = 3;
// And up to so many, where a thread's weights of 32 bits are more than so many values, which leave its L2
// cache (of 2 MB on the Intel Xeon of these figures). Time with those / so, LSTM, H = 1024, B = 4, 8, 16:
// bfloat16 1.51, 1.21, 1.01, float16 1.42, 1.11; H = 512 (524,288 values), B = 4, 8: bfloat16 1.11, 1.05,
// float16 1.02. GRU, float16, H = 512, B = 7: 0.94. LSTM, float16, H = 256, B = 8: 0.88.
constexpr int64_t compact_rows_far = 8;
constexpr int64_t values_far = 500000;

// --- reading ahead (panels.h) -----------------------------------------------------------------------

constexpr int64_t cache_line = 64;
// A panel is brought into the L1 cache so many steps of k before they are multiplied. On one core of an
// Intel Xeon (AVX-512, 2 MB of L2), the product of an LSTM's step alone, H = 512: 8 and 16 give 133
// and 145 GFLOP/s at B = 7, 160 and 160 at 16.
constexpr int64_t steps_ahead = 16;
// Of a panel that many tiles read, so many k at a time: that part stays in the L2 cache. Backward, LSTM,
// H = 1024, B = 64, two cores of that Xeon: the products with W_hh and W_ih (4096 k) at 158 and 163
// GFLOP/s whole, at 182 and 193 so.
constexpr int64_t part_depth = 1024;
// So many rows wait for their last part at a time: their sums, 16 KB, stay in the L1 cache.
constexpr int64_t part_rows = 64;
// Of AMX's tiles so many k at a time: 32 rows of them stay in the L1 cache while the columns of a panel
// pass by. LSTM, bfloat16, B = 64, likewise: 0.94 whole, 0.89 with 128, 0.93 with 256, 0.98 with 512 at H
// = 1024.
constexpr int64_t tile_part_depth = 512;

// Where threads share units, of so many rows, about a tile, what others have just written is asked for at
// once. Time without / with, two cores of an Intel Xeon, B = 1: inference of RNN, H = 256, 1.12, of LSTM, H =
// 128, 256, 512, 1.08, 1.04, 1.00; training of LSTM, H = 256, 1.02. With 64 rows at B = 16, H = 512: 0.98.
constexpr int64_t rows_of_others = 8;

// A network of one step multiplies so many rows and more, turned (row_lanes.h), so many at a time: a
// multiple of a tile's. Time by dot products / so, two cores of an Intel Xeon: GRU, B = 24, 32, 48: 0.87,
// 1.02, 1.2 at H = 256, 256, 200; RNN, H = 650, where rows of weights lie askew, B = 24, 32: 1.00, 1.29.
constexpr int64_t turned_rows = 28;
constexpr int64_t turned_at_once = 96;
// A panel by itself is packed from rows so far apart that the CPU does not foresee them: so many rows
// before they are read, they are asked for. A training step of a GRU, T = 1, B = 32, H = 1024, one core of
// that Xeon: 0.64 of torch's speed without, 0.79 so (and with no division a row).
constexpr int64_t rows_ahead = 16;

// --- lengths of sums (Panels) ------------------------------------------------------------------------

// So many products are summed in a row before the sum is added to the total: a sum of short sums loses
// less to rounding than one long sum. LSTM, H = 512, B = 16: 64, 128, 256 and no limit give 193, 202,
// 206 and 206 GFLOP/s. Gradients are sums over all gates of all units, or all rows of data: with 64,
// 128 and 256 a GRU's gradient of the input (H = 64, the worst) has 1.0, 1.4 and 1.7 times torch's
// error against float64.
constexpr int64_t forward_sum = 256;
constexpr int64_t backward_sum = 128;
// Of pairs of bfloat16, whose own rounding is 2^16 times as large.
constexpr int64_t bfloat16_sum = 1 << 20;

// --- backward (backward.h, gradients.h) --------------------------------------------------------------

// Rows of data whose products are summed before they are added to a weight's gradient in memory: few
// enough that the packed rows stay in the L2 cache.
constexpr int64_t sum_rows = 384;
// A gradient of a weight is a product of columns of the gate gradients, far apart in memory. Those of so
// many tiles are packed first, and stay in the L2 cache while the rows' panels pass by. Two cores of an
// Intel Xeon, columns read where they lie and packed: LSTM, H = 256, B = 16, 155 and 187 GFLOP/s; GRU, H
// = 512, B = 64, 125 and 157.
constexpr int64_t tiles_at_once = 16;
// Rows of input and of h_{t-1} of up to so many bytes are multiplied with the same packed columns, one
// after the other: both are to stay in the L2 cache. A training step of an LSTM, B = 16, two cores of an
// Intel Xeon, time apart / so: 1.03 at H = 64, 1.07 at 128, 1.2 at 200; 0.98 at 256, B = 32.
constexpr int64_t summed_bytes = 640 << 10;
// Rows of data whose gate gradients are held at once. Their share in the gradients of the input and of
// the weights is taken before the time loop goes on: memory does not grow with the length of the
// sequence.
constexpr int64_t backward_rows = 4 * sum_rows;
// The gradients of up to so many rows are made with weights as they lie in memory. A step of a GRU, H =
// 1024, one thread: 1.6 of torch's time without, 1.0 with it at B = 1; 0.66 and 0.54 at 4; 0.78 and
// 0.65 at 8.
constexpr int64_t unpacked_rows = 8;
// Rows of data of the input's gradient for which a panel of W_ih is read once: a multiple of a tile's.
constexpr int64_t input_rows = 63;
// Below so many rows of data the gradients of weights are bound by the writing, and are made row by row
// instead of panel by panel: a step of RNN, H = 1024, B = 1, takes 1.1 ms instead of 4.3.
constexpr int64_t few_rows = 32;

}  // namespace fastrnn::cpu
