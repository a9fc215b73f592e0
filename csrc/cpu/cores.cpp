#include "cores.h"

#include <omp.h>

#include <algorithm>
#include <climits>
#include <fstream>
#include <sstream>

#include "choices.h"

namespace fastrnn::cpu {
namespace {

int rounded_up(double quota, double period) {
    const double cores = quota > 0 && period > 0 ? (quota + period - 1) / period : INT_MAX;
    return cores < INT_MAX ? std::max(1, static_cast<int>(cores)) : INT_MAX;
}

// Of one group, whose folder is given. The quota is "max" (version 2) or -1 (version 1) if there is
// none: then it isn't read as a positive number.
int of_group(const std::string& folder) {
    double quota = 0, period = 0;
    if (std::ifstream file(folder + "/cpu.max"); file >> quota >> period)
        return rounded_up(quota, period);
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
    return rounded_up(quota, period);
}

}  // namespace

int quota(const std::string& groups, const std::string& root) {
    int fewest = INT_MAX;
    std::ifstream file(groups);
    // Lines such as "0::/a/b" (version 2) and "4:cpu,cpuacct:/a/b" (version 1).
    for (std::string line; std::getline(file, line);) {
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        std::string path = line.substr(second + 1);
        if (!controllers.empty() && (',' + controllers + ',').find(",cpu,") == std::string::npos)
            continue;
        const std::string mount = controllers.empty() ? root : root + '/' + controllers;
        // A group and all groups that it is in have a quota. In a container the path may be one of
        // the host's, which is not mounted; the root of the mount is then the container's group.
        for (;; path.erase(path.rfind('/'))) {
            fewest = std::min(fewest, of_group(mount + path));
            if (path.find_last_of('/') == std::string::npos) break;
        }
    }
    return fewest;
}

int cores() {
    static const int by_quota = quota("/proc/self/cgroup", "/sys/fs/cgroup");
    thread_local int known = 0, calls = 0;
    if (calls-- == 0) {
        known = std::min(omp_get_num_procs(), by_quota);
        calls = cores_known;
    }
    return known;
}

}  // namespace fastrnn::cpu
