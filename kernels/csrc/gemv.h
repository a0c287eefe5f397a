/* The NF4 GEMV's inner loops, which lora_gemv.c and decode.c share.
 *
 * W is read once, as codes: a register of 32-bit words holds eight codes a word; shifted, its low four bits index
 * the 16 codes in a register, and the products are summed before the block's maximum joins, once a block. For that
 * x is laid out as the codes lie: [group][8 nibbles][LANES], a group being 8 * LANES weights of a row.
 *
 * Where x is bf16 and the processor multiplies bf16 pairs, the codes are looked up as bf16 too, 32 at a time, which
 * halves the work. That rounds a code by 2^-9 at most, as rounding W to bf16 for a matrix product does. There x is
 * laid out as [group][4 nibbles][32]. */
#ifndef JINDO_GEMV_H
#define JINDO_GEMV_H

#include "common.h"

enum { MOST_ROWS = 8, MOST_BLOCKS = 1024, PREFETCH_BYTES = 8192 };

static const float CODES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

typedef struct {
    int64_t rows, in, out;      /* M, K (a multiple of 64), N */
    const uint8_t *codes;
    const void *absmax;
    const float *nested, *offset, *map;
    int64_t groups_a_block;     /* block size / 64 */
    const void *x;              /* [M][K rounded up to 128], laid out as the codes lie: floats, or bf16 */
    int pairs;                  /* x is bf16: use the products of bf16 pairs */
    int64_t padded;             /* K rounded up to 128 */
    const float *down, *b;      /* [M][rank], [N][rank], or rank 0 */
    int64_t rank;
    float scale;
    void *y;
    int64_t y_stride;
    int type;
} job_t;

/* Element e of a word's eight: in byte e / 2, the even ones in the high nibble. */
static inline int shift_of(int e) { return 8 * (e / 2) + (e % 2 ? 0 : 4); }

/* The maxima of row n's groups of 64. One block a group, the usual case, needs no division. */
static inline void row_maxima(const job_t *j, int64_t n, float *maxima)
{
    const int64_t groups = j->in / 64, first = n * groups, share = j->groups_a_block;
    const uint8_t *quantized = j->absmax;
    for (int64_t g = 0; g < groups; g++) {
        int64_t block = share == 1 ? first + g : (first + g) / share;
        maxima[g] = j->nested ? j->map[quantized[block]] * j->nested[block >> 8] + *j->offset
                              : ((const float *)j->absmax)[block];
    }
    maxima[groups] = 0; /* an odd number of groups: the second half of the last register */
}

/* Adds the adapter's part and stores y[m][n]. */
static inline void finish(const job_t *j, int64_t m, int64_t n, float total)
{
    float up = 0;
    for (int64_t r = 0; r < j->rank; r++) up += j->down[m * j->rank + r] * j->b[n * j->rank + r];
    store_float(j->y, m * j->y_stride + n, j->type, total + j->scale * up);
}

static void rows_portable(const job_t *j, int64_t first, int64_t last)
{
    float maxima[MOST_BLOCKS + 1];
    for (int64_t n = first; n < last; n++) {
        float total[MOST_ROWS][8] = {{0}};
        const uint8_t *codes = j->codes + n * (j->in / 2);
        row_maxima(j, n, maxima);
        for (int64_t g = 0; g < j->in / 64; g++) {
            uint8_t bytes[32];
            memcpy(bytes, codes + g * 32, 32);
            for (int64_t m = 0; m < j->rows; m++) {
                const float *x = (const float *)j->x + m * j->padded + g * 64;
                float sum[8] = {0};
                for (int e = 0; e < 8; e++)
                    for (int lane = 0; lane < 8; lane++)
                        sum[lane] += CODES[bytes[4 * lane + e / 2] >> (e % 2 ? 0 : 4) & 15] * x[e * 8 + lane];
                for (int lane = 0; lane < 8; lane++) total[m][lane] += sum[lane] * maxima[g];
            }
        }
        for (int64_t m = 0; m < j->rows; m++) {
            float *t = total[m];
            finish(j, m, n, ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7])));
        }
    }
}

