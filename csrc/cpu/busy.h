// Fewer threads while other processes keep the cores of this one busy.
//
// The threads of a run wait for each other. If one of them has no core, the others wait until the
// system gives it one, for some milliseconds, which is longer than many layers take. So a run
// measures how much time it loses, and if that is too much, the next runs use fewer threads. The
// number of threads changes no bit of the results.
//
//     all threads  --- some runs lost too much --->  pause: fewer threads
//          ^                                            |          ^
//          |                                    some runs later    |
//          |                                            v          |  a run lost much:
//          +----- no run lost much ----------  trial: more threads +  a longer pause
#pragma once
#include <stdint.h>

#include <atomic>

#include "../api.h"

namespace fastrnn::cpu {

// The rule, and its state for one calling thread. Times are in nanoseconds.
class ThreadLimit {
public:
    // How many threads the next run may use: from 1 to `most`.
    int next(int most);
    // Whether a run that begins now measures what it loses.
    bool watches(int64_t now) const { return trial_ > 0 || now < watched_until_; }
    // A run on so many threads. It took `lost` longer than the work of any one of them.
    void ran(int threads, int64_t began, int64_t ended, int64_t lost);

private:
    int limit_ = 0;         // 0: none
    double pause_ = 0;      // the length of the last pause, in runs
    double paused_ = 0;     // what is left of it
    double trial_ = 0;      // what is left of a trial, in runs
    double lost_runs_ = 0;  // lost lately, less what the other threads saved
    int64_t watched_until_ = 0;
};

// How many threads the next run of the calling thread may use: from 1 to `most`.
int next_threads(int most);
// The same on a quiet machine: `most`, but at most as many as this process has cores.
int quiet_threads(int most);

// Whether runs may use fewer threads than they are given, as they may at first. Tests of a certain
// number of threads turn it off.
FASTRNN_API void adapt_threads(bool yes);

// A run of a layer that is worth several threads, while this object lives.
class Run {
public:
    explicit Run(int threads);
    ~Run();
    Run(const Run&) = delete;

    // The work of one of its threads, while this object lives.
    class Work {
    public:
        explicit Work(Run& run);
        ~Work();
        Work(const Work&) = delete;

    private:
        Run& run_;
        int64_t began_ = 0, on_core_ = 0, waited_ = 0;
    };

private:
    const int threads_;
    const int64_t began_;
    const bool watched_;
    std::atomic<int64_t> most_work_{0};  // of a thread
};

}  // namespace fastrnn::cpu
