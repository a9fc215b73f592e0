// The clocks of POSIX.
#pragma once
#include <stdint.h>
#include <time.h>

namespace fastrnn::cpu {

inline int64_t nanoseconds(clockid_t clock = CLOCK_MONOTONIC) {
    timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

}  // namespace fastrnn::cpu
