//! What every 64-bit ARM CPU has: `smlal`, 8-bit products in 16-bit sums, which are flushed to 32 bits
//! before they can overflow.

use std::arch::aarch64::*;
use std::arch::asm;

use bitnet_burn_plugin::canonical::{BLOCK, BLOCK_BYTES};

use super::quad::{load, load_rows, low, store, totals};
use super::{kernels, unroll};
use crate::ternary::generic::{MAX_K, RowMicro, TileMicro, row_bytes};
use crate::ternary::tile::{BLOCK_ROWS, STEP, STEP_BYTES};

/// The products with `smlal`.
struct Micro;

kernels!(
    Micro,
    features: ["neon"],
    rows: c"i2s-neon",
    tiles: c"t2-neon",
    scaled: c"t2-neon-scaled",
    tiles_max_k: MAX_K,
);

/// Products that a 16-bit sum takes: each is at most 2 * 128 in magnitude, and 128 of 2 * -128 are -2^15,
/// just within range.
const PRODUCTS_PER_FLUSH: usize = 128;

impl TileMicro for Micro {
    const MR: usize = 4;

    #[inline(always)]
    unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS] {
        let mut sums = [0; BLOCK_ROWS];
        // SAFETY: the caller's promise; eight registers are the 128 bytes of a step.
        unsafe {
            let [all] = columns::<1, 8>(w, steps, [x]);
            store(all, &mut sums);
        }
        sums
    }

    #[inline(always)]
    unsafe fn gemm<const M: usize>(w: *const u8, steps: usize, x: [*const i8; M]) -> [[i32; BLOCK_ROWS]; M] {
        let mut sums = [[0; BLOCK_ROWS]; M];
        // SAFETY: the caller's promise; both ways through the eight registers of a step end with the last.
        // There are at most 16 registers of sums at once.
        unsafe {
            if M <= 2 {
                for part in [0, 4] {
                    let some = columns::<M, 4>(w.add(16 * part), steps, x);
                    for m in 0..M {
                        store(some[m], &mut sums[m][4 * part..]);
                    }
                }
            } else {
                for part in [0, 2, 4, 6] {
                    let some = columns::<M, 2>(w.add(16 * part), steps, x);
                    for m in 0..M {
                        store(some[m], &mut sums[m][4 * part..]);
                    }
                }
            }
        }
        sums
    }
}

/// Sums of `4 * V` rows of a block with each of `M` activation rows.
///
/// # Safety
/// The CPU has NEON; the first 16 * `V` bytes of each of `steps` steps from `w` can be read, and 16
/// activations for each at each `x`.
#[inline(always)]
unsafe fn columns<const M: usize, const V: usize>(
    w: *const u8,
    steps: usize,
    x: [*const i8; M],
) -> [[int32x4_t; V]; M] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut wide = [[vdupq_n_s32(0); V]; M];
        let mut start = 0;
        while start < steps {
            // A step has four products for each sum.
            let end = steps.min(start + PRODUCTS_PER_FLUSH / 4);
            // A row's four bytes are half a register of 16-bit sums: two registers for each of weights.
            let mut acc = [[[vdupq_n_s16(0); 2]; V]; M];
            for j in start..end {
                let w = w.add(j * STEP_BYTES);
                // Either the activations of a step are in registers, or its weights.
                if M == 1 {
                    let mut broadcast = [vdupq_n_s8(0); 4];
                    for t in 0..4 {
                        broadcast[t] = broadcast_four(x[0].add(j * STEP + 4 * t));
                    }
                    unroll!(i < V => {
                        let mut v = load::<1>(w.add(16 * i));
                        for x in broadcast {
                            dot(&mut acc[0][i], low(v[0]), x);
                            v[0] = vshrq_n_u8::<2>(v[0]);
                        }
                    });
                } else {
                    let mut v = load::<V>(w);
                    unroll!(t < 4 => {
                        let broadcast = x.map(|x| broadcast_four(x.add(j * STEP + 4 * t)));
                        unroll!(i < V => {
                            let codes = low(v[i]);
                            for m in 0..M {
                                dot(&mut acc[m][i], codes, broadcast[m]);
                            }
                            v[i] = vshrq_n_u8::<2>(v[i]);
                        });
                    });
                }
            }
            for m in 0..M {
                for i in 0..V {
                    let [first, second] = acc[m][i];
                    // Four sums a row, then two, then one.
                    let rows = vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second));
                    wide[m][i] = vaddq_s32(wide[m][i], rows);
                }
            }
            start = end;
        }
        wide
    }
}

