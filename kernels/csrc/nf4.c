/* NF4 quantize and dequantize for the CPU. Contract and reference: ../nf4.py; bit-identical to both.
 *
 * Dequantize: a block has one maximum, so only 16 results are possible. They are computed and rounded once a
 * block, into a register that a permute indexes by the 4-bit codes: no multiplication per weight. */
#include "common.h"

static const float CODES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

typedef struct {
    const uint8_t *codes;        /* two a byte, high nibble first */
    const void *absmax;          /* uint8 [blocks] when nested is given, else float [blocks] */
    const float *nested;         /* [ceil(blocks / 256)], or null */
    const float *offset, *map;   /* [], [256] */
    int64_t block_size;
} weight_t;

static inline float maximum_of(const weight_t *w, int64_t block)
{
    if (!w->nested) return ((const float *)w->absmax)[block];
    return w->map[((const uint8_t *)w->absmax)[block]] * w->nested[block >> 8] + *w->offset;
}

/* --- dequantize: n weights of one block, from a whole byte on ----------------------------------------- */

static inline void expand_portable(const uint8_t *codes, int64_t n, float maximum, void *out, int64_t at, int type)
{
    float value[16];
    uint16_t half[16];
    for (int i = 0; i < 16; i++) value[i] = CODES[i] * maximum;
    if (type == FP32) {
        float *to = (float *)out + at;
        for (int64_t i = 0; i + 1 < n; i += 2) {
            to[i] = value[codes[i / 2] >> 4];
            to[i + 1] = value[codes[i / 2] & 15];
        }
        if (n & 1) to[n - 1] = value[codes[n / 2] >> 4];
        return;
    }
    for (int i = 0; i < 16; i++) half[i] = type == BF16 ? float_to_bf16(value[i]) : float_to_fp16(value[i]);
    uint16_t *to = (uint16_t *)out + at;
    for (int64_t i = 0; i + 1 < n; i += 2) {
        to[i] = half[codes[i / 2] >> 4];
        to[i + 1] = half[codes[i / 2] & 15];
    }
    if (n & 1) to[n - 1] = half[codes[n / 2] >> 4];
}

#ifdef JINDO_X86
/* 16-bit results: their low and high bytes are two tables that a byte shuffle indexes. */
AVX2 static void expand_avx2(const uint8_t *codes, int64_t n, float maximum, void *out, int64_t at, int type)
{
    if (type == FP32) { expand_portable(codes, n, maximum, out, at, type); return; }
    uint8_t low_bytes[16], high_bytes[16];
    for (int i = 0; i < 16; i++) {
        float value = CODES[i] * maximum;
        uint16_t half = type == BF16 ? float_to_bf16(value) : float_to_fp16(value);
        low_bytes[i] = (uint8_t)half;
        high_bytes[i] = (uint8_t)(half >> 8);
    }
    __m256i low_table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low_bytes));
    __m256i high_table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high_bytes));
    __m256i nibble = _mm256_set1_epi8(15);
    uint16_t *to = (uint16_t *)out + at;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i / 2));
        __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm256_castsi256_si128(nibble));
        __m128i second = _mm_and_si128(bytes, _mm256_castsi256_si128(nibble));
        __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
        __m256i low = _mm256_shuffle_epi8(low_table, index), high = _mm256_shuffle_epi8(high_table, index);
        __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256((__m256i *)(to + i + 16), _mm256_permute2x128_si256(a, b, 0x31));
    }
    if (i < n) expand_portable(codes + i / 2, n - i, maximum, out, at + i, type);
}

AVX512 static void expand_avx512(const uint8_t *codes, int64_t n, float maximum, void *out, int64_t at, int type)
{
    __m512 value = _mm512_mul_ps(_mm512_loadu_ps(CODES), _mm512_set1_ps(maximum));
    int64_t i = 0;
    if (type == FP32) {
        float *to = (float *)out + at;
        const __m512i even = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(8));
        for (; i + 32 <= n; i += 32) {
            __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
            __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), value);
            __m512 second = _mm512_permutexvar_ps(b, value);
            _mm512_storeu_ps(to + i, _mm512_permutex2var_ps(first, even, second));
            _mm512_storeu_ps(to + i + 16, _mm512_permutex2var_ps(first, odd, second));
        }
    } else {
        uint16_t *to = (uint16_t *)out + at;
        __m256i half = type == BF16 ? round16_bf16(value)
                                    : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        /* Twice the 16: the permute's fifth index bit, a bit of the other nibble, then chooses nothing. */
        __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
        for (; i + 32 <= n; i += 32) {
            __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
            __m512i index = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
            _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(index, table));
        }
    }
    if (i < n) expand_portable(codes + i / 2, n - i, maximum, out, at + i, type);
}
#endif

