/* What lies between the matrix products, in one pass each: RMSNorm, SwiGLU, RoPE, dropout, softmax cross entropy.
 * Contracts: ../rms_norm.py, ../swiglu.py, ../rope.py, ../dropout.py, ../linear_cross_entropy.py.
 * fp32 inside, one rounding at the end. */
#include "common.h"
#include "exp.h"

static inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

#ifdef JINDO_X86
AVX512 static inline __m512 sigmoid16(__m512 x)
{
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

#define WIDE (jindo_level_in_use == LEVEL_AVX512)
#endif

/* --- RMSNorm ------------------------------------------------------------------------------------------ */

static void norm_row(const void *x, int64_t at, const void *w, float eps, int64_t n, int type, void *y, float *rstd)
{
    float strand[16] = {0}, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        float v = load_as_float(x, at + i, type);
        strand[i & 15] += v * v;
    }
    for (int i = 0; i < 16; i++) sum += strand[i];
    *rstd = 1 / sqrtf(sum / (float)n + eps);
    for (int64_t i = 0; i < n; i++) {
        /* As LLaMA: rounded to the activation's type before it meets the weight. */
        store_float(y, at + i, type, load_as_float(x, at + i, type) * *rstd);
        store_float(y, at + i, type, load_as_float(y, at + i, type) * load_as_float(w, i, type));
    }
}

static void norm_back_row(
    const void *dy, const void *x, int64_t at, const void *w, float rstd, int64_t n, int type, void *dx)
{
    float strand[16] = {0}, mean = 0;
    for (int64_t i = 0; i < n; i++)
        strand[i & 15] += load_as_float(dy, at + i, type) * load_as_float(w, i, type) * load_as_float(x, at + i, type);
    for (int i = 0; i < 16; i++) mean += strand[i];
    mean = mean * rstd / (float)n;
    for (int64_t i = 0; i < n; i++) {
        float g = load_as_float(dy, at + i, type) * load_as_float(w, i, type);
        store_float(dx, at + i, type, (g - load_as_float(x, at + i, type) * rstd * mean) * rstd);
    }
}

#ifdef JINDO_X86
AVX512 static void norm_row_avx512(
    const void *x, int64_t at, const void *w, float eps, int64_t n, int type, void *y, float *rstd)
{
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        __m512 v = load16(x, at + i, type);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    *rstd = 1 / sqrtf(_mm512_reduce_add_ps(sum) / (float)n + eps);
    __m512 r = _mm512_set1_ps(*rstd);
    for (int64_t i = 0; i < n; i += 16) {
        __m512 normal = _mm512_mul_ps(load16(x, at + i, type), r);
        if (type == BF16)
            normal = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round16_bf16(normal)), 16));
        else if (type == FP16)
            normal = _mm512_cvtph_ps(_mm512_cvtps_ph(normal, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        store16(y, at + i, type, _mm512_mul_ps(normal, load16(w, i, type)));
    }
}

AVX512 static void norm_back_row_avx512(
    const void *dy, const void *x, int64_t at, const void *w, float rstd, int64_t n, int type, void *dx)
{
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        __m512 g = _mm512_mul_ps(load16(dy, at + i, type), load16(w, i, type));
        sum = _mm512_fmadd_ps(g, load16(x, at + i, type), sum);
    }
    __m512 r = _mm512_set1_ps(rstd), mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * rstd / (float)n);
    for (int64_t i = 0; i < n; i += 16) {
        __m512 g = _mm512_mul_ps(load16(dy, at + i, type), load16(w, i, type));
        __m512 normal = _mm512_mul_ps(load16(x, at + i, type), r);
        store16(dx, at + i, type, _mm512_mul_ps(_mm512_fnmadd_ps(normal, mean, g), r));
    }
}
#endif

