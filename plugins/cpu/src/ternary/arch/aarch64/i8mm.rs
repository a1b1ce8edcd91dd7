//! The matrix-multiply extension for int8 (part of ARMv8.6): `smmla`, two rows of eight weights times two of
//! activations in one instruction. One activation row alone is left to `sdot`, and so are canonical rows,
//! where pairing rows up costs as much as it saves.

use std::arch::aarch64::*;
use std::arch::asm;

use super::dotprod::{self, TILES_MAX_K};
use super::kernels;
use super::quad::{load, low, store};
use crate::ternary::generic::TileMicro;
use crate::ternary::tile::{BLOCK_ROWS, STEP, STEP_BYTES};

/// The products with `smmla`.
struct Micro;

kernels!(
    Micro,
    features: ["neon", "dotprod", "i8mm"],
    tiles: c"t2-i8mm",
    scaled: c"t2-i8mm-scaled",
    tiles_max_k: TILES_MAX_K,
);

impl TileMicro for Micro {
    const MR: usize = 8;

    #[inline(always)]
    unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS] {
        // SAFETY: the caller's promise.
        unsafe { dotprod::gemv(w, steps, x) }
    }

    #[inline(always)]
    unsafe fn gemm<const M: usize>(w: *const u8, steps: usize, x: [*const i8; M]) -> [[i32; BLOCK_ROWS]; M] {
        // SAFETY: the caller's promise; an odd last row is its own partner. Up to 16 registers of sums.
        unsafe {
            match M {
                ..=2 => pairs::<M, 1, 4>(w, steps, x),
                3 | 4 => pairs::<M, 2, 4>(w, steps, x),
                5 | 6 => pairs::<M, 3, 2>(w, steps, x),
                _ => pairs::<M, 4, 2>(w, steps, x),
            }
        }
    }
}

/// Sums of the 32 rows with `M` activation rows in `P` pairs, `V` registers of weights at a time.
///
/// # Safety
/// The CPU has the matrix-multiply extension; `steps` steps of 128 bytes can be read at `w`, and 16
/// activations for each at each `x`. `P` is half of `M`, rounded up, and `V` divides 8.
#[inline(always)]
unsafe fn pairs<const M: usize, const P: usize, const V: usize>(
    w: *const u8,
    steps: usize,
    x: [*const i8; M],
) -> [[i32; BLOCK_ROWS]; M] {
    let mut sums = [[0; BLOCK_ROWS]; M];
    for part in (0..8).step_by(V) {
        // SAFETY: the caller's promise; part + V <= 8.
        let some = unsafe { columns::<M, P, V>(w.add(16 * part), steps, x) };
        for m in 0..M {
            // SAFETY: the features as above; 4 * (8 - part) elements are at least 4 * V.
            unsafe { store(some[m / 2].map(|v| v[m % 2]), &mut sums[m][4 * part..]) };
        }
    }
    sums
}

/// Sums of `4 * V` rows of a block with each of `P` pairs of activation rows.
///
/// # Safety
/// The CPU has the matrix-multiply extension; the first 16 * `V` bytes of each of `steps` steps from `w` can
/// be read, and 16 activations for each at each `x`. `P` is half of `M`, rounded up.
#[inline(always)]
unsafe fn columns<const M: usize, const P: usize, const V: usize>(
    w: *const u8,
    steps: usize,
    x: [*const i8; M],
) -> [[[int32x4_t; 2]; V]; P] {
    // SAFETY: the caller's promise.
    unsafe {
        // acc[p][i][h]: the rows 2h and 2h + 1 of register i with the activations 2p and 2p + 1, as in
        // [w0 x0, w0 x1, w1 x0, w1 x1].
        let mut acc = [[[vdupq_n_s32(0); 2]; V]; P];
        for j in 0..steps {
            let v = load::<V>(w.add(j * STEP_BYTES));
            // Activations 0 to 7 of both rows, and 8 to 15.
            let mut rows = [[vdupq_n_s8(0); 2]; P];
            for p in 0..P {
                let a = vreinterpretq_s64_s8(vld1q_s8(x[2 * p].add(j * STEP)));
                let b = vreinterpretq_s64_s8(vld1q_s8(x[(2 * p + 1).min(M - 1)].add(j * STEP)));
                rows[p] = [vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))];
            }
            for i in 0..V {
                let codes = [
                    low(v[i]),
                    low(vshrq_n_u8::<2>(v[i])),
                    low(vshrq_n_u8::<4>(v[i])),
                    vreinterpretq_s8_u8(vshrq_n_u8::<6>(v[i])),
                ]
                .map(|codes| vreinterpretq_s32_s8(codes));
                for eight in 0..2 {
                    // Two lanes of four weights of a row, one behind the other.
                    let (a, b) = (codes[2 * eight], codes[2 * eight + 1]);
                    let pair = [vzip1q_s32(a, b), vzip2q_s32(a, b)].map(|v| vreinterpretq_s8_s32(v));
                    for p in 0..P {
                        for h in 0..2 {
                            acc[p][i][h] = multiply(acc[p][i][h], pair[h], rows[p][eight]);
                        }
                    }
                }
            }
        }
        // Four rows with one activation row.
        acc.map(|v| v.map(|[a, b]| [vuzp1q_s32(a, b), vuzp2q_s32(a, b)]))
    }
}

/// Adds the 2 x 2 products of two rows of eight with two rows of eight.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn multiply(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sum = acc;
    // SAFETY: the CPU has the instruction, and it does nothing but compute `sum`.
    unsafe {
        asm!(
            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sum, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
