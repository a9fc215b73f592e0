#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

// From the narrowest to the widest. setup.py defines FASTRNN_X86 where it compiles the last two.
#ifdef FASTRNN_X86
#define FASTRNN_FOR_EACH_ISA(X)                                                          \
    X(generic, true)                                                                     \
    X(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))             \
    X(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#else
#define FASTRNN_FOR_EACH_ISA(X) X(generic, true)
#endif

namespace fastrnn {

#define FASTRNN_DECLARE(isa, supported)          \
    namespace isa {                              \
    extern const cpu::Kernel kernels_float32[];  \
    extern const cpu::Kernel kernels_float64[];  \
    extern const cpu::Kernel kernels_bfloat16[]; \
    extern const cpu::Kernel kernels_float16[];  \
    }
FASTRNN_FOR_EACH_ISA(FASTRNN_DECLARE)

namespace cpu {
namespace {

struct Isa {
    const char* name;
    bool supported;
    const Kernel* kernels[4];  // in the order of Storage
};

const std::vector<Isa>& sets() {
#define FASTRNN_ENTRY(isa, supported)                                       \
    Isa{#isa,                                                               \
        static_cast<bool>(supported),                                       \
        {isa::kernels_float32, isa::kernels_float64, isa::kernels_bfloat16, \
         isa::kernels_float16}},
    static const std::vector<Isa> list = {FASTRNN_FOR_EACH_ISA(FASTRNN_ENTRY)};
    return list;
}

const Isa& choose() {
    const char* variable = std::getenv("FASTRNN_ISA");
    const std::string cap = variable ? variable : "";
    const Isa* best = nullptr;
    bool known = cap.empty();
    for (const Isa& isa : sets()) {
        if (isa.supported) best = &isa;
        if (cap == isa.name) {
            known = true;
            break;
        }
    }
    if (!known) {
        std::string names;
        for (const Isa& isa : sets())
            names += names.empty() ? isa.name : std::string(", ") + isa.name;
        throw std::invalid_argument("FASTRNN_ISA is '" + cap + "', expected one of: " + names);
    }
    return *best;
}

const Isa& in_use() {
    static const Isa& isa = choose();
    return isa;
}

}  // namespace

const Kernel& kernel(int cell, Storage storage) {
    return in_use().kernels[static_cast<int>(storage)][cell];
}

const char* isa_in_use() { return in_use().name; }

std::vector<std::string> isa_compiled() {
    std::vector<std::string> names;
    for (const Isa& isa : sets()) names.emplace_back(isa.name);
    return names;
}

std::vector<std::string> isa_supported() {
    std::vector<std::string> names;
    for (const Isa& isa : sets())
        if (isa.supported) names.emplace_back(isa.name);
    return names;
}

}  // namespace cpu
}  // namespace fastrnn