EXPORT void jindo_rms_norm(
    const void *x, const void *w, float eps, int64_t rows, int64_t n, int type, void *y, float *rstd)
{
    void (*run)(const void *, int64_t, const void *, float, int64_t, int, void *, float *) = norm_row;
#ifdef JINDO_X86
    if (WIDE && n % 16 == 0) run = norm_row_avx512;
#endif
#pragma omp parallel for schedule(static) if (rows * n >= 16384)
    for (int64_t m = 0; m < rows; m++) run(x, m * n, w, eps, n, type, y, rstd + m);
}

EXPORT void jindo_rms_norm_backward(
    const void *dy, const void *x, const void *w, const float *rstd, int64_t rows, int64_t n, int type, void *dx)
{
    void (*run)(const void *, const void *, int64_t, const void *, float, int64_t, int, void *) = norm_back_row;
#ifdef JINDO_X86
    if (WIDE && n % 16 == 0) run = norm_back_row_avx512;
#endif
#pragma omp parallel for schedule(static) if (rows * n >= 16384)
    for (int64_t m = 0; m < rows; m++) run(dy, x, m * n, w, rstd[m], n, type, dx);
}

/* --- SwiGLU ------------------------------------------------------------------------------------------- */

typedef struct {
    const void *dh, *gate, *up;
    void *h, *dgate, *dup;
    int64_t gate_stride, up_stride, n;
    int type;
} swiglu_t;

static void swiglu_row(const swiglu_t *s, int64_t m, int64_t from)
{
    for (int64_t i = from; i < s->n; i++) {
        float g = load_as_float(s->gate, m * s->gate_stride + i, s->type);
        float u = load_as_float(s->up, m * s->up_stride + i, s->type), sig = sigmoid(g);
        if (!s->dh) { store_float(s->h, m * s->n + i, s->type, g * sig * u); continue; }
        float d = load_as_float(s->dh, m * s->n + i, s->type);
        store_float(s->dup, m * s->n + i, s->type, d * (g * sig));
        store_float(s->dgate, m * s->n + i, s->type, d * u * sig * (1 + g * (1 - sig)));
    }
}

#ifdef JINDO_X86
AVX512 static void swiglu_row_avx512(const swiglu_t *s, int64_t m, int64_t from)
{
    int64_t i = from;
    for (; i + 16 <= s->n; i += 16) {
        __m512 g = load16(s->gate, m * s->gate_stride + i, s->type);
        __m512 u = load16(s->up, m * s->up_stride + i, s->type), sig = sigmoid16(g);
        __m512 silu = _mm512_mul_ps(g, sig), one = _mm512_set1_ps(1.0f);
        if (!s->dh) { store16(s->h, m * s->n + i, s->type, _mm512_mul_ps(silu, u)); continue; }
        __m512 d = load16(s->dh, m * s->n + i, s->type);
        store16(s->dup, m * s->n + i, s->type, _mm512_mul_ps(d, silu));
        __m512 slope = _mm512_mul_ps(sig, _mm512_fmadd_ps(g, _mm512_sub_ps(one, sig), one));
        store16(s->dgate, m * s->n + i, s->type, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
    }
    swiglu_row(s, m, i);
}
#endif

/* dh null: h is made; else dgate and dup. Rows of h, dh, dgate and dup lie n apart. */
EXPORT void jindo_swiglu(
    const void *dh, const void *gate, int64_t gate_stride, const void *up, int64_t up_stride, int64_t rows,
    int64_t n, int type, void *h, void *dgate, void *dup)
{
    const swiglu_t s = {dh, gate, up, h, dgate, dup, gate_stride, up_stride, n, type};
    void (*run)(const swiglu_t *, int64_t, int64_t) = swiglu_row;
#ifdef JINDO_X86
    if (WIDE) run = swiglu_row_avx512;
#endif
#pragma omp parallel for schedule(static) if (rows * n >= 8192)
    for (int64_t m = 0; m < rows; m++) run(&s, m, 0);
}

/* --- RoPE --------------------------------------------------------------------------------------------- */

static void turn_head(const void *x, int64_t from, const float *cos, const float *sin, float sign, int64_t half,
                      int type, void *out, int64_t to)
{
    int64_t i = 0;
    for (; i < half; i++) {
        float a = load_as_float(x, from + i, type), b = load_as_float(x, from + half + i, type);
        float c = cos[i], s = sign * sin[i];
        store_float(out, to + i, type, a * c - b * s);
        store_float(out, to + half + i, type, b * c + a * s);
    }
}

#ifdef JINDO_X86
AVX512 static void turn_head_avx512(const void *x, int64_t from, const float *cos, const float *sin, float sign,
                                    int64_t half, int type, void *out, int64_t to)
{
    for (int64_t i = 0; i < half; i += 16) {
        __m512 a = load16(x, from + i, type), b = load16(x, from + half + i, type);
        __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_mul_ps(_mm512_set1_ps(sign), _mm512_loadu_ps(sin + i));
        store16(out, to + i, type, _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)));
        store16(out, to + half + i, type, _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, s)));
    }
}
#endif

