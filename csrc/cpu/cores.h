// The cores that this process may use.
#pragma once
#include <string>

namespace fastrnn::cpu {

// As many as the calling thread's affinity mask allows, and as the quotas of the process's control
// groups are worth, rounded up: on 1.5 cores two threads are faster than one.
int cores();

// The cores that the quotas are worth, or INT_MAX without a quota. `groups` is /proc/self/cgroup,
// `root` is where the control groups are mounted, /sys/fs/cgroup.
int quota(const std::string& groups, const std::string& root);

}  // namespace fastrnn::cpu
