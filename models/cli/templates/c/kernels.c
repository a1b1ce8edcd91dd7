/* A kernel plugin to start from: it reads canonical weights where they lie, in a memory-mapped file for
 * example, with AVX2 where the processor has it, and in plain C where not.
 *
 * A block of the canonical layout holds 128 weights in 32 bytes: byte i holds weights i, 32 + i, 64 + i and
 * 96 + i in bits 7..6, 5..4, 3..2 and 1..0. So the codes at the same bits of a 32-byte vector belong to 32
 * activations that follow each other: shift, mask, multiply.
 *
 * Codes are u = c + 1 in {0, 1, 2}, unsigned as vpmaddubsw wants one side to be. The host gives the sum of
 * each row of activations, and sum(q * c) = sum(q * u) - sum(q).
 *
 * Rows are padded to whole blocks with u = 1, and activations with zeros to a multiple of 64 only: the
 * second half of the last block may have no activations, and must be left out then. */
#include "bitnet_plugin.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BLOCK 128
#define BLOCK_BYTES 32

static int32_t supports(const bitnet_signature_t *s) {
    return s->operation == BITNET_OPERATION_TERNARY_MATMUL;
}

/* Sums of codes times activations: `rows` rows of weights, `width` bytes apart, and `count` rows of
 * activations, `stride` bytes apart, as long. sums[r * 4 + m]. */
typedef void multiply_t(const uint8_t *w, uint64_t width, int rows, const int8_t *x, uint64_t stride, int count,
                        int32_t *sums);

/* The loop over a tile: two rows of weights at a time share the activations that are loaded, four rows of
 * activations share the codes that are unpacked. */
static inline bitnet_status_t tile(const bitnet_weights_t *w, const bitnet_activations_t *x,
                                   const bitnet_output_t *y, const bitnet_tile_t *t, multiply_t *multiply) {
    uint64_t width = bitnet_canonical_row_bytes(w->k);
    for (uint64_t n = t->n0; n < t->n1; n += 2) {
        int rows = t->n1 - n < 2 ? 1 : 2;
        for (uint64_t m = t->m0; m < t->m1; m += 4) {
            int count = t->m1 - m < 4 ? (int)(t->m1 - m) : 4;
            int32_t sums[8];
            multiply(w->data + n * width, width, rows, x->q + m * x->stride, x->stride, count, sums);
            for (int i = 0; i < count; i++) {
                /* Two products, in this order. */
                float scale = w->scale * x->scale[m + i];
                for (int r = 0; r < rows; r++)
                    y->y[(m + i) * y->stride + n + r] = (float)(sums[r * 4 + i] - x->sum[m + i]) * scale;
            }
        }
    }
    return BITNET_OK;
}

static void multiply_portable(const uint8_t *w, uint64_t width, int rows, const int8_t *x, uint64_t stride,
                              int count, int32_t *sums) {
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < count; m++) {
            int32_t sum = 0;
            for (uint64_t base = 0; base < stride; base += BLOCK) {
                const uint8_t *codes = w + r * width + base / BLOCK * BLOCK_BYTES;
                const int8_t *q = x + m * stride + base;
                int groups = stride - base < BLOCK ? 2 : 4;
                for (int g = 0; g < groups; g++)
                    for (int i = 0; i < 32; i++) sum += (codes[i] >> (6 - 2 * g) & 3) * q[32 * g + i];
            }
            sums[r * 4 + m] = sum;
        }
}

static bitnet_status_t run_portable(const bitnet_weights_t *w, const bitnet_activations_t *x,
                                    const uint8_t *workspace, const bitnet_output_t *y, const bitnet_tile_t *t,
                                    const bitnet_message_t *message) {
    (void)workspace, (void)message;
    return tile(w, x, y, t, multiply_portable);
}

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2")))
/* Blocks until 16-bit sums must be widened: each block adds four pairs of at most 2 * 128 to a lane, 2048 in
 * magnitude, and 16 times that is just within range. */
#define FLUSH 16

AVX2 static inline int32_t horizontal(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(s);
}