/* x [B][T][H][D] with strides; out contiguous; cos and sin [B][T][D / 2], cos_stride 0 where all B share them. */
EXPORT void jindo_rope(
    const void *x, int64_t b, int64_t t, int64_t h, int64_t d, int64_t stride_b, int64_t stride_t, int64_t stride_h,
    const float *cos, const float *sin, int64_t cos_stride, float sign, int type, void *out)
{
    void (*run)(const void *, int64_t, const float *, const float *, float, int64_t, int, void *, int64_t) = turn_head;
#ifdef JINDO_X86
    if (WIDE && d % 32 == 0) run = turn_head_avx512;
#endif
#pragma omp parallel for schedule(static) if (b * t * h * d >= 16384)
    for (int64_t i = 0; i < b * t; i++) {
        int64_t at = i / t * cos_stride + i % t * (d / 2);
        for (int64_t head = 0; head < h; head++)
            run(x, i / t * stride_b + i % t * stride_t + head * stride_h, cos + at, sin + at, sign, d / 2, type, out,
                (i * h + head) * d);
    }
}

/* --- dropout ------------------------------------------------------------------------------------------ */

/* The counter-based mask of ../dropout.py, element by element. */
static inline int keep(uint32_t i, uint32_t seed, int32_t threshold)
{
    uint32_t h = i * 0x9E3779B1u + seed;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return (int32_t)h >= threshold;
}

/* out = kept ? x : 0 */
#define DROP_RANGE \
    for (int64_t i = from; i < to; i++) \
        store_float(out, i, type, keep((uint32_t)i, seed, threshold) ? load_as_float(x, i, type) : 0);

static void drop_range(const void *x, int64_t from, int64_t to, uint32_t seed, int32_t threshold, int type, void *out)
{
    DROP_RANGE
}

#ifdef JINDO_X86
AVX512 static void drop_range_avx512(const void *x, int64_t from, int64_t to, uint32_t seed, int32_t threshold,
                                     int type, void *out)
{
    const __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (; from + 16 <= to; from += 16) {
        __m512i h = _mm512_add_epi32(_mm512_set1_epi32((int32_t)(uint32_t)from), step);
        h = _mm512_add_epi32(_mm512_mullo_epi32(h, _mm512_set1_epi32((int32_t)0x9E3779B1u)), _mm512_set1_epi32((int32_t)seed));
        h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 16)), _mm512_set1_epi32((int32_t)0x85EBCA6Bu));
        h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 13)), _mm512_set1_epi32((int32_t)0xC2B2AE35u));
        __mmask16 kept = _mm512_cmpge_epi32_mask(h, _mm512_set1_epi32(threshold));
        store16(out, from, type, _mm512_maskz_mov_ps(kept, load16(x, from, type)));
    }
    DROP_RANGE
}
#endif

EXPORT void jindo_drop(
    const void *x, int64_t count, int32_t seed, int32_t threshold, int type, void *out)
{
    void (*run)(const void *, int64_t, int64_t, uint32_t, int32_t, int, void *) = drop_range;
#ifdef JINDO_X86
    if (WIDE) run = drop_range_avx512;
#endif
    const int64_t step = 16384;
#pragma omp parallel for schedule(static) if (count > step)
    for (int64_t from = 0; from < count; from += step)
        run(x, from, from + step < count ? from + step : count, (uint32_t)seed, threshold, type, out);
}