/// Four activations, four times.
///
/// # Safety
/// The CPU has NEON; four activations can be read at `x`.
#[inline(always)]
unsafe fn broadcast_four(x: *const i8) -> int8x16_t {
    // SAFETY: the caller's promise.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned())) }
}

impl RowMicro for Micro {
    const MR: usize = 4;
    const NR: usize = 4;
    const GROUP: usize = 8;

    #[inline(always)]
    unsafe fn gemv<const N: usize>(w: *const u8, stride: usize, x: *const i8) -> [i32; N] {
        let mut sums = [0; N];
        for (r, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller promises the features and N rows of that many bytes at w.
            *sum = unsafe { vaddvq_s32(row_sums(w.add(r * row_bytes(stride)), stride, x)) };
        }
        sums
    }

    #[inline(always)]
    unsafe fn gemm<const M: usize, const N: usize>(
        w: *const u8,
        stride: usize,
        x: [*const i8; M],
    ) -> [[i32; N]; M] {
        // SAFETY: the caller promises the features, N rows of stride.div_ceil(128) blocks at w and `stride`
        // activations at each x: 128 for a whole block, 64 for a last half one.
        unsafe {
            let (blocks, half) = (stride / BLOCK, stride % BLOCK);
            let mut wide = [[vdupq_n_s32(0); N]; M];
            let mut start = 0;
            while start < blocks {
                // A block has 16 products for each sum.
                let end = blocks.min(start + PRODUCTS_PER_FLUSH / 16);
                let mut acc = [[vdupq_n_s16(0); N]; M];
                for b in start..end {
                    rows_block::<M, N, 4>(&mut acc, w, stride, x, b);
                }
                flush(&mut wide, acc);
                start = end;
            }
            if half != 0 {
                let mut acc = [[vdupq_n_s16(0); N]; M];
                rows_block::<M, N, 2>(&mut acc, w, stride, x, blocks);
                flush(&mut wide, acc);
            }
            totals(wide)
        }
    }
}

/// Adds the products of the first `G` groups of block `b` of `N` rows with `M` activation rows.
///
/// # Safety
/// The CPU has NEON; block `b` of `N` rows whose activations take `stride` bytes can be read at `w`, and
/// 128 * `b` + 32 * `G` activations at each `x`.
#[inline(always)]
unsafe fn rows_block<const M: usize, const N: usize, const G: usize>(
    acc: &mut [[int16x8_t; N]; M],
    w: *const u8,
    stride: usize,
    x: [*const i8; M],
    b: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        for half in 0..2 {
            let mut v = load_rows::<N>(w, stride, b, half);
            unroll!(i < 4 => {
                // The lowest bits are the last group's.
                let g = 3 - i;
                if g < G {
                    let mut codes = [vdupq_n_s8(0); N];
                    for r in 0..N {
                        codes[r] = low(v[r]);
                    }
                    for m in 0..M {
                        let x = vld1q_s8(x[m].add(b * BLOCK + 32 * g + 16 * half));
                        for r in 0..N {
                            dot_in_one(&mut acc[m][r], codes[r], x);
                        }
                    }
                }
                for r in 0..N {
                    v[r] = vshrq_n_u8::<2>(v[r]);
                }
            });
        }
    }
}