AVX2 static inline __m256i load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* `rows` and `count` are constants where this is inlined. */
AVX2 static inline __attribute__((always_inline)) void multiply_fixed(const uint8_t *w, uint64_t width, int rows,
                                                                     const int8_t *x, uint64_t stride, int count,
                                                                     int32_t *sums) {
    const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i wide[2][4], narrow[2][4];
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < count; m++) wide[r][m] = _mm256_setzero_si256();
    uint64_t whole = stride / BLOCK;
    for (uint64_t start = 0; start < whole; start += FLUSH) {
        uint64_t end = start + FLUSH < whole ? start + FLUSH : whole;
        for (int r = 0; r < rows; r++)
            for (int m = 0; m < count; m++) narrow[r][m] = _mm256_setzero_si256();
        for (uint64_t b = start; b < end; b++) {
            __m256i codes[2];
            for (int r = 0; r < rows; r++) {
                codes[r] = load(w + r * width + b * BLOCK_BYTES);
                /* A prefetch may have any address. */
                _mm_prefetch((const char *)(w + r * width + b * BLOCK_BYTES + 1024), _MM_HINT_T0);
            }
            /* From the last group to the first: the codes come from the low bits up. */
            for (int g = 3; g >= 0; g--)
                for (int r = 0; r < rows; r++) {
                    __m256i low = _mm256_and_si256(codes[r], mask);
                    codes[r] = _mm256_srli_epi16(codes[r], 2);
                    for (int m = 0; m < count; m++)
                        narrow[r][m] = _mm256_add_epi16(
                            narrow[r][m], _mm256_maddubs_epi16(low, load(x + m * stride + b * BLOCK + 32 * g)));
                }
        }
        for (int r = 0; r < rows; r++)
            for (int m = 0; m < count; m++)
                wide[r][m] = _mm256_add_epi32(wide[r][m], _mm256_madd_epi16(narrow[r][m], ones));
    }
    if (stride % BLOCK)
        /* Half a block: groups 0 and 1, at the high bits. */
        for (int r = 0; r < rows; r++) {
            __m256i codes = load(w + r * width + whole * BLOCK_BYTES);
            __m256i high[2] = {_mm256_and_si256(_mm256_srli_epi16(codes, 6), mask),
                               _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask)};
            for (int m = 0; m < count; m++)
                for (int g = 0; g < 2; g++) {
                    __m256i products = _mm256_maddubs_epi16(high[g], load(x + m * stride + whole * BLOCK + 32 * g));
                    wide[r][m] = _mm256_add_epi32(wide[r][m], _mm256_madd_epi16(products, ones));
                }
        }
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < count; m++) sums[r * 4 + m] = horizontal(wide[r][m]);
}

AVX2 static void multiply_avx2(const uint8_t *w, uint64_t width, int rows, const int8_t *x, uint64_t stride,
                               int count, int32_t *sums) {
    if (rows == 2 && count == 4)
        multiply_fixed(w, width, 2, x, stride, 4, sums);
    else if (rows == 2 && count == 1)
        multiply_fixed(w, width, 2, x, stride, 1, sums);
    else
        for (int r = 0; r < rows; r++)
            for (int m = 0; m < count; m++)
                multiply_fixed(w + r * width, width, 1, x + m * stride, stride, 1, sums + r * 4 + m);
}

static bitnet_status_t run_avx2(const bitnet_weights_t *w, const bitnet_activations_t *x, const uint8_t *workspace,
                                const bitnet_output_t *y, const bitnet_tile_t *t, const bitnet_message_t *message) {
    (void)workspace, (void)message;
    return tile(w, x, y, t, multiply_avx2);
}

static const bitnet_kernel_t avx2 = {
    .struct_size = sizeof avx2,
    .name = "avx2",
    /* The host calls run only where the processor has them. */
    .features = "avx2",
    .operation = BITNET_OPERATION_TERNARY_MATMUL,
    .target = BITNET_TARGET_CPU,
    .weight_alignment = BITNET_CANONICAL_ALIGNMENT,
    .row_granule = 2,
    .supports = supports,
    .run = run_avx2,
};

#endif

static const bitnet_kernel_t portable = {
    .struct_size = sizeof portable,
    .name = "portable",
    .operation = BITNET_OPERATION_TERNARY_MATMUL,
    .target = BITNET_TARGET_CPU,
    .weight_alignment = BITNET_CANONICAL_ALIGNMENT,
    .row_granule = 2,
    .supports = supports,
    .run = run_portable,
};

static const bitnet_kernel_t *const kernels[] = {
#if defined(__x86_64__)
    &avx2,
#endif
    &portable,
};

static const bitnet_plugin_t plugin = {
    .struct_size = sizeof plugin,
    .abi_major = BITNET_ABI_MAJOR,
    .abi_minor = BITNET_ABI_MINOR,
    .name = "example-c",
    .version = "0.1.0",
    .kernels = kernels,
    .kernel_count = sizeof kernels / sizeof *kernels,
};

const bitnet_plugin_t *bitnet_plugin(void) { return &plugin; }
