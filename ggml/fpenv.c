/* Rounding mode and treatment of denormals, as the caller may have set them for this thread. */
#include <fenv.h>

#include "kernels.h"

#if defined(__x86_64__) || defined(__SSE__) || defined(_M_X64) || defined(_M_IX86)
#include <xmmintrin.h>

/* All exceptions masked, round to nearest, no flush-to-zero, no denormals-are-zero. */
static uint32_t set_control(uint32_t control) {
    uint32_t saved = _mm_getcsr();
    _mm_setcsr(control);
    return saved;
}
enum { DEFAULT_CONTROL = 0x1F80, FLUSH = 0x8040 };

uint64_t ggml_fp_flush(void) {
    const uint64_t saved = ggml_fp_enter();
    set_control(DEFAULT_CONTROL | FLUSH);
    return saved;
}

#elif defined(__aarch64__) && defined(__GNUC__)

static uint32_t set_control(uint32_t control) {
    uint64_t saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)control));
    return (uint32_t)saved;
}
enum { DEFAULT_CONTROL = 0 };

#else

static uint32_t set_control(uint32_t control) {
    return control;
}
enum { DEFAULT_CONTROL = 0 };

#endif

/* fesetround also reaches a register that set_control does not (x87); what both reach is saved
 * first and restored last. */
uint64_t ggml_fp_enter(void) {
    int rounding = fegetround();
    uint32_t saved = set_control(DEFAULT_CONTROL);
    if (rounding != FE_TONEAREST) fesetround(FE_TONEAREST);
    return (uint64_t)(uint32_t)rounding << 32 | saved;
}

void ggml_fp_leave(uint64_t saved) {
    int rounding = (int)(uint32_t)(saved >> 32);
    if (rounding != FE_TONEAREST) fesetround(rounding);
    set_control((uint32_t)saved);
}
