#include "fork.h"

#include <pthread.h>

#include <atomic>
#include <filesystem>

namespace fastrnn::cpu {
namespace {

std::atomic<bool> had_threads{false}, lost{false};

// Threads that others started, such as those of NumPy's OpenBLAS, count too: nothing distinguishes
// them from OpenMP's.
void count_threads() {
    std::error_code none;
    const std::filesystem::directory_iterator tasks("/proc/self/task", none);
    had_threads = none || std::distance(begin(tasks), end(tasks)) > 1;
}

const int registered = pthread_atfork(count_threads, nullptr, [] {
    if (had_threads) lost = true;
});

}  // namespace

bool lost_threads() { return lost; }

}  // namespace fastrnn::cpu
