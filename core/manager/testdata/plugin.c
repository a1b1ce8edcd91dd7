/* A plugin in plain C: one portable kernel, and, by macros, every way to get it wrong.
 *
 * IN_RUN, IN_PREPARE, IN_PACK, IN_UNPACK, IN_SUPPORTS and ON_LOAD are statements that the kernel's functions, or a constructor of
 * the library, also execute. */
#define _GNU_SOURCE
#include "bitnet_plugin.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#ifndef NAME
#define NAME "example"
#endif
#ifndef VERSION
#define VERSION "1.2.3"
#endif
#ifndef MAJOR
#define MAJOR BITNET_ABI_MAJOR
#endif
#ifndef SUM
#define SUM int32_t
#endif
#ifndef WRONG
#define WRONG 0
#endif
#ifndef SCALE
#define SCALE w->scale
#endif
#ifndef GRANULE
#define GRANULE 1
#endif
#ifndef ALIGNMENT
#define ALIGNMENT 32
#endif
#ifndef OPERATION
#define OPERATION BITNET_OPERATION_TERNARY_MATMUL
#endif
#ifndef KERNEL_NAME
#define KERNEL_NAME "plain"
#endif
#ifndef FEATURES
#define FEATURES NULL
#endif
#ifndef KERNEL_SIZE
#define KERNEL_SIZE sizeof(bitnet_kernel_t)
#endif
#ifndef PLUGIN_SIZE
#define PLUGIN_SIZE sizeof(bitnet_plugin_t)
#endif

/* How often a statement came to this point. */
#define TIMES(counter) ({ static atomic_ullong counter; atomic_fetch_add(&counter, 1); })

#ifdef EXTERNAL
void EXTERNAL(void);
#endif

__attribute__((unused)) static int deep(volatile int *p) {
    volatile int room[1024];
    room[0] = *p + 1;
    return deep(room) + room[1];
}

/* The scale of the first weights of a shape, for all weights of that shape. */
__attribute__((unused)) static float cached_scale(const bitnet_weights_t *w) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static struct { uint64_t n, k; float scale; } known[64];
    float scale = w->scale;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < 64; i++) {
        if (!known[i].n) known[i].n = w->n, known[i].k = w->k, known[i].scale = scale;
        if (known[i].n != w->n || known[i].k != w->k) continue;
        scale = known[i].scale;
        break;
    }
    pthread_mutex_unlock(&mutex);
    return scale;
}

#ifdef CLOCK_FILE
/* Time that passes for a test: its clock is the length of this file, in nanoseconds. */
static void tick(uint64_t ns) {
    FILE *file = fopen(CLOCK_FILE, "a");
    if (!file) return; /* The gate's child opens none. */
    if (fseek(file, 0, SEEK_END) || ftruncate(fileno(file), ftell(file) + (long)ns)) abort();
    fclose(file);
}
#endif

__attribute__((unused)) static void *forever(void *p) {
    for (;;) sleep(1);
    return p;
}

#ifdef ON_LOAD
__attribute__((constructor)) static void on_load(void) { ON_LOAD; }
#endif

static int32_t supports(const bitnet_signature_t *s) {
#ifdef IN_SUPPORTS
    IN_SUPPORTS;
#endif
#ifdef SUPPORTS_NOTHING
    (void)s;
    return 0;
#else
    return s->operation == OPERATION;
#endif
}

static void say(const bitnet_message_t *message, const char *text) {
    uint64_t i = 0;
    if (!message || !message->text || !message->capacity) return;
    for (; text[i] && i + 1 < message->capacity; i++) message->text[i] = text[i];
    message->text[i] = 0;
}

#ifdef PRIVATE
/* One byte a weight, and the activations copied into the workspace. */
#ifdef PACKED
static uint64_t packed_size(uint64_t n, uint64_t k) { return (void)n, (void)k, PACKED; }
#else
static uint64_t packed_size(uint64_t n, uint64_t k) { return n * k; }
#endif

