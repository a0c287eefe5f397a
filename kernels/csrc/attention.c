/* The softmax of causal attention, forward and backward, between the matrix products of ../attention_cpu.py. */
#include "common.h"
#include "exp.h"

/* Rows come in runs of `run` queries; query i of a run sees, of the n keys, the `window` ones up to key first + i. */
typedef struct {
    const float *scores, *grads;   /* [rows][n]: q k^T, and dO v^T */
    float *lse;                    /* [rows] */
    const float *delta;            /* [rows]: sum(dO * O) */
    int64_t run, first, window, n;
    float scale;
    int type;
    void *p, *ds;                  /* [rows][n] */
} softmax_t;

/* All of a row but the `seen` elements at `at`. */
static inline void clear(const softmax_t *s, void *to, int64_t row, int64_t at, int64_t seen)
{
    const size_t size = s->type == FP32 ? 4 : 2, start = (size_t)(row * s->n) * size;
    const size_t before = (size_t)(at - row * s->n) * size, end = before + (size_t)seen * size;
    memset((char *)to + start, 0, before);
    memset((char *)to + start + end, 0, (size_t)s->n * size - end);
}

/* The `seen` keys of a row from index `at` of all scores on. */
static void forward_row(const softmax_t *s, int64_t row, int64_t at, int64_t seen)
{
    const float *z = s->scores + at;
    float peak = -INFINITY, sum = 0;
    for (int64_t i = 0; i < seen; i++) peak = z[i] > peak || z[i] != z[i] ? z[i] : peak;
    for (int64_t i = 0; i < seen; i++) sum += expf((z[i] - peak) * s->scale);
    s->lse[row] = peak * s->scale + logf(sum);
    for (int64_t i = 0; i < seen; i++)
        store_float(s->p, at + i, s->type, expf((z[i] - peak) * s->scale) / sum);
    clear(s, s->p, row, at, seen);
}

static void backward_row(const softmax_t *s, int64_t row, int64_t at, int64_t seen)
{
    const float *z = s->scores + at, *g = s->grads + at;
    for (int64_t i = 0; i < seen; i++) {
        float p = expf(z[i] * s->scale - s->lse[row]);
        store_float(s->p, at + i, s->type, p);
        store_float(s->ds, at + i, s->type, p * (g[i] - s->delta[row]) * s->scale);
    }
    clear(s, s->p, row, at, seen);
    clear(s, s->ds, row, at, seen);
}

#ifdef JINDO_X86
AVX512 static inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1 << n) - 1); }

AVX512 static inline void store_lanes(void *to, int64_t at, int type, __mmask16 lanes, __m512 v)
{
    if (type == FP32) _mm512_mask_storeu_ps((float *)to + at, lanes, v);
    else {
        __m256i h = type == BF16 ? round16_bf16(v)
                                 : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16((uint16_t *)to + at, lanes, h);
    }
}

AVX512 static void forward_row_avx512(const softmax_t *s, int64_t row, int64_t at, int64_t seen)
{
    const float *z = s->scores + at;
    const __m512 lowest = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(s->scale);
    __m512 peaks = lowest, sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < seen; i += 16)
        peaks = _mm512_max_ps(peaks, _mm512_mask_loadu_ps(lowest, first_lanes(seen - i), z + i));
    float peak = _mm512_reduce_max_ps(peaks) * s->scale;
    const __m512 shift = _mm512_set1_ps(peak);
    for (int64_t i = 0; i < seen; i += 16) {
        __mmask16 lanes = first_lanes(seen - i);
        __m512 v = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(lanes, z + i), scale, shift);
        sums = _mm512_mask_add_ps(sums, lanes, sums, exp16(v));
    }
    s->lse[row] = peak + logf(_mm512_reduce_add_ps(sums));
    const __m512 total = _mm512_set1_ps(s->lse[row]);
    for (int64_t i = 0; i < seen; i += 16) {
        __mmask16 lanes = first_lanes(seen - i);
        __m512 v = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(lanes, z + i), scale, total);
        store_lanes(s->p, at + i, s->type, lanes, exp16(v));
    }
    clear(s, s->p, row, at, seen);
}

AVX512 static void backward_row_avx512(const softmax_t *s, int64_t row, int64_t at, int64_t seen)
{
    const float *z = s->scores + at, *g = s->grads + at;
    const __m512 scale = _mm512_set1_ps(s->scale), lse = _mm512_set1_ps(s->lse[row]);
    const __m512 delta = _mm512_set1_ps(s->delta[row]);
    for (int64_t i = 0; i < seen; i += 16) {
        __mmask16 lanes = first_lanes(seen - i);
        __m512 p = exp16(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(lanes, z + i), scale, lse));
        __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, g + i), delta);
        store_lanes(s->p, at + i, s->type, lanes, p);
        store_lanes(s->ds, at + i, s->type, lanes, _mm512_mul_ps(_mm512_mul_ps(p, d), scale));
    }
    clear(s, s->p, row, at, seen);
    clear(s, s->ds, row, at, seen);
}
#endif

/* grads null: p and lse are made from the scores. Else p again, and ds. */
EXPORT void jindo_causal_softmax(
    const float *scores, const float *grads, int64_t rows, int64_t run, int64_t first, int64_t window, int64_t n,
    float scale, int type, float *lse, const float *delta, void *p, void *ds)
{
    const softmax_t s = {scores, grads, lse, delta, run, first, window, n, scale, type, p, ds};
    void (*one)(const softmax_t *, int64_t, int64_t, int64_t) = grads ? backward_row : forward_row;
#ifdef JINDO_X86
    if (jindo_level_in_use == LEVEL_AVX512) one = grads ? backward_row_avx512 : forward_row_avx512;
#endif
#pragma omp parallel for schedule(static, 8) if (rows * n >= 8192)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t end = first + row % run + 1, start = end > window ? end - window : 0;
        one(&s, row, row * n + start, end - start);
    }
}
