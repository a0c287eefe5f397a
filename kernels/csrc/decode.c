/* One decoding step of a LLaMA through all its layers in one call: at one token a matrix takes 50 microseconds, and
 * what calls it from Python costs as much. Contract: ../decode_cpu.py.
 *
 * Activations stay fp32 from layer to layer; keys and values are rounded to the cache's type. One team of threads
 * runs everything, split by rows of W or by key/value heads, with a barrier where a part needs all of the last. */
#include <omp.h>

#include "exp.h"
#include "gemv.h"

typedef struct {
    const uint8_t *codes;
    const void *absmax;
    const float *nested, *offset, *a, *b, *bias; /* a, b: the adapter; bias [out]; fp32, or null */
    int64_t in, out, rank;
    float scale;
} matrix_t;

enum { Q, K, V, O, GATE, UP, DOWN, MATRICES };

typedef struct {
    matrix_t m[MATRICES];
    const void *attention_norm, *mlp_norm;  /* [C], of the cache's type */
    void *keys, *values;                    /* [rows][G][capacity][D] */
    int64_t window;                         /* so many keys are seen, the new one the last */
} layer_t;

typedef struct {
    int64_t layers, rows, width, heads, groups, head, inner, vocabulary, capacity, length, block_size;
    const layer_t *layer;
    const float *map;
    const void *norm, *lm_head;             /* [C], [V][C] */
    const float *cos, *sin;                 /* [D / 2] */
    float eps;
    int type, threads;
    float *x;                               /* [rows][C]: the embedded tokens, used up */
    float *logits;                          /* [rows][V] */
    float *work;                            /* jindo_decode_work floats */
} step_t;

static int64_t round_up(int64_t n) { return (n + 127) / 128 * 128; }

static int64_t widest(const step_t *s)
{
    int64_t most = s->width, query = s->heads * s->head;
    if (query > most) most = query;
    return round_up(s->inner > most ? s->inner : most);
}

/* plain, laid out, two results of a matrix pair or q, k and v, the products with A, and scores for each thread. */
EXPORT int64_t jindo_decode_work(const step_t *s, int64_t rank)
{
    return s->rows * (5 * widest(s) + 3 * rank) + s->threads * (s->capacity + s->head) + 64;
}

static float rms_scale(const float *x, int64_t n, float eps)
{
    return 1 / sqrtf(dot(x, x, n) / (float)n + eps);
}

/* out[rows][...] = x W^T + s (x A^T) B^T, this thread's share of it, for matrices that read one x. */
static void multiply(
    const step_t *s, const matrix_t *matrices, int count, const float *plain, const void *laid, float *down,
    float *const *out, rows_t *run, int pairs, int thread)
{
    const int64_t padded = round_up(matrices[0].in);
    int adapted = 0;
    for (int i = 0; i < count; i++) adapted |= matrices[i].rank > 0;
    if (adapted) {
        float *to = down;
        for (int i = 0; i < count; i++) {
            const matrix_t *w = matrices + i;
            for (int64_t r = thread; r < s->rows * w->rank; r += s->threads)
                to[r] = dot(plain + r / w->rank * padded, w->a + r % w->rank * w->in, w->in);
            to += s->rows * w->rank;
        }
#pragma omp barrier
    }
    for (int i = 0; i < count; i++) {
        const matrix_t *w = matrices + i;
        const job_t job = {s->rows, w->in, w->out, w->codes, w->absmax, w->nested, w->offset, s->map,
                           s->block_size / 64, laid, pairs, padded, down, w->b, w->rank, w->scale, out[i], w->out, FP32};
        int64_t share = (w->out / 4 + s->threads - 1) / s->threads * 4 + 4, first = thread * share;
        int64_t last = first + share < w->out ? first + share : w->out;
        if (first < last) run(&job, first, last);
        for (int64_t m = 0; w->bias && m < s->rows; m++)
            for (int64_t n = first; n < last; n++) out[i][m * w->out + n] += w->bias[n];
        down += s->rows * w->rank;
    }
}

/* The norm of every row, and its layout for a GEMV; norm null: x as it is. x: [rows][n]. */
static void prepare(
    const step_t *s, const float *x, const void *norm, int64_t n, float *plain, void *laid, int pairs, int thread)
{
    const int64_t padded = round_up(n), pieces = padded / 128;
    const int64_t from = thread * pieces / s->threads, to = (thread + 1) * pieces / s->threads;
    for (int64_t m = 0; m < s->rows; m++) {
        float scale = norm ? rms_scale(x + m * n, n, s->eps) : 1;
        for (int64_t i = from * 128; i < to * 128; i++)
            plain[m * padded + i] = i >= n ? 0 : norm ? x[m * n + i] * scale * load_as_float(norm, i, s->type) : x[m * n + i];
        lay_out(plain + m * padded, (char *)laid + m * padded * (pairs ? 2 : 4), from, to, pairs);
    }
#pragma omp barrier
}

