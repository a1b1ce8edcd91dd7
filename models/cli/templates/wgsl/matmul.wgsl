// y[m, n] = sum over k of q[m, k] * c[n, k], times the scales. In front of this stands `const ROWS`: how many rows of
// activations a workgroup computes, for its 32 output features.
//
// 32 threads side by side have one output feature each and read 16 bytes of weights each, which lie side by side in the
// packing; 8 threads share a feature, and take every eighth 16 bytes. The codes 0, 1, 2 stand for -1, 0, 1, so that
// sum(q * c) = sum(q * code) - sum(q), and the host has the latter.

struct Row {
    scale: f32,
    sum: i32,
}

@group(0) @binding(0) var<storage, read_write> weights: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> scale: array<f32>;
@group(0) @binding(2) var<storage, read_write> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> rows: array<Row>;
@group(0) @binding(4) var<storage, read_write> params: array<u32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

const FEATURES = 32u;
const SLICES = 8u;

var<workgroup> sums: array<i32, FEATURES * SLICES * ROWS>;

// Bytes of four codes each, from the pairs of bits at `shift`, times bytes of four activations.
fn dots(w: vec4<u32>, shift: u32, q: vec4<u32>) -> i32 {
    let codes = (w >> vec4(shift)) & vec4(0x03030303u);
    return dot4I8Packed(codes.x, q.x) + dot4I8Packed(codes.y, q.y) + dot4I8Packed(codes.z, q.z)
        + dot4I8Packed(codes.w, q.w);
}

@compute @workgroup_size(32, 8)
fn matmul(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let m = params[0];
    let n = params[1];
    // 16 bytes are half a block of 128 weights.
    let halves = (params[2] + 127u) / 128u * 2u;
    let stride = params[3] / 4u;
    let first = group.y * ROWS;

    var sum: array<i32, ROWS>;
    for (var half = local.y; half < halves; half += SLICES) {
        let w = weights[(group.x * halves + half) * FEATURES + local.x];
        // The first halves of a block's four groups of 32 activations, or the second ones.
        let start = half / 2u * 8u + half % 2u;
        for (var r = 0u; r < ROWS; r++) {
            // Rows behind the last one count as the last one, and are not stored.
            let at = min(first + r, m - 1u) * stride + start;
            sum[r] += dots(w, 6u, x[at]) + dots(w, 4u, x[at + 2u]) + dots(w, 2u, x[at + 4u]) + dots(w, 0u, x[at + 6u]);
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        sums[(r * SLICES + local.y) * FEATURES + local.x] = sum[r];
    }
    workgroupBarrier();

    // The 8 threads of a feature share the rows.
    let feature = group.x * FEATURES + local.x;
    for (var r = local.y; r < ROWS; r += SLICES) {
        let row = first + r;
        if (row < m && feature < n) {
            var total = -rows[row].sum;
            for (var slice = 0u; slice < SLICES; slice++) {
                total += sums[(r * SLICES + slice) * FEATURES + local.x];
            }
            y[row * params[4] + params[5] + feature] = f32(total) * (scale[0] * rows[row].scale);
        }
    }
}
