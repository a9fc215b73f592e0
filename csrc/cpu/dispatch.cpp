#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#ifdef FASTRNN_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(FASTRNN_ARM64)
#include <sys/auxv.h>
#endif

namespace fastrnn {

// csrc/build.py defines FASTRNN_FOR_EACH_ISA(X): X(isa, others) for each instruction set that it
// compiles, from the narrowest to the widest. `others` is the set whose kernels it uses for every
// type but bfloat16.
#define FASTRNN_DECLARE(isa, others)                             \
    namespace isa {                                              \
    extern const cpu::Kernel kernels_float32[];                  \
    extern const cpu::Kernel kernels_float64[];                  \
    extern const cpu::Kernel kernels_bfloat16[];                 \
    extern const cpu::Kernel kernels_float16[];                  \
    extern const cpu::DualKernel<float> dual_kernels_float32[];  \
    extern const cpu::DualKernel<double> dual_kernels_float64[]; \
    }
FASTRNN_FOR_EACH_ISA(FASTRNN_DECLARE)

namespace cpu {
namespace {

// Whether this CPU has what the kernels of an instruction set use: a function for each.
namespace has {

bool generic() { return true; }

#ifdef FASTRNN_X86
bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool avx512_bf16() { return avx512() && __builtin_cpu_supports("avx512bf16"); }

// AMX for bfloat16, and Linux's permission for this process to use its registers. Their state is
// larger than every process may have, so that Linux gives it on request (its x86/xstate page).
bool amx() {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned int bfloat16_and_tiles = 1u << 22 | 1u << 24;
    unsigned int a, b, c, d;
    return avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (d & bfloat16_and_tiles) == bfloat16_and_tiles &&
           syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#elif defined(FASTRNN_ARM64)
bool neon() { return getauxval(AT_HWCAP) & HWCAP_ASIMD; }

bool neon_bf16() { return neon() && getauxval(AT_HWCAP2) & HWCAP2_BF16; }
#endif

}  // namespace has

struct Isa {
    const char* name;
    bool supported;
    const Kernel* kernels[4];  // in the order of Storage
    const DualKernel<float>* of_float;
    const DualKernel<double>* of_double;
};

const std::vector<Isa>& sets() {
#define FASTRNN_ENTRY(isa, others)                                                \
    Isa{#isa,                                                                     \
        has::isa(),                                                               \
        {others::kernels_float32, others::kernels_float64, isa::kernels_bfloat16, \
         others::kernels_float16},                                                \
        others::dual_kernels_float32,                                             \
        others::dual_kernels_float64},
    static const std::vector<Isa> list = {FASTRNN_FOR_EACH_ISA(FASTRNN_ENTRY)};
    return list;
}

const Isa& choose() {
    const char* variable = std::getenv("FASTRNN_ISA");
    const std::string_view cap = variable ? variable : "";
    const Isa* best = nullptr;
    bool known = cap.empty();
    for (const Isa& isa : sets()) {
        if (isa.supported) best = &isa;
        if (cap == isa.name) {
            known = true;
            break;
        }
    }
    if (known && best) return *best;
    std::string names;
    for (const Isa& isa : sets()) names += (names.empty() ? "" : ", ") + std::string(isa.name);
    if (!known)
        throw std::invalid_argument("FASTRNN_ISA is '" + std::string(cap) +
                                    "', expected one of: " + names);
    throw std::invalid_argument("fastrnn was built for instruction sets that this CPU lacks (" +
                                names + "): build it with FASTRNN_ISAS=all");
}

const Isa& in_use() {
    static const Isa& isa = choose();
    return isa;
}

}  // namespace

const Kernel& kernel(int cell, Storage storage) {
    if (cell >= cell_count) return own_kernel(cell, storage);
    return in_use().kernels[static_cast<int>(storage)][cell];
}

template <>
const DualKernel<float>& dual_kernel(int cell) {
    return cell < cell_count ? in_use().of_float[cell] : own_dual_kernel<float>(cell);
}
template <>
const DualKernel<double>& dual_kernel(int cell) {
    return cell < cell_count ? in_use().of_double[cell] : own_dual_kernel<double>(cell);
}

const char* isa_in_use() { return in_use().name; }

std::vector<const char*> isa_compiled() {
    std::vector<const char*> names;
    for (const Isa& isa : sets()) names.push_back(isa.name);
    return names;
}

std::vector<const char*> isa_supported() {
    std::vector<const char*> names;
    for (const Isa& isa : sets())
        if (isa.supported) names.push_back(isa.name);
    return names;
}

}  // namespace cpu
}  // namespace fastrnn
