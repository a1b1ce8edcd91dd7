// A kernel plugin to start from: it reads canonical weights where they lie, in vectors of whatever this processor has.
//
// A block of the canonical layout holds 128 weights in 32 bytes: byte i holds weights i, 32 + i, 64 + i and 96 + i in bits
// 7..6, 5..4, 3..2 and 1..0. So the codes at the same bits of 32 bytes belong to 32 activations that follow each other:
// shift, mask, multiply.
//
// Codes are u = c + 1 in {0, 1, 2}. The host gives the sum of each row of activations, and
// sum(q * c) = sum(q * u) - sum(q).
//
// Zig builds for the processor that it runs on. For others, name one with -mcpu, and what it needs in .features below.
const c = @cImport(@cInclude("bitnet_plugin.h"));

const block = 128;
const block_bytes = 32;
const Bytes = @Vector(32, u8);
const Wide = @Vector(32, i16);

export fn kernel_supports(signature: [*c]const c.bitnet_signature_t) i32 {
    return @intFromBool(signature.*.operation == c.BITNET_OPERATION_TERNARY_MATMUL);
}

// The sum of codes times activations. Activations are zero up to a multiple of 64: the last block may have half of them.
fn dot(weights: [*]const u8, x: [*]const i8, stride: u64) i32 {
    var sum: @Vector(32, i32) = @splat(0);
    var base: u64 = 0;
    while (base < stride) : (base += block) {
        const codes: Bytes = weights[base / block * block_bytes ..][0..block_bytes].*;
        // Four products of at most 2 * 128 fit 16 bits.
        var narrow: Wide = @splat(0);
        inline for (0..4) |g| {
            if (g < 2 or stride - base >= block) {
                const low: Wide = (codes >> @splat(6 - 2 * g)) & @as(Bytes, @splat(3));
                const q: @Vector(32, i8) = x[base + 32 * g ..][0..32].*;
                narrow += low * @as(Wide, q);
            }
        }
        sum += narrow;
    }
    return @reduce(.Add, sum);
}

export fn kernel_run(
    w: [*c]const c.bitnet_weights_t,
    x: [*c]const c.bitnet_activations_t,
    _: [*c]const u8,
    y: [*c]const c.bitnet_output_t,
    tile: [*c]const c.bitnet_tile_t,
    _: [*c]const c.bitnet_message_t,
) c.bitnet_status_t {
    // No contraction: the two products of the result must not become one fused operation.
    @setFloatMode(.strict);
    const width = c.bitnet_canonical_row_bytes(w.*.k);
    var n = tile.*.n0;
    while (n < tile.*.n1) : (n += 1) {
        var m = tile.*.m0;
        while (m < tile.*.m1) : (m += 1) {
            const sum = dot(w.*.data + n * width, x.*.q + m * x.*.stride, x.*.stride) - x.*.sum[m];
            const scale = w.*.scale * x.*.scale[m];
            y.*.y[m * y.*.stride + n] = @as(f32, @floatFromInt(sum)) * scale;
        }
    }
    return c.BITNET_OK;
}

const kernel = c.bitnet_kernel_t{
    .struct_size = @sizeOf(c.bitnet_kernel_t),
    .name = "vectors",
    .operation = c.BITNET_OPERATION_TERNARY_MATMUL,
    .target = c.BITNET_TARGET_CPU,
    .weight_alignment = c.BITNET_CANONICAL_ALIGNMENT,
    .row_granule = 1,
    .supports = kernel_supports,
    .run = kernel_run,
};

const kernels = [_][*c]const c.bitnet_kernel_t{&kernel};

const plugin = c.bitnet_plugin_t{
    .struct_size = @sizeOf(c.bitnet_plugin_t),
    .abi_major = c.BITNET_ABI_MAJOR,
    .abi_minor = c.BITNET_ABI_MINOR,
    .name = "example-zig",
    .version = "0.1.0",
    .kernels = &kernels,
    .kernel_count = kernels.len,
};

export fn bitnet_plugin() [*c]const c.bitnet_plugin_t {
    return &plugin;
}