/// The products of one row, in four sums.
///
/// # Safety
/// The CPU has NEON; a row of stride.div_ceil(128) blocks can be read at `w`, and `stride` activations at
/// `x`.
#[inline(always)]
unsafe fn row_sums(w: *const u8, stride: usize, x: *const i8) -> int32x4_t {
    // SAFETY: the caller's promise: 128 activations for a whole block, 64 for a last half one.
    unsafe {
        let (blocks, half) = (stride / BLOCK, stride % BLOCK);
        let mut wide = [[vdupq_n_s32(0); 2]; 2];
        let mut start = 0;
        while start < blocks {
            // A block has four products for each sum.
            let end = blocks.min(start + PRODUCTS_PER_FLUSH / 4);
            let mut acc = [[vdupq_n_s16(0); 2]; 2];
            for b in start..end {
                block::<4>(&mut acc, w.add(b * BLOCK_BYTES), x.add(b * BLOCK));
            }
            flush(&mut wide, acc);
            start = end;
        }
        if half != 0 {
            let mut acc = [[vdupq_n_s16(0); 2]; 2];
            block::<2>(&mut acc, w.add(blocks * BLOCK_BYTES), x.add(blocks * BLOCK));
            flush(&mut wide, acc);
        }
        vaddq_s32(vaddq_s32(wide[0][0], wide[0][1]), vaddq_s32(wide[1][0], wide[1][1]))
    }
}

/// Adds the products of a block's first `G` groups.
///
/// # Safety
/// The CPU has NEON; a block can be read at `w` and 32 * `G` activations at `x`.
#[inline(always)]
unsafe fn block<const G: usize>(acc: &mut [[int16x8_t; 2]; 2], w: *const u8, x: *const i8) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut v = load::<2>(w);
        for half in 0..2 {
            unroll!(i < 4 => {
                // The lowest bits are the last group's.
                let g = 3 - i;
                if g < G {
                    dot(&mut acc[half], low(v[half]), vld1q_s8(x.add(32 * g + 16 * half)));
                }
                v[half] = vshrq_n_u8::<2>(v[half]);
            });
        }
    }
}

/// Adds pairs of 16-bit sums to 32-bit sums.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn flush<const M: usize, const N: usize>(wide: &mut [[int32x4_t; N]; M], acc: [[int16x8_t; N]; M]) {
    for (wide, acc) in wide.as_flattened_mut().iter_mut().zip(acc.as_flattened()) {
        // SAFETY: the caller's promise.
        *wide = unsafe { vpadalq_s16(*wide, *acc) };
    }
}

/// Adds the products of bytes 0 to 7 to the first sums, and those of bytes 8 to 15 to the second. In
/// assembly, since from intrinsics compilers make three instructions: they see that the halves of a
/// broadcast are equal, or reorder the additions.
#[inline]
#[target_feature(enable = "neon")]
fn dot(acc: &mut [int16x8_t; 2], codes: int8x16_t, x: int8x16_t) {
    let [first, second] = acc;
    // SAFETY: the CPU has the instructions, and they do nothing but compute the sums.
    unsafe {
        asm!(
            "smlal {0:v}.8h, {2:v}.8b, {3:v}.8b",
            "smlal2 {1:v}.8h, {2:v}.16b, {3:v}.16b",
            inout(vreg) *first, inout(vreg) *second, in(vreg) codes, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}

/// Adds the products of bytes 0 to 7 and those of bytes 8 to 15 to the same sums.
#[inline]
#[target_feature(enable = "neon")]
fn dot_in_one(acc: &mut int16x8_t, codes: int8x16_t, x: int8x16_t) {
    // SAFETY: as in `dot`.
    unsafe {
        asm!(
            "smlal {0:v}.8h, {1:v}.8b, {2:v}.8b",
            "smlal2 {0:v}.8h, {1:v}.16b, {2:v}.16b",
            inout(vreg) *acc, in(vreg) codes, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}
