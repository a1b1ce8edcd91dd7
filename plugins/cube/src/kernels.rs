//! The matrix multiplications.
//!
//! A word of a canonical row holds 16 codes: of word i in a block of 8, bits 6 - 2g and 7 - 2g of each byte are the codes of
//! the four activations in word 8g + i of the block's 32, for g in 0..4. The sum over K of q * (code - 1) is that of
//! q * code less the row's sum, which comes with the activations.

use cubecl::prelude::*;

/// Rows that are split over 32 threads: decode. A workgroup has `groups` of them, each for `outputs` features, and one
/// row of activations.
#[cube(launch_unchecked)]
pub(crate) fn gemv(
    weights: &[u32],
    scale: &[f32],
    x: &[u32],
    rows: &[u32],
    params: &[u32],
    y: &mut [f32],
    #[comptime] outputs: u32,
    #[comptime] groups: u32,
) {
    let n = params[1];
    let x_stride = params[3];
    let words = x_stride / 4;
    let m = CUBE_POS_Y;
    let lane = UNIT_POS_X;
    let group = UNIT_POS_Y;
    let first = (CUBE_POS_X * groups + group) * outputs;

    let mut sums = Array::<i32>::new(outputs as usize);
    #[unroll]
    for o in 0..outputs {
        sums[o as usize] = 0i32;
    }
    let mut word = lane;
    while word < words {
        let at = m * x_stride + word / 8 * 32 + word % 8;
        let x0 = i32::reinterpret(x[at as usize]);
        let x1 = i32::reinterpret(x[(at + 8) as usize]);
        let x2 = i32::reinterpret(x[(at + 16) as usize]);
        let x3 = i32::reinterpret(x[(at + 24) as usize]);
        #[unroll]
        for o in 0..outputs {
            let row = (first + o).min(n - 1);
            let codes = weights[(row * words + word) as usize];
            let sum = dp4a(x0, i32::reinterpret((codes >> 6) & 0x0303_0303u32), sums[o as usize]);
            let sum = dp4a(x1, i32::reinterpret((codes >> 4) & 0x0303_0303u32), sum);
            let sum = dp4a(x2, i32::reinterpret((codes >> 2) & 0x0303_0303u32), sum);
            sums[o as usize] = dp4a(x3, i32::reinterpret(codes & 0x0303_0303u32), sum);
        }
        word += 32;
    }

    let mut shared = Shared::<[i32]>::new_slice((outputs * groups * 32) as usize);
    let own = group * outputs * 32 + lane;
    #[unroll]
    for o in 0..outputs {
        shared[(own + o * 32) as usize] = sums[o as usize];
    }
    sync_cube();
    #[unroll]
    for step in 0..5u32 {
        let half = comptime!(16u32 >> step);
        if lane < half {
            #[unroll]
            for o in 0..outputs {
                let at = own + o * 32;
                shared[at as usize] += shared[(at + half) as usize];
            }
        }
        sync_cube();
    }
    let feature = first + lane;
    if lane < outputs && feature < n {
        let sum =
            shared[((group * outputs + lane) * 32) as usize] - i32::reinterpret(rows[(2 * m + 1) as usize]);
        let a = f32::reinterpret(rows[(2 * m) as usize]);
        y[(m * params[4] + params[5] + feature) as usize] = f32::cast_from(sum) * (scale[0] * a);
    }
}

/// Rows that are split over 8 threads, which read 16 bytes at once: decode, too. A workgroup of 256 threads has 32
/// groups of them, each for `outputs` features. The threads of a group bring their sums together through shared memory,
/// or, with `plane`, where they have their registers in common.
#[cube(launch_unchecked)]
pub(crate) fn gemv_wide(
    weights: &[Vector<u32, Const<4>>],
    scale: &[f32],
    x: &[Vector<u32, Const<4>>],
    rows: &[u32],
    params: &[u32],
    y: &mut [f32],
    #[comptime] outputs: u32,
    #[comptime] plane: bool,
) {
    let n = params[1];
    // A block of 8 words of weights and 32 of activations is 2 and 8 of these.
    let x_stride = params[3] / 4;
    let words = x_stride / 4;
    let m = CUBE_POS_Y;
    let unit = UNIT_POS_Y * 32 + UNIT_POS_X;
    let lane = unit % 8;
    let first = (CUBE_POS_X * 32 + unit / 8) * outputs;

    let mut sums = Array::<i32>::new(outputs as usize);
    #[unroll]
    for o in 0..outputs {
        sums[o as usize] = 0i32;
    }
    let mut word = lane;
    while word < words {
        let at = m * x_stride + word / 2 * 8 + word % 2;
        let x0 = x[at as usize];
        let x1 = x[(at + 2) as usize];
        let x2 = x[(at + 4) as usize];
        let x3 = x[(at + 6) as usize];
        #[unroll]
        for o in 0..outputs {
            let row = (first + o).min(n - 1);
            let codes = weights[(row * words + word) as usize];
            let mut sum = sums[o as usize];
            #[unroll]
            for i in 0..4usize {
                let c = codes.extract(i);
                sum = dp4a(i32::reinterpret(x0.extract(i)), i32::reinterpret((c >> 6) & 0x0303_0303u32), sum);
                sum = dp4a(i32::reinterpret(x1.extract(i)), i32::reinterpret((c >> 4) & 0x0303_0303u32), sum);
                sum = dp4a(i32::reinterpret(x2.extract(i)), i32::reinterpret((c >> 2) & 0x0303_0303u32), sum);
                sum = dp4a(i32::reinterpret(x3.extract(i)), i32::reinterpret(c & 0x0303_0303u32), sum);
            }
            sums[o as usize] = sum;
        }
        word += 8;
    }

    let a = f32::reinterpret(rows[(2 * m) as usize]);
    let all = i32::reinterpret(rows[(2 * m + 1) as usize]);
    let to = m * params[4] + params[5];
    if comptime!(plane) {
        #[unroll]
        for o in 0..outputs {
            let mut sum = sums[o as usize];
            #[unroll]
            for step in 0..3u32 {
                sum += plane_shuffle_xor(sum, comptime!(4u32 >> step));
            }
            if lane == 0 && first + o < n {
                y[(to + first + o) as usize] = f32::cast_from(sum - all) * (scale[0] * a);
            }
        }
    } else {
        let mut shared = Shared::<[i32]>::new_slice(comptime!((outputs * 256) as usize));
        #[unroll]
        for o in 0..outputs {
            shared[(o * 256 + unit) as usize] = sums[o as usize];
        }
        sync_cube();
        // At most 4 features a group of 8 threads.
        if lane < outputs && first + lane < n {
            let mut sum = 0i32 - all;
            #[unroll]
            for i in 0..8u32 {
                sum += shared[(lane * 256 + unit / 8 * 8 + i) as usize];
            }
            y[(to + first + lane) as usize] = f32::cast_from(sum) * (scale[0] * a);
        }
    }
}