enum { PREFETCH_BYTES = 4096 };

typedef void expand_t(const uint8_t *, int64_t, float, void *, int64_t, int);

EXPORT void jindo_nf4_dequantize(
    const uint8_t *codes, const void *absmax, const float *nested, const float *offset, const float *map,
    int64_t block_size, int64_t count, void *out, int type)
{
    const weight_t w = {codes, absmax, nested, offset, map, block_size};
    expand_t *expand = expand_portable;
#ifdef JINDO_X86
    if (jindo_level_in_use == LEVEL_AVX512) expand = expand_avx512;
    else if (jindo_level_in_use == LEVEL_AVX2) expand = expand_avx2;
#endif
    const int64_t blocks = (count + block_size - 1) / block_size;
#pragma omp parallel for schedule(static) if (count >= 32768)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * block_size, n = count - start < block_size ? count - start : block_size;
        /* Two streams, and the stores: more than some processors see by themselves. */
        __builtin_prefetch(codes + start / 2 + PREFETCH_BYTES);
        expand(codes + start / 2, n, maximum_of(&w, block), out, start, type);
    }
}

/* --- quantize ----------------------------------------------------------------------------------------- */

static const float SMALLEST = 1e-38f;

/* Midpoints of neighbouring codes; a value on one takes the lower code. Computed in float, as the contract. */
static void midpoints(float *t)
{
    for (int i = 0; i < 15; i++) t[i] = (CODES[i + 1] + CODES[i]) / 2;
}

/* Codes of n scaled values, two a byte. !(x <= t) rather than x > t: a NaN takes the highest code. */
static inline void encode_portable(const float *scaled, int64_t n, const float *threshold, uint8_t *codes)
{
    uint8_t code[64];
    for (int64_t i = 0; i < n; i += 64) {
        int64_t m = n - i < 64 ? n - i : 64;
        for (int64_t j = 0; j < 64; j++) code[j] = j < m ? 0 : 7;
        for (int t = 0; t < 15; t++)
            for (int64_t j = 0; j < m; j++) code[j] += !(scaled[i + j] <= threshold[t]);
        for (int64_t j = 0; j < m; j += 2) codes[(i + j) / 2] = (uint8_t)(code[j] << 4 | code[j + 1]);
    }
}

static inline void quantize_block(
    const void *weight, int64_t start, int64_t n, int type, int partial, const float *threshold, float *scaled,
    uint8_t *codes, float *absmax)
{
    float peak = 0;
    int nan = 0;
    for (int64_t i = 0; i < n; i++) {
        float v = load_as_float(weight, start + i, type);
        float size = fabsf(v);
        nan |= size != size;
        peak = size > peak ? size : peak;
        scaled[i] = v;
    }
    if (nan) peak = NAN;
    float divisor = peak < SMALLEST ? SMALLEST : peak, inverse = 1 / divisor;
    for (int64_t i = 0; i < n; i++) {
        float v = partial ? scaled[i] / divisor : scaled[i] * inverse;
        scaled[i] = v < -1 ? -1 : v > 1 ? 1 : v;
    }
    *absmax = partial ? divisor : peak;
    encode_portable(scaled, n, threshold, codes);
}

static void quantize_portable(
    const void *weight, int64_t start, int64_t n, int type, int partial, const float *threshold, float *scaled,
    uint8_t *codes, float *absmax)
{
    quantize_block(weight, start, n, type, partial, threshold, scaled, codes, absmax);
}

#ifdef JINDO_X86
AVX2 static void quantize_avx2(
    const void *weight, int64_t start, int64_t n, int type, int partial, const float *threshold, float *scaled,
    uint8_t *codes, float *absmax)
{
    quantize_block(weight, start, n, type, partial, threshold, scaled, codes, absmax);
}

