/* One AdamW update. Contract: ../adamw.py.
 *
 * With fp32 moments it goes in two passes over a chunk that fits the cache, for the square root between them is
 * torch's: the one of its math library is not correctly rounded, and results are to be the same bit for bit. The
 * fused multiply-adds are those that torch's own loops have. */
#include "common.h"

/* --- fp32 moments ------------------------------------------------------------------------------------- */

typedef struct { float lerp, beta2, rest2; int from_end; } moments_t;

static inline __attribute__((always_inline)) void moment(float *m, float *v, float g, const moments_t *c)
{
    *m = fmaf(c->lerp, g - *m, c->from_end ? g : *m);
    *v = fmaf(c->rest2 * g, g, *v * c->beta2);
}

static inline __attribute__((always_inline)) void moments_of(
    const void *grad, int type, int64_t n, const moments_t *c, float *m, float *v)
{
    for (int64_t i = 0; i < n; i++) moment(m + i, v + i, load_as_float(grad, i, type), c);
}

static void moments_portable(const void *grad, int type, int64_t n, const moments_t *c, float *m, float *v)
{
    moments_of(grad, type, n, c, m, v);
}

typedef struct { float decay, correction, eps, step_size; int stochastic; uint32_t seed; } apply_t;

static inline uint32_t mix(uint32_t index, uint32_t seed)
{
    uint32_t h = index * 0x9E3779B1u + seed;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    return (h ^ (h >> 13)) * 0xC2B2AE35u;
}

/* -step_size comes negated; step * m is rounded before the division. */
static inline float applied(float p, float m, float root, const apply_t *c)
{
    float denominator = root / c->correction + c->eps;
    return p * c->decay + (c->step_size * m) / denominator;
}

static inline void put(void *p, int64_t i, int type, float value, int64_t index, const apply_t *c)
{
    if (c->stochastic && value == value)
        ((uint16_t *)p)[i] = (uint16_t)((float_to_bits(value) + (mix((uint32_t)index, c->seed) >> 16)) >> 16);
    else
        store_float(p, i, type, value);
}

static inline __attribute__((always_inline)) void apply_to(
    void *p, int type, const float *m, const float *root, int64_t n, int64_t first, const apply_t *c)
{
    if (type == FP32)
        for (int64_t i = 0; i < n; i++) ((float *)p)[i] = applied(((float *)p)[i], m[i], root[i], c);
    else
        for (int64_t i = 0; i < n; i++)
            put(p, i, type, applied(load_as_float(p, i, type), m[i], root[i], c), first + i, c);
}

static void apply_portable(
    void *p, int type, const float *m, const float *root, int64_t n, int64_t first, const apply_t *c)
{
    apply_to(p, type, m, root, n, first, c);
}

#ifdef JINDO_X86
/* The same lines for the compiler to vectorize; a type of its own each, so that none branches inside. */
#define BODIES(NAME, TARGET) \
TARGET static void moments_##NAME(const void *grad, int type, int64_t n, const moments_t *c, float *m, float *v) \
{ \
    const moments_t own = *c; \
    if (type == FP32) moments_of(grad, FP32, n, &own, m, v); \
    else if (type == BF16) moments_of(grad, BF16, n, &own, m, v); \
    else moments_of(grad, FP16, n, &own, m, v); \
} \
TARGET static void apply_##NAME( \
    void *p, int type, const float *m, const float *root, int64_t n, int64_t first, const apply_t *c) \
{ \
    const apply_t own = *c; \
    if (type == FP32) apply_to(p, FP32, m, root, n, first, &own); \
    else if (type == BF16) apply_to(p, BF16, m, root, n, first, &own); \
    else apply_to(p, FP16, m, root, n, first, &own); \
}
BODIES(avx2, AVX2)
BODIES(avx512, AVX512)
#endif

#define PIECE 8192

EXPORT void jindo_adamw_moments(
    const void *grad, int type, int64_t n, float lerp, int from_end, float beta2, float rest2, float *m, float *v)
{
    const moments_t c = {lerp, beta2, rest2, from_end};
    void (*run)(const void *, int, int64_t, const moments_t *, float *, float *) = moments_portable;
#ifdef JINDO_X86
    if (jindo_level_in_use == LEVEL_AVX512) run = moments_avx512;
    else if (jindo_level_in_use == LEVEL_AVX2) run = moments_avx2;
#endif
    int size = type == FP32 ? 4 : 2;
#pragma omp parallel for schedule(static) if (n > PIECE)
    for (int64_t i = 0; i < n; i += PIECE)
        run((const char *)grad + i * size, type, n - i < PIECE ? n - i : PIECE, &c, m + i, v + i);
}

/* first: the index of p[0] in its tensor, for the random bits. */
EXPORT void jindo_adamw_apply(
    void *p, int type, const float *m, const float *root, int64_t n, int64_t first, float decay, float correction,
    float eps, float step_size, int stochastic, int seed)
{
    const apply_t c = {decay, correction, eps, step_size, stochastic, (uint32_t)seed};
    void (*run)(void *, int, const float *, const float *, int64_t, int64_t, const apply_t *) = apply_portable;
#ifdef JINDO_X86
    if (jindo_level_in_use == LEVEL_AVX512) run = apply_avx512;
    else if (jindo_level_in_use == LEVEL_AVX2) run = apply_avx2;
#endif
    int size = type == FP32 ? 4 : 2;
#pragma omp parallel for schedule(static) if (n > PIECE)
    for (int64_t i = 0; i < n; i += PIECE)
        run((char *)p + i * size, type, m + i, root + i, n - i < PIECE ? n - i : PIECE, first + i, &c);
}

