/* The C ABI of bitnet-burn's kernels, version 1.2.
 *
 * A plugin is a shared library that exports one function,
 *
 *     const bitnet_plugin_t *bitnet_plugin(void);
 *
 * which returns the same descriptor on every call. What a kernel must compute, bit for bit:
 *
 *     y[m, n] = (float)(sum over k of q[m, k] * c[n, k]) * (s * a[m])
 *
 * q: int8 activations; c: weights in {-1, 0, 1}; s: weight scale; a: row scales; the sum is an exact
 * int32, and there are two separate float products (compile with -ffp-contract=off).
 *
 * Compatibility: every struct begins with struct_size, set to sizeof by the side that fills it.
 * Fields are only appended, with a new minor version. A host refuses another major version.
 *
 * Memory and threads: the host owns every buffer and every thread. It calls run, pack and unpack of
 * one kernel concurrently on disjoint ranges. A kernel starts no threads, keeps no pointers, leaves
 * the floating-point environment alone, writes no input, reads nothing beyond the stated sizes, and lets
 * no exception out. Buffers to be filled hold anything before. Descriptors are immutable and
 * live as long as the library is loaded.
 *
 * Licence: MIT OR Apache-2.0.
 */
#ifndef BITNET_PLUGIN_H
#define BITNET_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BITNET_ABI_MAJOR 1u
#define BITNET_ABI_MINOR 2u

#define BITNET_OPERATION_TERNARY_MATMUL 1u
/* Since 1.2: scales of groups of weights (G) and of activations (g); each G is a whole number of g.
 *     t[m, n, G] = sum over the g in G, ascending, from 0: fmaf((float)(exact int32 sum over k in g of q * c), a[m, g], .)
 *     y[m, n]    = sum over the G of row n, ascending, from 0: fmaf(s[n, G], t[m, n, G], .) */
#define BITNET_OPERATION_SCALED_TERNARY_MATMUL 2u
#define BITNET_SCALE_ROWS 32
#define BITNET_SCALE_F32 0u
#define BITNET_SCALE_F16 1u
#define BITNET_TARGET_CPU 1u
#define BITNET_TARGET_WGSL 2u /* since 1.1: text in bitnet_kernel_t.gpu */
#define BITNET_TARGET_CUDA 3u /* since 1.1: the same in CUDA C++ */

typedef int32_t bitnet_status_t; /* anything but OK: the host takes its next kernel */
#define BITNET_OK 0
#define BITNET_UNSUPPORTED 1
#define BITNET_INVALID_ARGUMENT 2
#define BITNET_FAILED 3
#define BITNET_PANICKED 4

#define BITNET_ACTIVATION_ALIGNMENT 64 /* rows begin at multiples of it, zero-filled up to one */
#define BITNET_ACTIVATION_SLACK 64     /* readable bytes behind the last activation row */
#define BITNET_CANONICAL_ALIGNMENT 4   /* canonical weights lie in a file or a tensor: unaligned loads */
#define BITNET_WORKSPACE_ALIGNMENT 64
#define BITNET_GPU_ACTIVATION_BLOCK 128 /* on a GPU, rows are zero-filled up to a multiple of it */

/* The canonical layout (I2_S): a row of k weights takes bitnet_canonical_row_bytes(k). 128 weights
 * take 32 bytes: byte i holds weights i, 32+i, 64+i, 96+i of the block in bits 7..6, 5..4, 3..2,
 * 1..0. Codes 0, 1, 2 are -1, 0, +1. Rows are padded with code 1 (zero). */
static inline uint64_t bitnet_canonical_row_bytes(uint64_t k) { return (k + 127) / 128 * 32; }
static inline int bitnet_canonical_weight(const uint8_t *row, uint64_t k) {
    return ((row[k / 128 * 32 + k % 32] >> (6 - 2 * (k % 128 / 32))) & 3) - 1;
}

/* An [m, k] by transposed [n, k] product. */
typedef struct bitnet_signature {
    uint64_t struct_size;
    uint32_t operation; /* BITNET_OPERATION_* */
    uint32_t threads;   /* threads that will call run */
    uint64_t m;         /* rows of activations (tokens), >= 1 */
    uint64_t n;         /* output features, >= 1 */
    uint64_t k;         /* input features, 1 .. 2^23 */
    /* Since 1.2; 0 with BITNET_OPERATION_TERNARY_MATMUL. */
    uint64_t weight_group;     /* as bitnet_weights_t.group */
    uint64_t activation_group; /* as bitnet_activations_t.group */
    uint32_t scale_format;     /* as bitnet_weights_t.scale_format */
    uint32_t reserved;         /* 0 */
} bitnet_signature_t;

/* Quantised activations, filled by the host. */
typedef struct bitnet_activations {
    uint64_t struct_size;
    uint64_t m;         /* rows */
    uint64_t k;         /* values a row */
    uint64_t stride;    /* bytes from row to row: k rounded up to a multiple of 64 */
    const int8_t *q;    /* row 0, 64-byte aligned; bytes k..stride of a row are zero */
    const float *scale; /* m row scales: absmax / 127 */
    const int32_t *sum; /* m sums over the k values of the row */
    /* Since 1.2. */
    uint64_t group;           /* values that share a scale, a multiple of 32; 0: the whole row */
    const float *group_scale; /* [m, ceil(k / group)]; scale where group is 0 */
    const int32_t *group_sum; /* likewise */
} bitnet_activations_t;