/// Tiles of 16 `tm` rows by 16 `tn` output features: prefill. Blocks of 128 along K go through shared memory, and each of
/// 16 x 16 threads keeps `tm` by `tn` sums.
#[cube(launch_unchecked)]
pub(crate) fn gemm(
    weights: &[u32],
    scale: &[f32],
    x: &[u32],
    rows: &[u32],
    params: &[u32],
    y: &mut [f32],
    #[comptime] tm: u32,
    #[comptime] tn: u32,
) {
    let m = params[0];
    let n = params[1];
    let x_stride = params[3];
    let words = x_stride / 4;
    let column = UNIT_POS_X;
    let row = UNIT_POS_Y;
    let unit = row * 16 + column;
    let n0 = CUBE_POS_X * (16 * tn);
    let m0 = CUBE_POS_Y * (16 * tm);

    // By word, then row; one more, so that neighbours that write do not meet in a bank.
    let w_stride = comptime!(16 * tn + 1);
    let q_stride = comptime!(16 * tm + 1);
    let mut shared_w = Shared::<[u32]>::new_slice((8 * w_stride) as usize);
    let mut shared_q = Shared::<[u32]>::new_slice((32 * q_stride) as usize);
    let mut sums = Array::<i32>::new((tm * tn) as usize);
    #[unroll]
    for i in 0..tm * tn {
        sums[i as usize] = 0i32;
    }

    let blocks = x_stride / 32;
    let mut block = 0u32;
    while block < blocks {
        let mut i = unit;
        while i < 128 * tn {
            let from = (n0 + i / 8).min(n - 1);
            shared_w[(i % 8 * w_stride + i / 8) as usize] =
                weights[(from * words + block * 8 + i % 8) as usize];
            i += 256;
        }
        let mut i = unit;
        while i < 512 * tm {
            let from = (m0 + i / 32).min(m - 1);
            shared_q[(i % 32 * q_stride + i / 32) as usize] =
                x[(from * x_stride + block * 32 + i % 32) as usize];
            i += 256;
        }
        sync_cube();
        let mut word = 0u32;
        while word < 8 {
            let mut codes = Array::<u32>::new(tn as usize);
            #[unroll]
            for j in 0..tn {
                codes[j as usize] = shared_w[(word * w_stride + column + 16 * j) as usize];
            }
            #[unroll]
            for g in 0..4u32 {
                #[unroll]
                for r in 0..tm {
                    let q = i32::reinterpret(shared_q[((8 * g + word) * q_stride + row + 16 * r) as usize]);
                    #[unroll]
                    for j in 0..tn {
                        let c = (codes[j as usize] >> comptime!(6 - 2 * g)) & 0x0303_0303u32;
                        let i = comptime!((r * tn + j) as usize);
                        sums[i] = dp4a(q, i32::reinterpret(c), sums[i]);
                    }
                }
            }
            word += 1;
        }
        sync_cube();
        block += 1;
    }

    #[unroll]
    for r in 0..tm {
        let to = m0 + row + 16 * r;
        if to < m {
            let a = f32::reinterpret(rows[(2 * to) as usize]);
            let all = i32::reinterpret(rows[(2 * to + 1) as usize]);
            #[unroll]
            for j in 0..tn {
                let feature = n0 + column + 16 * j;
                if feature < n {
                    let sum = sums[comptime!((r * tn + j) as usize)] - all;
                    y[(to * params[4] + params[5] + feature) as usize] = f32::cast_from(sum) * (scale[0] * a);
                }
            }
        }
    }
}
