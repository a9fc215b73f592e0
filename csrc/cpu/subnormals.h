// Subnormal numbers as zeros.
#pragma once
#include <stdint.h>

#ifdef FASTRNN_X86
#include <xmmintrin.h>
#endif

namespace fastrnn::cpu {

// While an object of this class lives, its thread treats subnormal numbers as zeros. x86 CPUs
// multiply them in microcode: a state or a gradient that decays would cost up to 80 times as much,
// for values too small to change any sum. Arm CPUs do it for the same results. On other CPUs it
// does nothing.
class SubnormalsAreZeros {
public:
    SubnormalsAreZeros() : before_(get()) { set(before_ | results | operands); }
    ~SubnormalsAreZeros() { set(before_); }
    SubnormalsAreZeros(const SubnormalsAreZeros&) = delete;

private:
#if defined(FASTRNN_X86)
    static constexpr uint64_t results = 0x8000, operands = 0x40;  // MXCSR's bits FTZ and DAZ
    static uint64_t get() { return _mm_getcsr(); }
    static void set(uint64_t settings) { _mm_setcsr(static_cast<unsigned>(settings)); }
#elif defined(FASTRNN_ARM64)
    static constexpr uint64_t results = 1 << 24, operands = results;  // FPCR's bit FZ
    static uint64_t get() {
        uint64_t settings;
        asm volatile("mrs %0, fpcr" : "=r"(settings));
        return settings;
    }
    static void set(uint64_t settings) { asm volatile("msr fpcr, %0" ::"r"(settings)); }
#else
    static constexpr uint64_t results = 0, operands = 0;
    static uint64_t get() { return 0; }
    static void set(uint64_t) {}
#endif

    const uint64_t before_;
};

}  // namespace fastrnn::cpu
