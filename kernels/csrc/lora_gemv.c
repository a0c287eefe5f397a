/* y = x W^T + s (x A^T) B^T for a few rows of x, W in NF4: decoding. Contract: ../lora_matmul.py. */
#include "gemv.h"

/* x [M][K] as floats, once as it is and once as the codes lie. wide: 2 * M * padded floats. */
EXPORT void jindo_gemv_lay_out(const void *x, int type, int64_t rows, int64_t in, float *wide)
{
    const int64_t padded = (in + 127) / 128 * 128;
    const int pairs = uses_pairs(type);
    for (int64_t m = 0; m < rows; m++) {
        float *plain = wide + m * padded;
        char *laid = (char *)(wide + rows * padded) + m * padded * (pairs ? 2 : 4);
        for (int64_t i = 0; i < in; i++) plain[i] = load_as_float(x, m * in + i, type);
        memset(plain + in, 0, (size_t)(padded - in) * sizeof(float));
        lay_out(plain, laid, 0, padded / 128, pairs);
    }
}

/* wide: what jindo_gemv_lay_out made of x. down: [M][rank] floats, filled here. */
EXPORT void jindo_lora_gemv(
    const float *wide, int64_t rows, int64_t in, int64_t out, const uint8_t *codes, const void *absmax,
    const float *nested, const float *offset, const float *map, int64_t block_size, const float *a, const float *b,
    int64_t rank, float scale, float *down, void *y, int64_t y_stride, int type, int threads)
{
    const int64_t padded = (in + 127) / 128 * 128;
    const job_t job = {rows, in, out, codes, absmax, nested, offset, map, block_size / 64,
                       wide + rows * padded, uses_pairs(type), padded, down, b, rank, scale, y, y_stride, type};
    rows_t *run = choose(rows, job.pairs);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rank * rows; i++)
            down[i] = dot(wide + i / rank * padded, a + i % rank * in, in);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < out; n += 32) run(&job, n, n + 32 < out ? n + 32 : out);
    }
}