/* --- 8-bit moments ------------------------------------------------------------------------------------ */

#define BLOCK 256
#define TINY 0x1p-126f

typedef struct { const float *map, *middles; const uint8_t *first; uint8_t *codes; float *absmax; } state_t;

typedef struct {
    void *p; const void *grad; int type, grad_type;
    state_t m, v;
    moments_t moments;
    float decay, eps, step_size;
    int stochastic; uint32_t seed;
} job_t;

static inline __attribute__((always_inline)) void widen(const void *from, int64_t at, int64_t n, int type, float *to)
{
    if (type == FP32) memcpy(to, (const float *)from + at, (size_t)n * 4);
    else if (type == BF16) for (int64_t i = 0; i < n; i++) to[i] = bf16_to_float(((const uint16_t *)from)[at + i]);
    else for (int64_t i = 0; i < n; i++) to[i] = fp16_to_float(((const uint16_t *)from)[at + i]);
}

static inline __attribute__((always_inline)) void narrow(const job_t *j, int64_t at, int64_t n, const float *from)
{
    const apply_t c = {.stochastic = 1, .seed = j->seed};
    if (j->type == FP32) memcpy((float *)j->p + at, from, (size_t)n * 4);
    else if (j->stochastic) for (int64_t i = 0; i < n; i++) put(j->p, at + i, BF16, from[i], at + i, &c);
    else if (j->type == BF16) for (int64_t i = 0; i < n; i++) store_float(j->p, at + i, BF16, from[i]);
    else for (int64_t i = 0; i < n; i++) store_float(j->p, at + i, FP16, from[i]);
}

static inline __attribute__((always_inline)) void decode(const state_t *s, int64_t at, int64_t n, float *to)
{
    const uint8_t *codes = s->codes + at;
    const float *map = s->map, peak = s->absmax[at / BLOCK];
    for (int64_t i = 0; i < n; i++) to[i] = map[codes[i]] * peak;
}

/* The nearest code is the first one of the number's upper 16 bits, or the next. Magnitudes compare as integers. */
static inline __attribute__((always_inline)) void encode(const state_t *s, int64_t at, int64_t n, const float *from)
{
    uint8_t *codes = s->codes + at;
    const float *middles = s->middles;
    const uint8_t *first = s->first;
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t size = (int32_t)(float_to_bits(from[i]) & 0x7fffffffu);
        most = size > most ? size : most;
    }
    float peak = bits_to_float((uint32_t)most), by = 1 / (peak > TINY ? peak : TINY);
    s->absmax[at / BLOCK] = peak;
    for (int64_t i = 0; i < n; i++) {
        float x = from[i] * by;
        int code = first[float_to_bits(x) >> 16];
        codes[i] = (uint8_t)(code + (middles[code] < x));
    }
}

static inline __attribute__((always_inline)) void block_of(const job_t *j, int64_t at, int64_t n)
{
    float p[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK];
    const job_t own = *j; /* for the compiler: nothing that is stored changes it */
    widen(j->p, at, n, j->type, p);
    widen(j->grad, at, n, j->grad_type, g);
    decode(&own.m, at, n, m);
    decode(&own.v, at, n, v);
    for (int64_t i = 0; i < n; i++) {
        moment(m + i, v + i, g[i], &own.moments);
        float moved = (p[i] + own.step_size * m[i] / (sqrtf(v[i]) + own.eps)) * own.decay;
        uint32_t sound = (float_to_bits(g[i]) & 0x7f800000u) != 0x7f800000u ? ~0u : 0;
        p[i] = bits_to_float((float_to_bits(moved) & sound) | (float_to_bits(p[i]) & ~sound));
        m[i] = bits_to_float(float_to_bits(m[i]) & sound);
        v[i] = bits_to_float(float_to_bits(v[i]) & sound);
    }
    narrow(&own, at, n, p);
    encode(&own.m, at, n, m);
    encode(&own.v, at, n, v);
}

static void block_portable(const job_t *j, int64_t at, int64_t n) { block_of(j, at, n); }

#ifdef JINDO_X86
#define BLOCKS(NAME, TARGET) \
TARGET static void block_##NAME(const job_t *j, int64_t at, int64_t n) \
{ \
    if (n == BLOCK) block_of(j, at, BLOCK); \
    else block_of(j, at, n); \
}
BLOCKS(avx2, AVX2)
BLOCKS(avx512, AVX512)
#endif

/* decay, eps and step_size (negated): of the 8-bit form. */
EXPORT void jindo_adamw_8bit(
    void *p, int type, const void *grad, int grad_type, int64_t n, uint8_t *codes1, uint8_t *codes2, float *absmax1,
    float *absmax2, const float *map1, const float *map2, const float *middles1, const uint8_t *first1,
    const float *middles2, const uint8_t *first2, float lerp, int from_end, float beta2, float rest2, float decay,
    float eps, float step_size, int stochastic, int seed)
{
    const job_t j = {
        p, grad, type, grad_type, {map1, middles1, first1, codes1, absmax1}, {map2, middles2, first2, codes2, absmax2},
        {lerp, beta2, rest2, from_end}, decay, eps, step_size, stochastic, (uint32_t)seed};
    void (*run)(const job_t *, int64_t, int64_t) = block_portable;
#ifdef JINDO_X86
    if (jindo_level_in_use == LEVEL_AVX512) run = block_avx512;
    else if (jindo_level_in_use == LEVEL_AVX2) run = block_avx2;
#endif
#pragma omp parallel for schedule(static) if (n > PIECE)
    for (int64_t at = 0; at < n; at += BLOCK) run(&j, at, n - at < BLOCK ? n - at : BLOCK);
}