/* Binary search: four looked-up thresholds a value instead of fifteen. */
AVX512 static inline __m512i search(__m512 v, __m512 table)
{
    __m512i code = _mm512_setzero_si512();
    for (int step = 8; step; step >>= 1) {
        __m512 t = _mm512_permutexvar_ps(_mm512_add_epi32(code, _mm512_set1_epi32(step - 1)), table);
        __mmask16 above = _mm512_cmp_ps_mask(v, t, _CMP_NLE_UQ);
        code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
    }
    return code;
}

AVX512 static void quantize_avx512(
    const void *weight, int64_t start, int64_t n, int type, int partial, const float *threshold, float *scaled,
    uint8_t *codes, float *absmax)
{
    if (partial || n % 32) {
        quantize_block(weight, start, n, type, partial, threshold, scaled, codes, absmax);
        return;
    }
    __m512 peaks = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_abs_ps(load16(weight, start + i, type));
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        peaks = _mm512_max_ps(peaks, v);
    }
    float peak = nan ? NAN : _mm512_reduce_max_ps(peaks);
    __m512 inverse = _mm512_set1_ps(1 / (peak < SMALLEST ? SMALLEST : peak));
    __m512 table = _mm512_loadu_ps(threshold); /* 16 floats: the last is never looked up */
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    *absmax = peak;
    for (int64_t i = 0; i < n; i += 32) {
        /* No clamp: the outermost thresholds lie within [-1, 1]. */
        __m512i a = search(_mm512_mul_ps(load16(weight, start + i, type), inverse), table);
        __m512i b = search(_mm512_mul_ps(load16(weight, start + i + 16, type), inverse), table);
        __m512i high = _mm512_permutex2var_epi32(a, even, b), low = _mm512_permutex2var_epi32(a, odd, b);
        __m512i bytes = _mm512_or_si512(_mm512_slli_epi32(high, 4), low);
        _mm_storeu_si128((__m128i *)(codes + i / 2), _mm512_cvtepi32_epi8(bytes));
    }
}
#endif

typedef void quantize_t(const void *, int64_t, int64_t, int, int, const float *, float *, uint8_t *, float *);

/* scratch: block_size floats for each of the threads. */
EXPORT void jindo_nf4_quantize(
    const void *weight, int type, int64_t count, int64_t block_size, uint8_t *codes, float *absmax,
    float *scratch, int threads)
{
    quantize_t *quantize = quantize_portable;
#ifdef JINDO_X86
    if (jindo_level_in_use == LEVEL_AVX512) quantize = quantize_avx512;
    else if (jindo_level_in_use == LEVEL_AVX2) quantize = quantize_avx2;
#endif
    float threshold[16];
    midpoints(threshold);
    threshold[15] = 2;
    const int64_t blocks = (count + block_size - 1) / block_size, share = (blocks + threads - 1) / threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        int64_t end = (thread + 1) * share < blocks ? (thread + 1) * share : blocks;
        for (int64_t block = thread * share; block < end; block++) {
            int64_t start = block * block_size, n = count - start < block_size ? count - start : block_size;
            quantize(weight, start, n, type, n < block_size, threshold, scratch + thread * block_size,
                     codes + start / 2, absmax + block);
        }
    }
}

/* The second quantization: nearest is uint8 [65536], the code nearest to -1 + 2i / 65535. */
EXPORT void jindo_nf4_quantize_absmax(
    const float *absmax, int64_t count, float offset, const uint8_t *nearest, uint8_t *codes, float *nested)
{
    const int64_t blocks = (count + 255) / 256;
#pragma omp parallel for schedule(static) if (blocks >= 64)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * 256, n = count - start < 256 ? count - start : 256;
        float peak = 0;
        int nan = 0;
        for (int64_t i = 0; i < n; i++) {
            float size = fabsf(absmax[start + i] - offset);
            nan |= size != size;
            peak = size > peak ? size : peak;
        }
        nested[block] = nan ? NAN : peak;
        for (int64_t i = 0; i < n; i++) {
            float v = (absmax[start + i] - offset) / nested[block];
            v = v < -1 ? -1 : v > 1 ? 1 : v;
            float index = (v + 1) * 0.5f * 65535 + 0.5f;
            codes[start + i] = nearest[index == index ? (int)index : 0]; /* 0 / 0: a zero block takes code 0 */
        }
    }
}