static void turn(const step_t *s, float *x)
{
    int64_t half = s->head / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * s->cos[i] - b * s->sin[i];
        x[half + i] = b * s->cos[i] + a * s->sin[i];
    }
}

/* One query head against its cached keys and values from place `first` on: q [D] -> out [D]. */
static void attend_portable(
    const step_t *s, const float *q, const void *keys, const void *values, int64_t first, float *p, float *out)
{
    const int64_t seen = s->length + 1 - first, size = s->head, at = first * size;
    const float scale = 1 / sqrtf((float)size);
    float peak = -INFINITY, sum = 0;
    for (int64_t t = 0; t < seen; t++) {
        float z = 0;
        for (int64_t i = 0; i < size; i++) z += q[i] * load_as_float(keys, at + t * size + i, s->type);
        p[t] = z * scale;
        peak = p[t] > peak ? p[t] : peak;
    }
    for (int64_t i = 0; i < size; i++) out[i] = 0;
    for (int64_t t = 0; t < seen; t++) {
        float e = expf(p[t] - peak);
        sum += e;
        for (int64_t i = 0; i < size; i++) out[i] += e * load_as_float(values, at + t * size + i, s->type);
    }
    for (int64_t i = 0; i < size; i++) out[i] /= sum;
}

#ifdef JINDO_X86
AVX512 static void attend_avx512(
    const step_t *s, const float *q, const void *keys, const void *values, int64_t first, float *p, float *out)
{
    const int64_t seen = s->length + 1 - first, size = s->head, at = first * size;
    const float scale = 1 / sqrtf((float)size);
    float peak = -INFINITY, sum = 0;
    for (int64_t t = 0; t < seen; t++) {
        __m512 z = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += 16)
            z = _mm512_fmadd_ps(_mm512_loadu_ps(q + i), load16(keys, at + t * size + i, s->type), z);
        p[t] = _mm512_reduce_add_ps(z) * scale;
        peak = p[t] > peak ? p[t] : peak;
    }
    for (int64_t t = 0; t < seen; t += 16) {
        __mmask16 lanes = seen - t >= 16 ? 0xffff : (__mmask16)((1 << (seen - t)) - 1);
        __m512 e = exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, p + t), _mm512_set1_ps(peak)));
        _mm512_mask_storeu_ps(p + t, lanes, e);
        sum += _mm512_mask_reduce_add_ps(lanes, e);
    }
    for (int64_t i = 0; i < size; i += 16) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t t = 0; t < seen; t++)
            total = _mm512_fmadd_ps(_mm512_set1_ps(p[t]), load16(values, at + t * size + i, s->type), total);
        _mm512_storeu_ps(out + i, _mm512_div_ps(total, _mm512_set1_ps(sum)));
    }
}
#endif

/* Turns and stores the new keys, stores the new values, and attends: by key/value heads. q is overwritten. */
static void attend(const step_t *s, const layer_t *l, float *q, float *k, const float *v, float *p, int thread)
{
    void (*one)(const step_t *, const float *, const void *, const void *, int64_t, float *, float *) = attend_portable;
#ifdef JINDO_X86
    if (jindo_level_in_use == LEVEL_AVX512 && s->head % 16 == 0) one = attend_avx512;
#endif
    const int64_t size = s->head, shared = s->heads / s->groups, bytes = s->type == FP32 ? 4 : 2;
    const int64_t start = s->length + 1 > l->window ? s->length + 1 - l->window : 0;
    float *result = p + s->capacity;
    for (int64_t i = thread; i < s->rows * s->groups; i += s->threads) {
        char *keys = (char *)l->keys + i * s->capacity * size * bytes;
        char *values = (char *)l->values + i * s->capacity * size * bytes;
        turn(s, k + i * size);
        for (int64_t d = 0; d < size; d++) {
            store_float(keys, s->length * size + d, s->type, k[i * size + d]);
            store_float(values, s->length * size + d, s->type, v[i * size + d]);
        }
        for (int64_t h = i * shared; h < (i + 1) * shared; h++) { /* [rows][H] and [rows][G] run alike */
            turn(s, q + h * size);
            one(s, q + h * size, keys, values, start, p, result);
            memcpy(q + h * size, result, (size_t)size * sizeof(float));
        }
    }
#pragma omp barrier
}

static void add_rows(const step_t *s, const float *from, int thread)
{
    const int64_t n = s->rows * s->width;
    for (int64_t i = thread * n / s->threads; i < (thread + 1) * n / s->threads; i++) s->x[i] += from[i];
#pragma omp barrier
}

