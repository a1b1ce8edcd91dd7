//! The dot-product extension (ARMv8.2 and later): `sdot`, four products and their sum in each 32-bit lane.

use std::arch::aarch64::*;
use std::arch::asm;

use bitnet_burn_plugin::canonical::{BLOCK, BLOCK_BYTES};

use super::quad::{load, load_rows, low, store, totals};
use super::{kernels, unroll};
use crate::ternary::generic::{RowMicro, TileMicro, row_bytes};
use crate::ternary::tile::{BLOCK_ROWS, STEP, STEP_BYTES};

/// The products with `sdot`.
struct Micro;

kernels!(
    Micro,
    features: ["neon", "dotprod"],
    rows: c"i2s-dotprod",
    tiles: c"t2-dotprod",
    scaled: c"t2-dotprod-scaled",
    tiles_max_k: TILES_MAX_K,
);

/// Weights of a row up to which [`gemv`]'s sums can't overflow: those that are 16 times too large, of every
/// fourth weight, reach 16 * 2 * 128 * K/4 in magnitude, -2^31 at K = 2^21.
pub(super) const TILES_MAX_K: u64 = 1 << 21;

impl TileMicro for Micro {
    const MR: usize = 8;

    #[inline(always)]
    unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS] {
        // SAFETY: the caller's promise.
        unsafe { gemv(w, steps, x) }
    }

    #[inline(always)]
    unsafe fn gemm<const M: usize>(w: *const u8, steps: usize, x: [*const i8; M]) -> [[i32; BLOCK_ROWS]; M] {
        let mut sums = [[0; BLOCK_ROWS]; M];
        // SAFETY: the caller's promise; each of the ways through the eight registers of a step ends with the
        // last. Each has enough independent sums to keep the units busy, and few enough that 32 registers
        // hold them and the activations.
        unsafe {
            if M <= 2 {
                let all = columns::<M, 8>(w, steps, x);
                for m in 0..M {
                    store(all[m], &mut sums[m]);
                }
            } else if M <= 4 {
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

/// Sums of the 32 rows of a block with one activation row, for up to [`TILES_MAX_K`] weights a row.
///
/// # Safety
/// The CPU has the dot-product extension; `steps` steps of 128 bytes can be read at `w`, and 16 activations
/// for each at `x`.
#[inline(always)]
pub(super) unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS] {
    // SAFETY: the caller's promise.
    unsafe {
        // acc[.][0] for the codes at bits 0 and 6, acc[.][1] for those at 2, 4 times too large, acc[.][2]
        // for those at 4, 16 times too large: one instruction takes each out of its byte.
        let mut acc = [[vdupq_n_s32(0); 3]; 8];
        for j in 0..steps {
            let w = w.add(j * STEP_BYTES);
            let x = vld1q_s8(x.add(j * STEP));
            unroll!(i < 8 => {
                dot_scaled::<{ 16 * i }>(&mut acc[i], w, x);
            });
        }
        let mut sums = [0; BLOCK_ROWS];
        store(acc.map(|[a, b, c]| descaled(a, b, c)), &mut sums);
        sums
    }
}

/// Sums of `4 * V` rows of a block with each of `M` activation rows.
///
/// # Safety
/// The CPU has the dot-product extension; the first 16 * `V` bytes of each of `steps` steps from `w` can be
/// read, and 16 activations for each at each `x`.
#[inline(always)]
unsafe fn columns<const M: usize, const V: usize>(
    w: *const u8,
    steps: usize,
    x: [*const i8; M],
) -> [[int32x4_t; V]; M] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[vdupq_n_s32(0); V]; M];
        for j in 0..steps {
            let v = load::<V>(w.add(j * STEP_BYTES));
            let mut rows = [vdupq_n_s8(0); M];
            for m in 0..M {
                rows[m] = vld1q_s8(x[m].add(j * STEP));
            }
            unroll!(i < V => {
                let codes = low(v[i]);
                for m in 0..M {
                    acc[m][i] = dot_lane::<0>(acc[m][i], codes, rows[m]);
                }
                let codes = low(vshrq_n_u8::<2>(v[i]));
                for m in 0..M {
                    acc[m][i] = dot_lane::<1>(acc[m][i], codes, rows[m]);
                }
                let codes = low(vshrq_n_u8::<4>(v[i]));
                for m in 0..M {
                    acc[m][i] = dot_lane::<2>(acc[m][i], codes, rows[m]);
                }
                let codes = vreinterpretq_s8_u8(vshrq_n_u8::<6>(v[i]));
                for m in 0..M {
                    acc[m][i] = dot_lane::<3>(acc[m][i], codes, rows[m]);
                }
            });
        }
        acc
    }
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
            let mut acc = [[[vdupq_n_s32(0); N]; M]; 2];
            for b in 0..blocks {
                rows_block::<M, N, 4>(&mut acc, w, stride, x, b);
            }
            if half != 0 {
                rows_block::<M, N, 2>(&mut acc, w, stride, x, blocks);
            }
            for m in 0..M {
                for r in 0..N {
                    acc[0][m][r] = vaddq_s32(acc[0][m][r], acc[1][m][r]);
                }
            }
            totals(acc[0])
        }
    }
}