#ifdef JINDO_X86
AVX2 static inline float sum8(__m256 v)
{
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

AVX2 static void rows_avx2(const job_t *j, int64_t first, int64_t last)
{
    float maxima[MOST_BLOCKS + 1];
    const __m256 low = _mm256_loadu_ps(CODES), high = _mm256_loadu_ps(CODES + 8);
    for (int64_t n = first; n < last; n++) {
        __m256 total[MOST_ROWS];
        const uint8_t *codes = j->codes + n * (j->in / 2);
        row_maxima(j, n, maxima);
        for (int64_t m = 0; m < j->rows; m++) total[m] = _mm256_setzero_ps();
        for (int64_t g = 0; g < j->in / 64; g++) {
            __m256i words = _mm256_loadu_si256((const __m256i *)(codes + g * 32));
            __m256 code[8], maximum = _mm256_set1_ps(maxima[g]);
            for (int e = 0; e < 8; e++) {
                __m256i index = _mm256_srli_epi32(words, shift_of(e));
                __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)); /* bit 3 as the sign */
                code[e] = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
            }
            for (int64_t m = 0; m < j->rows; m++) {
                const float *x = (const float *)j->x + m * j->padded + g * 64;
                __m256 sum = _mm256_mul_ps(code[0], _mm256_loadu_ps(x));
                for (int e = 1; e < 8; e++) sum = _mm256_fmadd_ps(code[e], _mm256_loadu_ps(x + e * 8), sum);
                total[m] = _mm256_fmadd_ps(sum, maximum, total[m]);
            }
        }
        for (int64_t m = 0; m < j->rows; m++) finish(j, m, n, sum8(total[m]));
    }
}

/* map[code] of sixteen codes: eight looked up in 32 entries each, and a tree of choices. A gather takes longer. */
AVX512 static inline __m512 look_up_256(const float *map, __m512i code)
{
    __m512 v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(map + 32 * i), code, _mm512_loadu_ps(map + 32 * i + 16));
#pragma GCC unroll 3
    for (int bit = 5, n = 4; bit < 8; bit++, n /= 2) {
        __mmask16 set = _mm512_test_epi32_mask(code, _mm512_set1_epi32(1 << bit));
        for (int i = 0; i < n; i++) v[i] = _mm512_mask_blend_ps(set, v[2 * i], v[2 * i + 1]);
    }
    return v[0];
}

/* row_maxima, sixteen at once. */
AVX512 static void row_maxima_avx512(const job_t *j, int64_t n, float *maxima)
{
    const int64_t groups = j->in / 64, first = n * groups;
    if (!j->nested || j->groups_a_block != 1) { row_maxima(j, n, maxima); return; }
    const uint8_t *quantized = (const uint8_t *)j->absmax + first;
    const __m512 offset = _mm512_set1_ps(*j->offset);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t g = 0; g < groups; g += 16) {
        __mmask16 inside = groups - g >= 16 ? 0xffff : (__mmask16)((1 << (groups - g)) - 1);
        __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, quantized + g));
        __m512 value = look_up_256(j->map, code), nested;
        if ((first + g) >> 8 == (first + g + 15) >> 8) nested = _mm512_set1_ps(j->nested[(first + g) >> 8]);
        else {
            __m512i index = _mm512_srli_epi32(_mm512_add_epi32(_mm512_set1_epi32((int)((first + g) & 255)), lane), 8);
            nested = _mm512_mask_i32gather_ps(offset, inside, index, j->nested + ((first + g) >> 8), 4);
        }
        _mm512_storeu_ps(maxima + g, _mm512_maskz_add_ps(inside, _mm512_mul_ps(value, nested), offset));
    }
    if (groups % 16 == 0) maxima[groups] = 0;
}

/* R rows of W against M of x at once: a load of x serves R rows, and R * M sums keep the multipliers busy. Up to
 * four rows of x, the products of a block are summed before its maximum joins; beyond, registers are too few for
 * two sums each, and the maximum joins the code. */
