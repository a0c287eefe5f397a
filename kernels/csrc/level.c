/* Which instruction set the kernels use: the best that the processor has, or a lower one when a test asks. */
#include "common.h"

static int best(void)
{
#ifdef JINDO_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) return LEVEL_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return LEVEL_AVX2;
#endif
    return PORTABLE;
}

int jindo_level_in_use = PORTABLE;

__attribute__((constructor)) static void start(void) { jindo_level_in_use = best(); }

/* native.py's INTERFACE: another number where a function's or a struct's arguments change. */
EXPORT int jindo_interface(void) { return 1; }

/* Use at most `wanted`; returns what is in use. */
EXPORT int jindo_set_level(int wanted)
{
    int have = best();
    jindo_level_in_use = wanted < have ? wanted : have;
    return jindo_level_in_use;
}
