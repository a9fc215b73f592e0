// Threads that a forked child does not have.
#pragma once
#include "../api.h"

namespace fastrnn::cpu {

// Whether this process is a forked child whose parent had threads. The child has none of them, but
// OpenMP still counts on its own and would wait for them for ever. Such a process must use one
// thread, in torch's operators as in ours.
FASTRNN_API bool lost_threads();

}  // namespace fastrnn::cpu
