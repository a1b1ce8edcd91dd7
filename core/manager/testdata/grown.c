/* What ABI 1.3 added: the second entry point, kernels with a context and scratch, a public layout, reasons, and kernels
 * that a host of 1.3 does not know. Macros turn on mistakes. */
#include "bitnet_plugin.h"

#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Of two kernels that share their functions: bytes in front of each packed row, which hold the mark. */
struct padding {
    uint64_t bytes;
    uint8_t mark;
};
static const struct padding three = {3, 0xa3}, five = {5, 0xa5};

static int32_t supports(const bitnet_signature_t *s) {
    return s->operation == BITNET_OPERATION_TERNARY_MATMUL && s->context != NULL;
}

static uint64_t packed_size_of(const bitnet_signature_t *s) {
    return s->n * (((const struct padding *)s->context)->bytes + s->k);
}

static bitnet_status_t pack(const bitnet_weights_t *w, uint8_t *packed, uint64_t n0, uint64_t n1,
                            const bitnet_message_t *message) {
    const struct padding *padding = message->context;
    for (uint64_t n = n0; n < n1; n++) {
        uint8_t *row = packed + n * (padding->bytes + w->k);
        memset(row, padding->mark, padding->bytes);
        for (uint64_t k = 0; k < w->k; k++)
            row[padding->bytes + k] = (uint8_t)(bitnet_canonical_weight(w->data + n * bitnet_canonical_row_bytes(w->k), k) + 1);
    }
    return BITNET_OK;
}

static bitnet_status_t unpack(const bitnet_weights_t *w, uint8_t *canonical, uint64_t n0, uint64_t n1,
                              const bitnet_message_t *message) {
    const struct padding *padding = message->context;
    uint64_t bytes = bitnet_canonical_row_bytes(w->k);
    for (uint64_t n = n0; n < n1; n++) {
        uint8_t *out = canonical + n * bytes;
        const uint8_t *row = w->data + n * (padding->bytes + w->k);
        if (row[0] != padding->mark) return BITNET_INVALID_ARGUMENT;
        memset(out, 0x55, bytes);
        for (uint64_t k = 0; k < w->k; k++) {
            int shift = 6 - 2 * (int)(k % 128 / 32);
            uint8_t *byte = out + k / 128 * 32 + k % 32;
            *byte = (uint8_t)((*byte & ~(3 << shift)) | row[padding->bytes + k] << shift);
        }
    }
    return BITNET_OK;
}

/* The tile's number is the only thing that scratch is for here: sums go through it. */
static uint64_t scratch_size(const bitnet_signature_t *s) {
#ifdef SCRATCH
    return (void)s, SCRATCH;
#else
    return s->context ? 4 * s->n : 0;
#endif
}

static bitnet_status_t run(const bitnet_weights_t *w, const bitnet_activations_t *x, const uint8_t *workspace,
                           const bitnet_output_t *y, const bitnet_tile_t *tile, const bitnet_message_t *message) {
    const struct padding *padding = message->context;
    int32_t *sums = (int32_t *)tile->scratch;
    (void)workspace;
    if (!sums || tile->scratch_size != 4 * w->n || (uintptr_t)sums % 64) return BITNET_INVALID_ARGUMENT;
    for (uint64_t m = tile->m0; m < tile->m1; m++) {
        for (uint64_t n = tile->n0; n < tile->n1; n++) {
            const uint8_t *row = w->data + n * (padding->bytes + w->k);
            if (row[0] != padding->mark) return BITNET_INVALID_ARGUMENT;
            sums[n] = 0;
            for (uint64_t k = 0; k < w->k; k++)
                sums[n] += (row[padding->bytes + k] - 1) * x->q[m * x->stride + k];
        }
#ifdef BEHIND_SCRATCH
        sums[w->n] = 0;
#endif
        for (uint64_t n = tile->n0; n < tile->n1; n++) {
            float scale = w->scale * x->scale[m];
            y->y[m * y->stride + n] = (float)sums[n] * scale;
        }
    }
    return BITNET_OK;
}

