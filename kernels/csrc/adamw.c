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

/* How many of the ascending middles (the last infinite) lie below x: the nearest code. */
static inline int nearest(const float *middles, float x)
{
    int code = 0;
    for (int step = 128; step; step >>= 1) code += middles[code + step - 1] < x ? step : 0;
    return code;
}

static inline __attribute__((always_inline)) void encode_block(
    const float *x, int64_t n, const float *middles, uint8_t *codes, float *absmax)
{
    float peak = 0;
    for (int64_t i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        peak = size > peak || size != size ? size : peak;
    }
    *absmax = peak;
    float by = peak > 0 ? 1 / peak : 1;
    for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)nearest(middles, x[i] * by);
}

typedef struct {
    void *p; const void *grad; int type, grad_type;
    uint8_t *codes1, *codes2; float *absmax1, *absmax2;
    const float *map1, *map2, *middles1, *middles2;
} states_t;

static inline __attribute__((always_inline)) void block_8bit(
    const states_t *s, int64_t first, int64_t n, int64_t block, const moments_t *mc, const apply_t *ac, int type,
    int grad_type)
{
    float m[BLOCK], v[BLOCK], root[BLOCK];
    for (int64_t i = 0; i < n; i++) {
        m[i] = s->map1[s->codes1[first + i]] * s->absmax1[block];
        v[i] = s->map2[s->codes2[first + i]] * s->absmax2[block];
        moment(m + i, v + i, load_as_float(s->grad, first + i, grad_type), mc);
        root[i] = sqrtf(v[i]);
    }
    apply_to((char *)s->p + first * (type == FP32 ? 4 : 2), type, m, root, n, first, ac);
    encode_block(m, n, s->middles1, s->codes1 + first, s->absmax1 + block);
    encode_block(v, n, s->middles2, s->codes2 + first, s->absmax2 + block);
}

static void block_portable(
    const states_t *s, int64_t first, int64_t n, int64_t block, const moments_t *mc, const apply_t *ac)
{
    block_8bit(s, first, n, block, mc, ac, s->type, s->grad_type);
}

#ifdef JINDO_X86
AVX2 static void block_avx2(
    const states_t *s, int64_t first, int64_t n, int64_t block, const moments_t *mc, const apply_t *ac)
{
    if (s->type == FP32 && n == BLOCK) block_8bit(s, first, BLOCK, block, mc, ac, FP32, FP32);
    else block_8bit(s, first, n, block, mc, ac, s->type, s->grad_type);
}

AVX512 static void block_avx512(
    const states_t *s, int64_t first, int64_t n, int64_t block, const moments_t *mc, const apply_t *ac)
{
    if (s->type == FP32 && n == BLOCK) block_8bit(s, first, BLOCK, block, mc, ac, FP32, FP32);
    else block_8bit(s, first, n, block, mc, ac, s->type, s->grad_type);
}
#endif

EXPORT void jindo_adamw_8bit(
    void *p, int type, const void *grad, int grad_type, int64_t n, uint8_t *codes1, uint8_t *codes2, float *absmax1,
    float *absmax2, const float *map1, const float *map2, const float *middles1, const float *middles2, float lerp,
    int from_end, float beta2, float rest2, float decay, float correction, float eps, float step_size, int stochastic,
    int seed)
{
    const states_t s = {p, grad, type, grad_type, codes1, codes2, absmax1, absmax2, map1, map2, middles1, middles2};
    const moments_t mc = {lerp, beta2, rest2, from_end};
    const apply_t ac = {decay, correction, eps, step_size, stochastic, (uint32_t)seed};
    void (*run)(const states_t *, int64_t, int64_t, int64_t, const moments_t *, const apply_t *) = block_portable;
#ifdef JINDO_X86
    if (jindo_level_in_use == LEVEL_AVX512) run = block_avx512;
    else if (jindo_level_in_use == LEVEL_AVX2) run = block_avx2;
#endif
#pragma omp parallel for schedule(static) if (n > PIECE)
    for (int64_t block = 0; block < (n + BLOCK - 1) / BLOCK; block++) {
        int64_t first = block * BLOCK;
        run(&s, first, n - first < BLOCK ? n - first : BLOCK, block, &mc, &ac);
    }
}