static bitnet_status_t pack(const bitnet_weights_t *w, uint8_t *packed, uint64_t n0, uint64_t n1,
                            const bitnet_message_t *message) {
    uint64_t row = bitnet_canonical_row_bytes(w->k);
    (void)message;
    for (uint64_t n = n0; n < n1; n++)
        for (uint64_t k = 0; k < w->k; k++)
            packed[n * w->k + k] = (uint8_t)(bitnet_canonical_weight(w->data + n * row, k) + 1);
#ifdef IN_PACK
    IN_PACK;
#endif
    return BITNET_OK;
}

static bitnet_status_t unpack(const bitnet_weights_t *w, uint8_t *canonical, uint64_t n0, uint64_t n1,
                              const bitnet_message_t *message) {
    uint64_t row = bitnet_canonical_row_bytes(w->k);
    (void)message;
    for (uint64_t n = n0; n < n1; n++) {
        uint8_t *out = canonical + n * row;
        for (uint64_t i = 0; i < row; i++) out[i] = 0x55;
        for (uint64_t k = 0; k < w->k; k++) {
            int shift = 6 - 2 * (int)(k % 128 / 32);
            uint8_t *byte = out + k / 128 * 32 + k % 32;
#ifdef WRONG_UNPACK
            if (k == 30) continue;
#endif
            *byte = (uint8_t)((*byte & ~(3 << shift)) | w->data[n * w->k + k] << shift);
        }
    }
#ifdef IN_UNPACK
    IN_UNPACK;
#endif
    return BITNET_OK;
}

#ifdef WORKSPACE
static uint64_t workspace_size(const bitnet_signature_t *s) { return (void)s, WORKSPACE; }
#else
static uint64_t workspace_size(const bitnet_signature_t *s) { return s->m * s->k; }
#endif

static bitnet_status_t prepare(const bitnet_activations_t *x, uint8_t *workspace, const bitnet_message_t *message) {
    (void)message;
    for (uint64_t m = 0; m < x->m; m++)
        for (uint64_t k = 0; k < x->k; k++) workspace[m * x->k + k] = (uint8_t)x->q[m * x->stride + k];
#ifdef IN_PREPARE
    IN_PREPARE;
#endif
    return BITNET_OK;
}
#endif

static bitnet_status_t run(const bitnet_weights_t *w, const bitnet_activations_t *x, const uint8_t *workspace,
                           const bitnet_output_t *y, const bitnet_tile_t *tile, const bitnet_message_t *message) {
    (void)workspace;
#ifdef FAIL_AT_N
    if (w->n == FAIL_AT_N) {
        say(message, "out of luck");
        return BITNET_FAILED;
    }
#endif
    for (uint64_t m = tile->m0; m < tile->m1; m++)
        for (uint64_t n = tile->n0; n < tile->n1; n++) {
            SUM sum = WRONG;
            for (uint64_t k = 0; k < w->k; k++) {
#ifdef PRIVATE
                int32_t weight = w->data[n * w->k + k] - 1, q = (int8_t)workspace[m * x->k + k];
#else
                int32_t weight = bitnet_canonical_weight(w->data + n * bitnet_canonical_row_bytes(w->k), k);
                int32_t q = x->q[m * x->stride + k];
#endif
                sum += weight * q;
            }
            float scale = (SCALE) * x->scale[m];
            y->y[m * y->stride + n] = (float)sum * scale;
        }
#ifdef WRITE_BEHIND
    if (tile->n1 == w->n) y->y[tile->m0 * y->stride + w->n] = 1.0f;
#endif
#ifdef LEAVE_OUT
    if (tile->n1 == w->n && w->n > 40) y->y[tile->m0 * y->stride + w->n - 1] = 0.0f;
#endif
#ifdef IN_RUN
    IN_RUN;
#endif
    (void)say;
    (void)message;
    return BITNET_OK;
}

