/* What the CPU kernels share: element types, roundings, and which instructions may be used.
 *
 * Every kernel is plain C with three bodies at most (AVX-512, AVX2, portable); `jindo_level` picks one when it
 * runs. No torch header, so one build serves every torch. Built with -ffp-contract=off: a contracted
 * multiply-add would change the last bits that the contracts in the .py files fix. */
#ifndef JINDO_COMMON_H
#define JINDO_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define JINDO_X86 1
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

#define EXPORT __attribute__((visibility("default")))

enum { PORTABLE = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2 };
enum { FP32 = 0, BF16 = 1, FP16 = 2 };

extern int jindo_level_in_use;

static inline float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }

/* To nearest even; a NaN stays one. */
static inline uint16_t float_to_bf16(float f)
{
    uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float fp16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
    return bits_to_float(sign | float_to_bits((float)rest * 0x1p-24f));
}

/* To nearest even; overflow gives infinity, as the hardware's conversion. */
static inline uint16_t float_to_fp16(float f)
{
    uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);      /* rounds to 2^16 or more */
    if (u < 0x38800000u)                                          /* subnormal: the addition rounds */
        return (uint16_t)(sign | (float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000u));
    u += 0xfff + ((u >> 13) & 1);
    return (uint16_t)(sign | ((u - (112u << 23)) >> 13));
}

static inline float load_as_float(const void *p, int64_t i, int type)
{
    if (type == FP32) return ((const float *)p)[i];
    uint16_t h = ((const uint16_t *)p)[i];
    return type == BF16 ? bf16_to_float(h) : fp16_to_float(h);
}

static inline void store_float(void *p, int64_t i, int type, float value)
{
    if (type == FP32) ((float *)p)[i] = value;
    else ((uint16_t *)p)[i] = type == BF16 ? float_to_bf16(value) : float_to_fp16(value);
}

#ifdef JINDO_X86
/* 16 floats from 16 elements of any type, and back. bf16 by integer arithmetic: the instruction of AVX512-BF16
 * flushes subnormals. */
AVX512 static inline __m512 load16(const void *p, int64_t i, int type)
{
    if (type == FP32) return _mm512_loadu_ps((const float *)p + i);
    __m256i h = _mm256_loadu_si256((const __m256i *)((const uint16_t *)p + i));
    if (type == FP16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

AVX512 static inline __m256i round16_bf16(__m512 v)
{
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

AVX512 static inline void store16(void *p, int64_t i, int type, __m512 v)
{
    if (type == FP32) { _mm512_storeu_ps((float *)p + i, v); return; }
    __m256i h = type == BF16 ? round16_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)((uint16_t *)p + i), h);
}
#endif
#endif