static void decode_thread(const step_t *s, rows_t *run, int pairs, int thread)
{
    const int64_t size = s->rows * widest(s);
    float *plain = s->work, *laid = plain + size, *first = laid + size, *second = first + size, *third = second + size;
    float *down = third + size, *p = s->work + jindo_decode_work(s, 0) - 64 - s->threads * (s->capacity + s->head);
    int64_t rank = 0;
    for (int64_t i = 0; i < s->layers; i++)
        for (int m = 0; m < MATRICES; m++) rank = s->layer[i].m[m].rank > rank ? s->layer[i].m[m].rank : rank;
    p += 3 * rank * s->rows + thread * (s->capacity + s->head);
    for (int64_t i = 0; i < s->layers; i++) {
        const layer_t *l = s->layer + i;
        prepare(s, s->x, l->attention_norm, s->width, plain, laid, pairs, thread);
        multiply(s, l->m + Q, 3, plain, laid, down, (float *[]){first, second, third}, run, pairs, thread);
#pragma omp barrier
        attend(s, l, first, second, third, p, thread);
        prepare(s, first, NULL, s->heads * s->head, plain, laid, pairs, thread);
        multiply(s, l->m + O, 1, plain, laid, down, (float *[]){second}, run, pairs, thread);
#pragma omp barrier
        add_rows(s, second, thread);
        prepare(s, s->x, l->mlp_norm, s->width, plain, laid, pairs, thread);
        multiply(s, l->m + GATE, 2, plain, laid, down, (float *[]){first, second}, run, pairs, thread);
#pragma omp barrier
        const int64_t inner = s->rows * s->inner;
        for (int64_t n = thread * inner / s->threads; n < (thread + 1) * inner / s->threads; n++)
            first[n] = first[n] / (1 + expf(-first[n])) * second[n];
#pragma omp barrier
        prepare(s, first, NULL, s->inner, plain, laid, pairs, thread);
        multiply(s, l->m + DOWN, 1, plain, laid, down, (float *[]){second}, run, pairs, thread);
#pragma omp barrier
        add_rows(s, second, thread);
    }
}

/* --- the head: a GEMV of the activations' type ---------------------------------------------------------- */

static float dot_portable(const float *x, const void *w, int64_t at, int64_t n, int type)
{
    float sum[16] = {0}, total = 0;
    for (int64_t i = 0; i < n; i++) sum[i & 15] += x[i] * load_as_float(w, at + i, type);
    for (int lane = 0; lane < 16; lane++) total += sum[lane];
    return total;
}

#ifdef JINDO_X86
AVX512 static float dot_avx512(const float *x, const void *w, int64_t at, int64_t n, int type)
{
    __m512 a = _mm512_setzero_ps(), b = a;
    int64_t i = 0;
    const char *ahead = (const char *)w + at * (type == FP32 ? 4 : 2) + 16384;
    for (int64_t byte = 0; byte < n * (type == FP32 ? 4 : 2); byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T0);
    for (; i + 32 <= n; i += 32) {
        a = _mm512_fmadd_ps(_mm512_loadu_ps(x + i), load16(w, at + i, type), a);
        b = _mm512_fmadd_ps(_mm512_loadu_ps(x + i + 16), load16(w, at + i + 16, type), b);
    }
    float total = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
    for (; i < n; i++) total += x[i] * load_as_float(w, at + i, type);
    return total;
}
#endif

static void head_thread(const step_t *s, int thread)
{
    float (*product)(const float *, const void *, int64_t, int64_t, int) = dot_portable;
#ifdef JINDO_X86
    if (jindo_level_in_use == LEVEL_AVX512) product = dot_avx512;
#endif
    float *normal = s->work;
    for (int64_t m = thread; m < s->rows; m += s->threads) {
        float scale = rms_scale(s->x + m * s->width, s->width, s->eps);
        for (int64_t i = 0; i < s->width; i++)
            normal[m * s->width + i] = s->x[m * s->width + i] * scale * load_as_float(s->norm, i, s->type);
    }
#pragma omp barrier
    const int64_t share = (s->vocabulary + s->threads - 1) / s->threads, first = thread * share;
    for (int64_t v = first; v < first + share && v < s->vocabulary; v++)
        for (int64_t m = 0; m < s->rows; m++)
            s->logits[m * s->vocabulary + v] = product(normal + m * s->width, s->lm_head, v * s->width, s->width, s->type);
}

/* Returns 0, having done nothing, where the runtime gives fewer threads than s->threads. */
EXPORT int jindo_decode(const step_t *s)
{
    const int pairs = uses_pairs(s->type);
    rows_t *run = choose(s->rows, pairs);
    int done = 0;
#pragma omp parallel num_threads(s->threads)
    if (omp_get_num_threads() == s->threads) {
        decode_thread(s, run, pairs, omp_get_thread_num());
        head_thread(s, omp_get_thread_num());
#pragma omp atomic write
        done = 1;
    }
    return done;
}