/* For prompts, on a public layout that the host packs. */
static int32_t supports_prompts(const bitnet_signature_t *s) {
    if (s->operation == BITNET_OPERATION_TERNARY_MATMUL && s->m >= 17) return 1;
    if (s->message) snprintf(s->message->text, s->message->capacity, "it is for prompts of 17 rows or more");
    return 0;
}

static bitnet_status_t run_t2(const bitnet_weights_t *w, const bitnet_activations_t *x, const uint8_t *workspace,
                              const bitnet_output_t *y, const bitnet_tile_t *tile, const bitnet_message_t *message) {
    (void)workspace, (void)message;
    for (uint64_t m = tile->m0; m < tile->m1; m++)
        for (uint64_t n = tile->n0; n < tile->n1; n++) {
            int32_t sum = 0;
            for (uint64_t k = 0; k < w->k; k++)
                sum += bitnet_t2x32_weight(w->data, w->k, n, k) * x->q[m * x->stride + k];
            float scale = w->scale * x->scale[m];
            y->y[m * y->stride + n] = (float)sum * scale;
        }
    return BITNET_OK;
}

static bitnet_status_t run_t5(const bitnet_weights_t *w, const bitnet_activations_t *x, const uint8_t *workspace,
                              const bitnet_output_t *y, const bitnet_tile_t *tile, const bitnet_message_t *message) {
    (void)workspace, (void)message;
    for (uint64_t m = tile->m0; m < tile->m1; m++)
        for (uint64_t n = tile->n0; n < tile->n1; n++) {
            int32_t sum = 0;
            for (uint64_t k = 0; k < w->k; k++)
                sum += bitnet_t5x32_weight(w->data, w->k, n, k) * x->q[m * x->stride + k];
            float scale = w->scale * x->scale[m];
            y->y[m * y->stride + n] = (float)sum * scale;
        }
    return BITNET_OK;
}

#if defined(__x86_64__)
/* As run_t2, in vectors of eight rows: four weights of each meet four activations. 32 rows and 4 rows of activations at a
 * time. Codes are one more than weights, so the sum of the activations is subtracted. */
__attribute__((target("avx2"))) static bitnet_status_t
run_t2_avx2(const bitnet_weights_t *w, const bitnet_activations_t *x, const uint8_t *workspace, const bitnet_output_t *y,
            const bitnet_tile_t *tile, const bitnet_message_t *message) {
    uint64_t steps = (w->k + 15) / 16;
    const __m256i mask = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    (void)workspace, (void)message;
    for (uint64_t n0 = tile->n0; n0 < tile->n1; n0 += 32)
        for (uint64_t m0 = tile->m0; m0 < tile->m1; m0 += 4) {
            int count = tile->m1 - m0 < 4 ? (int)(tile->m1 - m0) : 4;
            for (int rows = 0; rows < 4; rows++) {
                const uint8_t *data = w->data + n0 / 32 * steps * 128 + rows * 32;
                __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                                   _mm256_setzero_si256()};
                for (uint64_t j = 0; j < steps; j++) {
                    __m256i codes = _mm256_loadu_si256((const __m256i *)(data + j * 128));
                    for (int t = 0; t < 4; t++) {
                        __m256i low = _mm256_and_si256(codes, mask);
                        for (int m = 0; m < 4; m++) {
                            int32_t four;
                            memcpy(&four, x->q + (m0 + (m < count ? m : 0)) * x->stride + j * 16 + 4 * t, 4);
                            __m256i products = _mm256_maddubs_epi16(low, _mm256_set1_epi32(four));
                            sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(products, ones));
                        }
                        codes = _mm256_srli_epi16(codes, 2);
                    }
                }
                for (int m = 0; m < count; m++) {
                    int32_t lanes[8];
                    _mm256_storeu_si256((__m256i *)lanes, sums[m]);
                    float scale = w->scale * x->scale[m0 + m];
                    for (uint64_t r = 0; r < 8 && n0 + rows * 8 + r < tile->n1; r++)
                        y->y[(m0 + m) * y->stride + n0 + rows * 8 + r] = (float)(lanes[r] - x->sum[m0 + m]) * scale;
                }
            }
        }
    return BITNET_OK;
}
#endif