#define ALWAYS_INLINE static inline __attribute__((always_inline))
AVX512 ALWAYS_INLINE void tile_avx512(const job_t *j, int64_t n, const int R, const int M)
{
    float maxima[4][MOST_BLOCKS + 16];
    const __m512 table = _mm512_loadu_ps(CODES);
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const int64_t groups = (j->in + 127) / 128;
    __m512 total[16];
    for (int r = 0; r < R; r++) row_maxima_avx512(j, n + r, maxima[r]);
    for (int i = 0; i < R * M; i++) total[i] = _mm512_setzero_ps();
    /* Rows are too short for the processor to see a stream: ask for those some kilobytes ahead. */
    const char *ahead = (const char *)j->codes + n * (j->in / 2) + PREFETCH_BYTES;
    for (int64_t at = 0; at < R * (j->in / 2); at += 64) _mm_prefetch(ahead + at, _MM_HINT_T0);
    _mm_prefetch((const char *)j->absmax + (n * (j->in / 64) + PREFETCH_BYTES / 32) * (j->nested ? 1 : 4), _MM_HINT_T0);
    for (int64_t g = 0; g < groups; g++) {
        __mmask16 inside = g * 128 + 128 <= j->in ? 0xffff : 0x00ff;
        __m512i words[4];
        __m512 maximum[4], sum[8];
        for (int r = 0; r < R; r++) {
            double pair;
            memcpy(&pair, &maxima[r][2 * g], 8);
            maximum[r] = _mm512_permutexvar_ps(halves, _mm512_castpd_ps(_mm512_set1_pd(pair)));
            words[r] = _mm512_maskz_loadu_epi32(inside, j->codes + (n + r) * (j->in / 2) + g * 64);
        }
        if (M <= 4)
            for (int i = 0; i < R * M; i++) sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int e = 0; e < 8; e++)
            for (int r = 0; r < R; r++) {
                __m512 code = _mm512_permutexvar_ps(_mm512_srli_epi32(words[r], shift_of(e)), table);
                if (M > 4) code = _mm512_mul_ps(code, maximum[r]);
                for (int m = 0; m < M; m++) {
                    __m512 x = _mm512_loadu_ps((const float *)j->x + m * j->padded + g * 128 + e * 16);
                    if (M > 4) total[r * M + m] = _mm512_fmadd_ps(code, x, total[r * M + m]);
                    else sum[r * M + m] = _mm512_fmadd_ps(code, x, sum[r * M + m]);
                }
            }
        if (M <= 4)
            for (int i = 0; i < R * M; i++) total[i] = _mm512_fmadd_ps(sum[i], maximum[i / M], total[i]);
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) finish(j, m, n + r, _mm512_reduce_add_ps(total[r * M + m]));
}

#define PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
PAIRS ALWAYS_INLINE void tile_pairs(const job_t *j, int64_t n, const int R, const int M)
{
    float maxima[4][MOST_BLOCKS + 16];
    uint16_t codes[32];
    for (int i = 0; i < 32; i++) codes[i] = float_to_bf16(CODES[i & 15]); /* twice: a fifth index bit chooses nothing */
    const __m512i table = _mm512_loadu_si512(codes);
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const int64_t groups = (j->in + 127) / 128;
    __m512 total[16];
    for (int r = 0; r < R; r++) row_maxima_avx512(j, n + r, maxima[r]);
    for (int i = 0; i < R * M; i++) total[i] = _mm512_setzero_ps();
    const char *ahead = (const char *)j->codes + n * (j->in / 2) + PREFETCH_BYTES;
    for (int64_t at = 0; at < R * (j->in / 2); at += 64) _mm_prefetch(ahead + at, _MM_HINT_T0);
    _mm_prefetch((const char *)j->absmax + (n * (j->in / 64) + PREFETCH_BYTES / 32) * (j->nested ? 1 : 4), _MM_HINT_T0);
    for (int64_t g = 0; g < groups; g++) {
        __mmask16 inside = g * 128 + 128 <= j->in ? 0xffff : 0x00ff;
        for (int r = 0; r < R; r++) {
            double pair;
            memcpy(&pair, &maxima[r][2 * g], 8);
            __m512 maximum = _mm512_permutexvar_ps(halves, _mm512_castpd_ps(_mm512_set1_pd(pair)));
            __m512i words = _mm512_maskz_loadu_epi32(inside, j->codes + (n + r) * (j->in / 2) + g * 64);
            __m512 sum[8];
            for (int m = 0; m < M; m++) sum[m] = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int e = 0; e < 4; e++) {
                __m512i code = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * e), table);
                for (int m = 0; m < M; m++) {
                    const uint16_t *x = (const uint16_t *)j->x + m * j->padded + g * 128 + e * 32;
                    sum[m] = _mm512_dpbf16_ps(sum[m], (__m512bh)code, (__m512bh)_mm512_loadu_si512(x));
                }
            }
            for (int m = 0; m < M; m++) total[r * M + m] = _mm512_fmadd_ps(sum[m], maximum, total[r * M + m]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) finish(j, m, n + r, _mm512_reduce_add_ps(total[r * M + m]));
}

