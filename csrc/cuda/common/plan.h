// What the planners of both one-launch paths share: the question, and what a device allows.
#pragma once
#include <stdint.h>

#include <compare>
#include <map>
#include <optional>
#include <variant>

#include "../../layer.h"

namespace fastrnn::cuda {

// One pass over one layer on one device, which must be the current one.
struct PlanRequest {
    Pass pass;
    int cell;  // its index in the registry
    Storage storage;
    bool tf32;  // whether products of float32 may be rounded to TF32
    int64_t hidden;
    int64_t batch;
    int directions;
    bool projected;
    int device;

    auto operator<=>(const PlanRequest&) const = default;
};

// Why a path cannot run a layer.
struct Unfit {
    const char* reason;
};

template <class Plan>
using PlanOrUnfit = std::variant<Plan, Unfit>;

// A device that cannot be asked has zeros, for which nothing fits.
struct DeviceLimits {
    int major = 0;             // of the compute capability
    int cooperative = 0;       // whether it has cooperative launches
    int multiprocessors = 0;   //
    int shared_per_block = 0;  // bytes

    explicit DeviceLimits(int device);
};

inline int value_bytes(Storage storage) { return storage == Storage::float32 ? 4 : 2; }

// How a one-launch kernel multiplies, in words.
const char* product_name(Storage storage, bool tf32);

// Registers of a thread; empty if this build has no such kernel for the device.
std::optional<int> registers_of(const void* function);

// Lets the kernel use all the shared memory that a block can have; false if it cannot be asked.
bool allow_shared_memory(const void* function, const DeviceLimits& limits);

// make(request), or what it returned before: asking the runtime takes longer than a launch, and the
// answers do not change.
template <class Plan>
PlanOrUnfit<Plan> cached_plan(PlanOrUnfit<Plan> (*make)(const PlanRequest&),
                              const PlanRequest& request) {
    static thread_local std::map<PlanRequest, PlanOrUnfit<Plan>> cache;
    if (const auto found = cache.find(request); found != cache.end()) return found->second;
    if (cache.size() >= 1000) cache.clear();
    return cache.emplace(request, make(request)).first->second;
}

}  // namespace fastrnn::cuda
