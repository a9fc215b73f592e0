#include "busy.h"

#include <algorithm>

#include "barrier.h"
#include "choices.h"
#include "clock.h"
#include "cores.h"

namespace fastrnn::cpu {
namespace {

std::atomic<bool> adapts{true};
thread_local ThreadLimit limit;

}  // namespace

int ThreadLimit::next(int most) {
    if (limit_ == 0 || limit_ >= most) return most;
    if (trial_ <= 0 && paused_ <= 0) {
        limit_ = std::min(most, limit_ + std::max(1, limit_ / 3));
        trial_ = trial_runs;
        lost_runs_ = 0;
    }
    return limit_;
}

void ThreadLimit::ran(int threads, int64_t began, int64_t ended, int64_t lost) {
    const double wall = ended - began;
    if (wall >= watched_run) watched_until_ = ended + watched_time;
    const double part = std::min(1.0, wall / whole_run);
    const bool on_trial = trial_ > 0;
    paused_ -= part;
    trial_ -= part;
    if (threads == 1) return;
    const double in_vain = std::clamp<double>(lost, 0, wall), useful = wall - in_vain;
    const double whole = std::max<double>(useful, whole_run);
    lost_runs_ += std::min(in_vain / whole, most_lost_in_a_run) - saved * useful / whole;
    lost_runs_ = std::max(lost_runs_, 0.0);
    if (lost_runs_ >= (on_trial ? lost_in_trial : lost_runs)) {
        limit_ = threads - std::max(1, threads / 4);
        pause_ = on_trial ? std::min(2 * pause_, longest_pause) : shortest_pause;
        paused_ = pause_;
        trial_ = lost_runs_ = 0;
    }
}

int next_threads(int most) {
    return adapts.load(std::memory_order_relaxed) ? limit.next(most) : most;
}

int quiet_threads(int most) {
    return most > 1 && adapts.load(std::memory_order_relaxed) ? std::min(most, cores()) : most;
}

void adapt_threads(bool yes) { adapts = yes; }

Run::Run(int threads)
    : threads_(threads), began_(nanoseconds()), watched_(threads > 1 && limit.watches(began_)) {}

Run::~Run() {
    const int64_t ended = nanoseconds();
    limit.ran(threads_, began_, ended, watched_ ? ended - began_ - most_work_ - usual_loss : 0);
}

Run::Work::Work(Run& run) : run_(run) {
    if (!run.watched_) return;
    began_ = nanoseconds();
    on_core_ = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    waited_ = nanoseconds_waited();
}

Run::Work::~Work() {
    if (!run_.watched_) return;
    const int64_t on_core = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - on_core_;
    const int64_t not_waited = nanoseconds() - began_ - (nanoseconds_waited() - waited_);
    // A thread can lose its core while it computes and while it spins: not_waited has the former in
    // it, on_core has the spins. Where the clock of a core's time only counts ticks, as in some
    // sandboxes, it says nothing.
    const bool ticks = on_core % millisecond == 0;
    const int64_t work = ticks ? not_waited : std::min(on_core, not_waited);
    int64_t most = run_.most_work_;
    while (most < work && !run_.most_work_.compare_exchange_weak(most, work)) {
    }
}

}  // namespace fastrnn::cpu