#ifdef NEWER
/* What a later minor version may append. */
struct newer_kernel {
    bitnet_kernel_t known;
    void *more[5];
};
struct newer_plugin {
    bitnet_plugin_t known;
    void *more[3];
};
#undef KERNEL_SIZE
#undef PLUGIN_SIZE
#define KERNEL_SIZE sizeof(struct newer_kernel)
#define PLUGIN_SIZE sizeof(struct newer_plugin)
#endif

#ifdef NEWER
static const struct newer_kernel newer_kernel = {.more = {(void *)1, (void *)2, (void *)3}, .known = {
#else
static const bitnet_kernel_t kernel = {
#endif
    .struct_size = KERNEL_SIZE,
    .name = KERNEL_NAME,
    .features = FEATURES,
    .operation = OPERATION,
    .target = BITNET_TARGET_CPU,
    .weight_alignment = ALIGNMENT,
    .row_granule = GRANULE,
    .supports = supports,
#ifdef PRIVATE
    .layout = "bytes",
    .packed_size = packed_size,
    .pack = pack,
    .unpack = unpack,
    .workspace_size = workspace_size,
    .prepare = prepare,
#endif
#ifdef LAYOUT_WITHOUT_PACK
    .layout = "bytes",
#endif
#ifndef NO_RUN
    .run = run,
#endif
#ifdef NEWER
}};
#define kernel newer_kernel.known
#else
};
#endif

#ifdef LATER_FILE
/* Wrong for everything, and declared once this file is there. */
static bitnet_status_t run_wrong(const bitnet_weights_t *w, const bitnet_activations_t *x, const uint8_t *workspace,
                                 const bitnet_output_t *y, const bitnet_tile_t *tile, const bitnet_message_t *message) {
    (void)w, (void)x, (void)workspace, (void)message;
    y->y[tile->m0 * y->stride + tile->n0] = 1;
    return BITNET_OK;
}

static const bitnet_kernel_t later_kernel = {
    .struct_size = KERNEL_SIZE,
    .name = "later",
    .operation = OPERATION,
    .target = BITNET_TARGET_CPU,
    .weight_alignment = ALIGNMENT,
    .row_granule = GRANULE,
    .supports = supports,
    .run = run_wrong,
};
#endif

static const bitnet_kernel_t *const kernels[] = {
#ifdef NULL_KERNEL
    NULL,
#endif
    &kernel,
#ifdef TWICE
    &kernel,
#endif
#ifdef LATER_FILE
    &later_kernel,
#endif
};

#ifdef NEWER
static const struct newer_plugin newer_plugin = {.more = {(void *)1}, .known = {
#else
static const bitnet_plugin_t plugin = {
#endif
    .struct_size = PLUGIN_SIZE,
    .abi_major = MAJOR,
#ifdef NEWER
    .abi_minor = BITNET_ABI_MINOR + 7,
#else
    .abi_minor = BITNET_ABI_MINOR,
#endif
    .name = NAME,
#ifndef NO_VERSION
    .version = VERSION,
#endif
#ifdef COUNT
    .kernel_count = COUNT,
#else
    .kernel_count = sizeof kernels / sizeof *kernels,
#endif
#ifdef NO_KERNELS
    .kernels = sizeof kernels ? NULL : kernels,
#else
    .kernels = kernels,
#endif
#ifdef NEWER
}};
#define plugin newer_plugin.known
#else
};
#endif

#ifdef NO_SYMBOL
#define bitnet_plugin some_other_function
const bitnet_plugin_t *some_other_function(void);
#endif

const bitnet_plugin_t *bitnet_plugin(void) {
    (void)run; /* not every variant has it */
#ifdef NULL_DESCRIPTOR
    (void)plugin;
    return NULL;
#else
#ifdef LATER_FILE
    static bitnet_plugin_t copy;
    copy = plugin;
    if (access(LATER_FILE, F_OK)) copy.kernel_count--;
    return &copy;
#endif
    return &plugin;
#endif
}