/// Adds the products of the first `G` groups of block `b` of `N` rows with `M` activation rows.
///
/// # Safety
/// The CPU has the dot-product extension; block `b` of `N` rows whose activations take `stride` bytes can be
/// read at `w`, and 128 * `b` + 32 * `G` activations at each `x`.
#[inline(always)]
unsafe fn rows_block<const M: usize, const N: usize, const G: usize>(
    acc: &mut [[[int32x4_t; N]; M]; 2],
    w: *const u8,
    stride: usize,
    x: [*const i8; M],
    b: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        // Few sums would wait for themselves: then the bit groups take turns at two sets of them.
        let spread = if M * N <= 4 { 2 } else { 1 };
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
                            let acc = &mut acc[g % spread][m][r];
                            *acc = dot(*acc, codes[r], x);
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
/// The CPU has the dot-product extension; a row of stride.div_ceil(128) blocks can be read at `w`, and
/// `stride` activations at `x`.
#[inline(always)]
unsafe fn row_sums(w: *const u8, stride: usize, x: *const i8) -> int32x4_t {
    // SAFETY: the caller's promise: 128 activations for a whole block, 64 for a last half one.
    unsafe {
        let (blocks, half) = (stride / BLOCK, stride % BLOCK);
        // A set of sums for each half of a block, in it one for each bit group: that at bits 2 is 4 times
        // too large, that at bits 4 is 16 times, at most 16 * 2 * 128 * 2^23/32 = 2^30 in a lane.
        let mut acc = [[vdupq_n_s32(0); 4]; 2];
        for b in 0..blocks {
            block::<4>(&mut acc, w.add(b * BLOCK_BYTES), x.add(b * BLOCK));
        }
        if half != 0 {
            block::<2>(&mut acc, w.add(blocks * BLOCK_BYTES), x.add(blocks * BLOCK));
        }
        let sums = acc.map(|[a, b, c, d]| vaddq_s32(descaled(a, b, c), d));
        vaddq_s32(sums[0], sums[1])
    }
}

/// Adds the products of a block's first `G` groups, group g to the sums 3 - g.
///
/// # Safety
/// The CPU has the dot-product extension; a block can be read at `w` and 32 * `G` activations at `x`.
#[inline(always)]
unsafe fn block<const G: usize>(acc: &mut [[int32x4_t; 4]; 2], w: *const u8, x: *const i8) {
    // SAFETY: the caller's promise.
    unsafe {
        let v = load::<2>(w);
        for half in 0..2 {
            let codes = scaled(v[half]);
            for g in 0..G {
                let x = vld1q_s8(x.add(32 * g + 16 * half));
                acc[half][3 - g] = dot(acc[half][3 - g], codes[3 - g], x);
            }
        }
    }
}

/// The four codes of each byte, those at bits 2 and 4 where they are: 4 and 16 times too large.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn scaled(v: uint8x16_t) -> [int8x16_t; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        [
            vandq_u8(v, vdupq_n_u8(0x03)),
            vandq_u8(v, vdupq_n_u8(0x0c)),
            vandq_u8(v, vdupq_n_u8(0x30)),
            // Where it is it would be the sign.
            vshrq_n_u8::<6>(v),
        ]
        .map(|codes| vreinterpretq_s8_u8(codes))
    }
}

/// a + b / 4 + c / 16, where the quotients are exact.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn descaled(a: int32x4_t, b: int32x4_t, c: int32x4_t) -> int32x4_t {
    // SAFETY: the caller's promise.
    unsafe { vsraq_n_s32::<4>(vsraq_n_s32::<2>(a, b), c) }
}

/// Adds to each lane the four products of its bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(acc: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sum = acc;
    // SAFETY: the CPU has the instruction, and it does nothing but compute `sum`.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sum, in(vreg) codes, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Adds to each lane the four products of its bytes with those of lane `LANE` of `x`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot_lane<const LANE: usize>(acc: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    const { assert!(LANE < 4) }
    let mut sum = acc;
    // SAFETY: as in `dot`.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]",
            inout(vreg) sum, in(vreg) codes, in(vreg) x, const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Adds the products of the 16 bytes `OFFSET` behind `w`, 16 weights of each of four rows, with `x`: to the
/// first sums those of the codes at bits 0 and 6, to the second those at bits 2, 4 times too large, to the
/// third those at bits 4, 16 times too large. One block of assembly, so that it takes three registers and no
/// more: with the sums and the masks that is nearly all there are.
///
/// # Safety
/// 16 bytes can be read `OFFSET` behind `w`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dot_scaled<const OFFSET: usize>(acc: &mut [int32x4_t; 3], w: *const u8, x: int8x16_t) {
    let [first, second, third] = acc;
    // SAFETY: the CPU has the instructions; they read those 16 bytes and compute the sums, nothing else.
    unsafe {
        asm!(
            "ldr {c:q}, [{w}, #{offset}]",
            "and {a:v}.16b, {c:v}.16b, {mask0:v}.16b",
            "and {b:v}.16b, {c:v}.16b, {mask1:v}.16b",
            "sdot {first:v}.4s, {a:v}.16b, {x:v}.4b[0]",
            "sdot {second:v}.4s, {b:v}.16b, {x:v}.4b[1]",
            "and {a:v}.16b, {c:v}.16b, {mask2:v}.16b",
            // Where it is this code would be the sign.
            "ushr {b:v}.16b, {c:v}.16b, #6",
            "sdot {third:v}.4s, {a:v}.16b, {x:v}.4b[2]",
            "sdot {first:v}.4s, {b:v}.16b, {x:v}.4b[3]",
            w = in(reg) w,
            offset = const OFFSET,
            first = inout(vreg) *first,
            second = inout(vreg) *second,
            third = inout(vreg) *third,
            x = in(vreg) x,
            mask0 = in(vreg) vdupq_n_u8(0x03),
            mask1 = in(vreg) vdupq_n_u8(0x0c),
            mask2 = in(vreg) vdupq_n_u8(0x30),
            a = out(vreg) _,
            b = out(vreg) _,
            c = out(vreg) _,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
}
