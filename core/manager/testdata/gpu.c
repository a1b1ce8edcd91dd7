/* A plugin in plain C with a kernel for the CPU and one that is GPU source, and, by macros, ways to get the latter
 * wrong. TEXT is what the text does before it stores a sum; BEFORE, what it begins with. */
#include "bitnet_plugin.h"

#define STRING(...) #__VA_ARGS__
#define TEXT_OF(...) STRING(__VA_ARGS__)

#ifndef NAME
#define NAME "gpu"
#endif
#ifndef OPERATION
#define OPERATION BITNET_OPERATION_TERNARY_MATMUL
#endif
#ifndef VERSION
#define VERSION "1.0.0"
#endif
#ifndef TARGET
#define TARGET BITNET_TARGET_WGSL
#endif
#ifndef TEXT
#define TEXT
#endif
#ifndef BEFORE
#define BEFORE
#endif
#ifndef TYPE
#define TYPE i32
#endif
#ifndef ENTRY
#define ENTRY "plain"
#endif
#ifndef FEATURES
#define FEATURES NULL
#endif
#ifndef THREADS
#define THREADS 64
#endif
#ifndef GPU_SIZE
#define GPU_SIZE sizeof(bitnet_gpu_t)
#endif
#ifndef GROUP
#define GROUP {THREADS, 1, 1}
#endif
#ifndef TILE_N
#define TILE_N THREADS
#endif
#ifndef TILE_M
#define TILE_M 1
#endif

static int32_t supports(const bitnet_signature_t *s) {
    return s->operation == BITNET_OPERATION_TERNARY_MATMUL;
}

static bitnet_status_t run(const bitnet_weights_t *w, const bitnet_activations_t *x, const uint8_t *workspace,
                           const bitnet_output_t *y, const bitnet_tile_t *t, const bitnet_message_t *message) {
    (void)workspace, (void)message;
    for (uint64_t m = t->m0; m < t->m1; m++)
        for (uint64_t n = t->n0; n < t->n1; n++) {
            const uint8_t *row = w->data + n * bitnet_canonical_row_bytes(w->k);
            int32_t sum = 0;
            for (uint64_t k = 0; k < w->k; k++) sum += x->q[m * x->stride + k] * bitnet_canonical_weight(row, k);
            float scale = w->scale * x->scale[m];
            y->y[m * y->stride + n] = (float)sum * scale;
        }
    return BITNET_OK;
}

#ifdef PRIVATE
/* Rows of one int8 a weight, filled up to whole words. */
#define ROW_BYTES(k) (((k) + 3) / 4 * 4)
static uint64_t packed_size(uint64_t n, uint64_t k) { return n * ROW_BYTES(k); }

static bitnet_status_t pack(const bitnet_weights_t *w, uint8_t *packed, uint64_t n0, uint64_t n1,
                            const bitnet_message_t *message) {
    (void)message;
    for (uint64_t n = n0; n < n1; n++) {
        const uint8_t *row = w->data + n * bitnet_canonical_row_bytes(w->k);
        for (uint64_t k = 0; k < ROW_BYTES(w->k); k++)
            packed[n * ROW_BYTES(w->k) + k] = (uint8_t)(k < w->k ? bitnet_canonical_weight(row, k) : 0);
    }
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
            int code = (int8_t)w->data[n * ROW_BYTES(w->k) + k] + 1;
            *byte = (uint8_t)((*byte & ~(3 << shift)) | code << shift);
        }
    }
    return BITNET_OK;
}
#define WEIGHT "extractBits(bitcast<i32>(w[n * ((p[2] + 3u) / 4u) + k / 4u]), k % 4u * 8u, 8u)"
#else
#define WEIGHT \
    "i32((w[n * ((p[2] + 127u) / 128u * 8u) + (k / 128u * 32u + k % 32u) / 4u] >> " \
    "(k % 4u * 8u + 6u - 2u * (k % 128u / 32u))) & 3u) - 1"
#endif

static const bitnet_gpu_t gpu = {
    .struct_size = GPU_SIZE,
#ifndef NO_SOURCE
    .source =
        TEXT_OF(BEFORE) "\n"
        "struct Row { scale: f32, sum: i32 }\n"
        "@group(0) @binding(0) var<storage, read_write> w: array<u32>;\n"
        "@group(0) @binding(1) var<storage, read_write> s: array<f32>;\n"
        "@group(0) @binding(2) var<storage, read_write> x: array<u32>;\n"
        "@group(0) @binding(3) var<storage, read_write> rows: array<Row>;\n"
        "@group(0) @binding(4) var<storage, read_write> p: array<u32>;\n"
        "@group(0) @binding(5) var<storage, read_write> y: array<f32>;\n"
        "@compute @workgroup_size(" TEXT_OF(THREADS) ")\n"
        "fn plain(@builtin(global_invocation_id) id: vec3<u32>) {\n"
        "    let n = id.x;\n"
        "    let m = id.y;\n"
        "    if (n >= p[1] || m >= p[0]) { return; }\n"
        "    var sum: " TEXT_OF(TYPE) " = 0;\n"
        "    for (var k = 0u; k < p[2]; k++) {\n"
        "        let q = extractBits(bitcast<i32>(x[m * p[3] + k / 4u]), k % 4u * 8u, 8u);\n"
        "        sum += " TEXT_OF(TYPE) "(q * (" WEIGHT "));\n"
        "    }\n"
        "    " TEXT_OF(TEXT) "\n"
        "    y[m * p[4] + p[5] + n] = f32(sum) * (s[0] * rows[m].scale);\n"
        "}\n",
#endif
    .entry = ENTRY,
    .workgroup = GROUP,
    .tile_n = TILE_N,
    .tile_m = TILE_M,
};

static const bitnet_kernel_t on_cpu = {
    .struct_size = sizeof on_cpu,
    .name = "cpu",
    .operation = BITNET_OPERATION_TERNARY_MATMUL,
    .target = BITNET_TARGET_CPU,
    .weight_alignment = 4,
    .row_granule = 1,
    .supports = supports,
    .run = run,
};

static const bitnet_kernel_t on_gpu = {
    .struct_size = sizeof on_gpu,
    .name = "text",
    .features = FEATURES,
    .operation = OPERATION,
    .target = TARGET,
    .weight_alignment = 4,
    .row_granule = 1,
    .supports = supports,
#ifdef PRIVATE
    .layout = "bytes",
    .packed_size = packed_size,
    .pack = pack,
    .unpack = unpack,
#endif
#ifndef NO_GPU
    .gpu = &gpu,
#endif
};

static const bitnet_kernel_t *const kernels[] = {&on_cpu, &on_gpu};

static const bitnet_plugin_t plugin = {
    .struct_size = sizeof plugin,
    .abi_major = BITNET_ABI_MAJOR,
    .abi_minor = BITNET_ABI_MINOR,
    .name = NAME,
    .version = VERSION,
    .kernels = kernels,
    .kernel_count = sizeof kernels / sizeof *kernels,
};

const bitnet_plugin_t *bitnet_plugin(void) {
    (void)gpu;
    return &plugin;
}