/* Weights [n, k], canonical or in the kernel's own packing. */
typedef struct bitnet_weights {
    uint64_t struct_size;
    uint64_t n;
    uint64_t k;
    const uint8_t *data; /* aligned to weight_alignment, canonical ones to 4 bytes */
    uint64_t size;       /* readable bytes at data */
    float scale;         /* weight = code * scale; each matrix has its own, which may be negative or subnormal */
    /* Since 1.2; the scales only with BITNET_OPERATION_SCALED_TERNARY_MATMUL, and not for pack and unpack. */
    uint32_t scale_format; /* BITNET_SCALE_* */
    uint64_t group;        /* weights of a row that share a scale, a multiple of 32; 0: the whole row */
    /* That of row n and group G, of `groups` in a row, is number (n / 32 * groups + G) * 32 + n % 32. Those of rows
     * behind n are zero; all are finite. Aligned as their type asks. */
    const void *scales;
} bitnet_weights_t;

/* y[m, n] goes to y[m * stride + n]. */
typedef struct bitnet_output {
    uint64_t struct_size;
    float *y;        /* 4-byte aligned */
    uint64_t stride; /* in elements */
} bitnet_output_t;

/* What one call of run computes, and all that it may write. */
typedef struct bitnet_tile {
    uint64_t struct_size;
    uint64_t n0, n1; /* output features: n0 and n1 are multiples of row_granule, or n1 == n */
    uint64_t m0, m1; /* activation rows */
} bitnet_tile_t;

/* A buffer of the host's for a message: UTF-8, NUL-terminated. May be null. */
typedef struct bitnet_message {
    uint64_t struct_size;
    char *text;
    uint64_t capacity;
} bitnet_message_t;

/* Since 1.1. A kernel as text, which the host compiles and launches on the model's device, as
 * (ceil(n / tile_n), ceil(m / tile_m), 1) workgroups, with six buffers in this order: @group(0) @binding(0..5)
 * in WGSL, each var<storage, read_write> and each used; the pointer parameters of the extern "C" __global__
 * function in CUDA C++.
 *   0 weights     u32: what pack wrote, or canonical rows of ceil(k / 128) * 8, as little-endian words
 *   1 scale       1 f32: weight = code * scale
 *   2 activations u32: 4 int8 each, the first in the lowest byte; rows x_stride words apart, where x_stride =
 *                 ceil(k / 128) * 32: zero-filled up to whole canonical blocks
 *   3 rows        m pairs of f32 (row scale: absmax / 127) and i32 (sum of the row's int8 values)
 *   4 parameters  8 u32: m, n, k, x_stride, y_stride, y_column, 0, 0
 *   5 output      f32: y[m, n] is at m * y_stride + y_column + n; nothing else may be written
 * Sums must be exact; y may differ from the two separate products by 2 units in the last place. */
typedef struct bitnet_gpu {
    uint64_t struct_size;
    const char *source;    /* UTF-8, at most 1 MiB */
    const char *entry;     /* the entry point: an identifier of up to 127 characters */
    uint32_t workgroup[3]; /* threads by dimension, as the text declares them; at most 1024 in all */
    uint32_t tile_n;       /* output features that a workgroup computes, >= 1 */
    uint32_t tile_m;       /* rows of activations that a workgroup computes, >= 1 */
    uint32_t reserved;     /* 0 */
} bitnet_gpu_t;

typedef struct bitnet_kernel {
    uint64_t struct_size;
    const char *name;     /* unique in the plugin, [A-Za-z0-9._-]{1,63} */
    const char *layout;   /* name of the private packing, or NULL: canonical weights in place */
    const char *features; /* comma-separated, or NULL: of the CPU in Rust's names ("avx2,fma"); of a GPU,
                             "subgroups" (of at least 8 threads) and "shader-f16" are known */
    uint32_t operation;
    uint32_t target;
    uint64_t weight_alignment; /* of packed weights: a power of two up to 4096 */
    uint64_t row_granule;      /* ranges of output features begin at multiples of it */
    int32_t (*supports)(const bitnet_signature_t *signature); /* 1 or 0 */
    /* The next three are NULL if layout is NULL. */
    uint64_t (*packed_size)(uint64_t n, uint64_t k); /* 0: can't */
    bitnet_status_t (*pack)(const bitnet_weights_t *canonical, uint8_t *packed, uint64_t n0,
                            uint64_t n1, const bitnet_message_t *message);
    bitnet_status_t (*unpack)(const bitnet_weights_t *packed, uint8_t *canonical, uint64_t n0,
                              uint64_t n1, const bitnet_message_t *message);
    /* Depends on m and k alone: weights over the same activations share one workspace. NULL: none. */
    uint64_t (*workspace_size)(const bitnet_signature_t *signature);
    /* Once a matmul, before run; or NULL. */
    bitnet_status_t (*prepare)(const bitnet_activations_t *x, uint8_t *workspace,
                               const bitnet_message_t *message);
    bitnet_status_t (*run)(const bitnet_weights_t *weights, const bitnet_activations_t *x,
                           const uint8_t *workspace, const bitnet_output_t *y,
                           const bitnet_tile_t *tile, const bitnet_message_t *message);
    /* Since 1.1: NULL for the CPU. Not NULL for a GPU; workspace_size, prepare and run are NULL then. */
    const bitnet_gpu_t *gpu;
} bitnet_kernel_t;

typedef struct bitnet_plugin {
    uint64_t struct_size;
    uint32_t abi_major; /* BITNET_ABI_MAJOR */
    uint32_t abi_minor; /* BITNET_ABI_MINOR */
    const char *name;   /* [A-Za-z0-9._-]{1,63} */
    const char *version;
    const bitnet_kernel_t *const *kernels;
    uint64_t kernel_count; /* at most 256 */
} bitnet_plugin_t;

#if defined(_WIN32)
__declspec(dllexport)
#elif defined(__GNUC__)
__attribute__((visibility("default")))
#endif
const bitnet_plugin_t *bitnet_plugin(void);

#ifdef __cplusplus
}
#endif

#endif