#define PADDED(variable, text, padding)                                                                                \
    static const bitnet_kernel_t variable = {                                                                          \
        .struct_size = sizeof(bitnet_kernel_t),                                                                        \
        .name = text,                                                                                                  \
        .layout = text,                                                                                                \
        .operation = BITNET_OPERATION_TERNARY_MATMUL,                                                                  \
        .target = BITNET_TARGET_CPU,                                                                                   \
        .weight_alignment = 1,                                                                                         \
        .row_granule = 1,                                                                                              \
        .supports = supports,                                                                                          \
        .pack = pack,                                                                                                  \
        .unpack = unpack,                                                                                              \
        .run = run,                                                                                                    \
        .context = padding,                                                                                            \
        .packed_size_of = packed_size_of,                                                                              \
        .scratch_size = scratch_size,                                                                                  \
    }
PADDED(kernel_three, "three", &three);
PADDED(kernel_five, "five", &five);

#ifndef PUBLIC_GRANULE
#define PUBLIC_GRANULE 32
#endif
#define PUBLIC(variable, text, of, function, asks)                                                                     \
    static const bitnet_kernel_t variable = {                                                                          \
        .struct_size = sizeof(bitnet_kernel_t),                                                                        \
        .name = text,                                                                                                  \
        .layout = of,                                                                                                  \
        .operation = BITNET_OPERATION_TERNARY_MATMUL,                                                                  \
        .target = BITNET_TARGET_CPU,                                                                                   \
        .weight_alignment = 64,                                                                                        \
        .row_granule = PUBLIC_GRANULE,                                                                                 \
        .supports = asks,                                                                                              \
        .run = function,                                                                                               \
    }
static int32_t supports_all(const bitnet_signature_t *s) { return s->operation == BITNET_OPERATION_TERNARY_MATMUL; }
PUBLIC(kernel_t2, "t2-plain", BITNET_LAYOUT_T2X32, run_t2, supports_all);
PUBLIC(kernel_t5, "t5-plain", BITNET_LAYOUT_T5X32, run_t5, supports_all);
#if defined(__x86_64__)
PUBLIC(kernel_prompts, "t2-prompts", BITNET_LAYOUT_T2X32, run_t2_avx2, supports_prompts);
#else
PUBLIC(kernel_prompts, "t2-prompts", BITNET_LAYOUT_T2X32, run_t2, supports_prompts);
#endif
PUBLIC(kernel_later_layout, "later-layout", "cpu/t9x64", run_t2, supports_all);

/* Whatever its fields mean in the version that has this operation. */
static const bitnet_kernel_t kernel_later = {
    .struct_size = sizeof(bitnet_kernel_t) + 64,
    .name = "later",
    .layout = "none-that-packs",
    .operation = 99,
    .target = BITNET_TARGET_CPU,
    .weight_alignment = 48,
    .row_granule = 0,
};

static const bitnet_kernel_t *const all[] = {&kernel_three,   &kernel_five,         &kernel_t2,   &kernel_t5,
                                             &kernel_prompts, &kernel_later_layout, &kernel_later};
static const bitnet_kernel_t *const prompts[] = {&kernel_prompts};

static bitnet_plugin_t plugin = {
    .struct_size = sizeof plugin,
    .abi_major = BITNET_ABI_MAJOR,
    .abi_minor = BITNET_ABI_MINOR,
    .name = "grown",
    .version = "1.0",
    .kernels = all,
    .kernel_count = sizeof all / sizeof *all,
};

#ifndef ONLY_FOR_HOST
const bitnet_plugin_t *bitnet_plugin(void) { return NULL; /* a host of 1.3 asks the other one */ }
#endif

const bitnet_plugin_t *bitnet_plugin_for_host(const bitnet_host_t *host) {
    char line[256];
    snprintf(line, sizeof line, "bitnet-burn %s, ABI %u.%u, configured as '%s'\n%s", host->version, host->abi_major,
             host->abi_minor, host->configuration, strlen(host->cpu_features) ? "with features" : "without features");
    host->log(host, BITNET_LOG_INFO, line);
    if (!strcmp(host->configuration, "grown.only=prompts")) {
        plugin.kernels = prompts;
        plugin.kernel_count = 1;
    }
    return &plugin;
}
