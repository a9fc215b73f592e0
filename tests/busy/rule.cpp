// The rule of csrc/cpu/busy.h and the quotas of csrc/cpu/cores.h for test_busy.py, by ctypes.
#include "cpu/busy.h"
#include "cpu/cores.h"

using fastrnn::cpu::ThreadLimit;

extern "C" {

ThreadLimit* make() { return new ThreadLimit; }
void destroy(ThreadLimit* limit) { delete limit; }
int next(ThreadLimit* limit, int most) { return limit->next(most); }
bool watches(ThreadLimit* limit, int64_t now) { return limit->watches(now); }
void ran(ThreadLimit* limit, int threads, int64_t began, int64_t ended, int64_t lost) {
    limit->ran(threads, began, ended, lost);
}
int quota(const char* groups, const char* root) { return fastrnn::cpu::quota(groups, root); }
}