#define TILES(M, R) \
    AVX512 static void rows_avx512_##M(const job_t *j, int64_t first, int64_t last) \
    { \
        for (; first + R <= last; first += R) tile_avx512(j, first, R, M); \
        for (; first < last; first++) tile_avx512(j, first, 1, M); \
    } \
    PAIRS static void rows_pairs_##M(const job_t *j, int64_t first, int64_t last) \
    { \
        /* One token: long rows one at a time, for memory likes one stream; short ones would be all overhead. */ \
        if (M > 1 || j->in < 1024) \
            for (; first + R <= last; first += R) tile_pairs(j, first, R, M); \
        for (; first < last; first++) tile_pairs(j, first, 1, M); \
    }
TILES(1, 4) TILES(2, 4) TILES(3, 2) TILES(4, 2) TILES(5, 2) TILES(6, 2) TILES(7, 2) TILES(8, 2)
#endif

typedef void rows_t(const job_t *, int64_t, int64_t);

/* Whether x of that type is to be laid out as bf16 pairs. */
static inline int uses_pairs(int type)
{
#ifdef JINDO_X86
    return type == BF16 && jindo_level_in_use == LEVEL_AVX512 && __builtin_cpu_supports("avx512bf16");
#else
    return (void)type, 0;
#endif
}

static rows_t *choose(int64_t rows, int pairs)
{
#ifdef JINDO_X86
    static rows_t *const wide[] = {rows_avx512_1, rows_avx512_2, rows_avx512_3, rows_avx512_4,
                                   rows_avx512_5, rows_avx512_6, rows_avx512_7, rows_avx512_8};
    static rows_t *const paired[] = {rows_pairs_1, rows_pairs_2, rows_pairs_3, rows_pairs_4,
                                     rows_pairs_5, rows_pairs_6, rows_pairs_7, rows_pairs_8};
    if (pairs) return paired[rows - 1];
    if (jindo_level_in_use == LEVEL_AVX512) return wide[rows - 1];
    if (jindo_level_in_use == LEVEL_AVX2) return rows_avx2;
#endif
    (void)rows, (void)pairs;
    return rows_portable;
}

/* One row of x, padded floats, as the codes lie; the pieces [from, to) of its 128. */
static inline void lay_out(const float *plain, void *laid, int64_t from, int64_t to, int pairs)
{
    if (pairs) {
        /* Word w of a group's 32 holds weights 4w to 4w + 3, the first in bits 4 to 7. */
        uint16_t *half = laid;
        for (int64_t g = from; g < to; g++)
            for (int w = 0; w < 32; w++)
                for (int e = 0; e < 4; e++)
                    half[g * 128 + e * 32 + w] = float_to_bf16(plain[g * 128 + 4 * w + (e ^ 1)]);
        return;
    }
    const int lanes = jindo_level_in_use == LEVEL_AVX512 ? 16 : 8;
    for (int64_t i = from * 128; i < to * 128; i += 8 * lanes)
        for (int lane = 0; lane < lanes; lane++)
            for (int e = 0; e < 8; e++) ((float *)laid)[i + e * lanes + lane] = plain[i + lane * 8 + e];
}

/* A dot product in sixteen strands, which the compiler turns into vectors. */
static inline float dot(const float *a, const float *b, int64_t n)
{
    float sum[16] = {0}, total = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int lane = 0; lane < 16; lane++) sum[lane] += a[i + lane] * b[i + lane];
    for (; i < n; i++) sum[0] += a[i] * b[i];
    for (int lane = 0; lane < 16; lane++) total += sum[lane];
    return total;
}
#endif