/* --- softmax cross entropy of rows of logits ----------------------------------------------------------- */

static void softmax_row(void *z, int64_t at, int64_t n, int64_t label, float smoothing, int type, int grad, double *loss)
{
    float peak = -INFINITY;
    double sum = 0, total = 0;
    for (int64_t i = 0; i < n; i++) {
        float v = load_as_float(z, at + i, type);
        peak = v > peak || v != v ? v : peak;
        total += v;
    }
    for (int64_t i = 0; i < n; i++) sum += expf(load_as_float(z, at + i, type) - peak);
    double log_sum = peak + log(sum);
    *loss = log_sum - (1 - smoothing) * load_as_float(z, at + label, type) - smoothing * total / (double)n;
    if (!grad) return;
    float scale = (float)(1 / sum), share = smoothing / (float)n;
    for (int64_t i = 0; i < n; i++) {
        float p = expf(load_as_float(z, at + i, type) - peak) * scale - share;
        store_float(z, at + i, type, i == label ? p - (1 - smoothing) : p);
    }
}

#ifdef JINDO_X86
AVX512 static void softmax_row_avx512(
    void *z, int64_t at, int64_t n, int64_t label, float smoothing, int type, int grad, double *loss)
{
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    const float own = load_as_float(z, at + label, type);
    __m512 peaks = lowest, sums = _mm512_setzero_ps(), totals = _mm512_setzero_ps();
    int64_t i = 0, even = n - n % 16;
    float peak, sum = 0, total = 0;
    for (i = 0; i < even; i += 16) {
        __m512 v = load16(z, at + i, type);
        peaks = _mm512_max_ps(peaks, v);
        totals = _mm512_add_ps(totals, v);
    }
    peak = _mm512_reduce_max_ps(peaks);
    total = _mm512_reduce_add_ps(totals);
    for (; i < n; i++) {
        float v = load_as_float(z, at + i, type);
        peak = v > peak ? v : peak;
        total += v;
    }
    if (total != total) { softmax_row(z, at, n, label, smoothing, type, grad, loss); return; } /* NaN or inf - inf */
    for (i = 0; i < even; i += 16)
        sums = _mm512_add_ps(sums, exp16(_mm512_sub_ps(load16(z, at + i, type), _mm512_set1_ps(peak))));
    sum = _mm512_reduce_add_ps(sums);
    for (; i < n; i++) sum += expf(load_as_float(z, at + i, type) - peak);
    *loss = (double)peak + log((double)sum) - (1 - (double)smoothing) * own - (double)smoothing * total / (double)n;
    if (!grad) return;
    float scale = 1 / sum, share = smoothing / (float)n;
    float at_label = expf(own - peak) * scale - share - (1 - smoothing);
    for (i = 0; i < even; i += 16) {
        __m512 p = exp16(_mm512_sub_ps(load16(z, at + i, type), _mm512_set1_ps(peak)));
        store16(z, at + i, type, _mm512_fmsub_ps(p, _mm512_set1_ps(scale), _mm512_set1_ps(share)));
    }
    for (; i < n; i++)
        store_float(z, at + i, type, expf(load_as_float(z, at + i, type) - peak) * scale - share);
    store_float(z, at + label, type, at_label);
}
#endif

/* logits [rows][n] become their gradient where grad is set; loss [rows]. */
EXPORT void jindo_softmax_cross_entropy(
    void *logits, int64_t rows, int64_t n, const int64_t *labels, float smoothing, int type, int grad, double *loss)
{
    void (*run)(void *, int64_t, int64_t, int64_t, float, int, int, double *) = softmax_row;
#ifdef JINDO_X86
    if (WIDE) run = softmax_row_avx512;
#endif
#pragma omp parallel for schedule(static) if (rows * n >= 8192)
    for (int64_t m = 0; m < rows; m++) run(logits, m * n, n, labels[m], smoothing, type, grad, loss + m);
}
