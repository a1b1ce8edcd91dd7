//! NEON: the look-up tables of [`lut`], read by `tbl` for 16 rows at once.

use std::arch::aarch64::*;

use super::quad::{load, store};
use super::unroll;
use crate::ternary::lut::{self, GROUPS, INDEX_BYTES, RADIX, STEPS_PER_FLUSH, TABLE_BYTES, TableMicro};
use crate::ternary::tile::BLOCK_ROWS;

/// The sums with `tbl`.
struct Micro;

lut::kernels!(
    Micro,
    feature: "neon",
    tl1: c"tl1-neon",
    tl2: c"tl2-neon",
);

impl TableMicro for Micro {
    #[inline(always)]
    unsafe fn gemv<const G: usize, const B: usize>(
        w: *const u8,
        steps: usize,
        tables: *const u8,
    ) -> [[i32; BLOCK_ROWS]; B] {
        // SAFETY: the caller promises the features, the blocks at w and their tables.
        unsafe {
            let block_bytes = steps * lut::step_bytes::<G>();
            let radix = vdup_n_s8(RADIX as i8);
            // Four rows each, in their order.
            let mut wide = [[vdupq_n_s32(0); 8]; B];
            let mut start = 0;
            while start < steps {
                let end = steps.min(start + STEPS_PER_FLUSH);
                let mut acc = [[vdupq_n_s16(0); 4]; B];
                for j in start..end {
                    let w = w.add(j * lut::step_bytes::<G>());
                    let tables = tables.add(j * GROUPS * TABLE_BYTES);
                    let mut signs = [[vdupq_n_s8(0); 2]; B];
                    if G == 3 {
                        for b in 0..B {
                            let bytes = load::<2>(w.add(b * block_bytes + INDEX_BYTES));
                            signs[b] = [vreinterpretq_s8_u8(bytes[0]), vreinterpretq_s8_u8(bytes[1])];
                        }
                    }
                    // The sums of low and of high digits, 16 rows each.
                    let mut sums = [[[vdupq_n_s8(0); 2]; 2]; B];
                    unroll!(i < GROUPS => {
                        let table = load::<2>(tables.add(i * TABLE_BYTES));
                        for b in 0..B {
                            let bytes = load::<2>(w.add(b * block_bytes + BLOCK_ROWS * (i / 2)));
                            for half in 0..2 {
                                let index = match i % 2 {
                                    0 => vandq_u8(bytes[half], vdupq_n_u8(15)),
                                    _ => vshrq_n_u8::<4>(bytes[half]),
                                };
                                // -1 or 1, from the sign that is in bit 7 when its turn comes.
                                let sign = vorrq_s8(vshrq_n_s8::<7>(signs[b][half]), vdupq_n_s8(1));
                                for d in 0..2 {
                                    let digit = vreinterpretq_s8_u8(vqtbl1q_u8(table[d], index));
                                    let sum = &mut sums[b][half][d];
                                    *sum = match G {
                                        2 => vaddq_s8(*sum, digit),
                                        _ => vmlaq_s8(*sum, digit, sign),
                                    };
                                }
                                signs[b][half] = vshlq_n_s8::<1>(signs[b][half]);
                            }
                        }
                    });
                    for b in 0..B {
                        for half in 0..2 {
                            let [low, high] = sums[b][half];
                            let (first, second) = (acc[b][2 * half], acc[b][2 * half + 1]);
                            let first = vaddw_s8(first, vget_low_s8(low));
                            acc[b][2 * half] = vmlal_s8(first, vget_low_s8(high), radix);
                            let second = vaddw_high_s8(second, low);
                            acc[b][2 * half + 1] = vmlal_high_s8(second, high, vcombine_s8(radix, radix));
                        }
                    }
                }
                for b in 0..B {
                    for i in 0..4 {
                        let acc = acc[b][i];
                        wide[b][2 * i] = vaddw_s16(wide[b][2 * i], vget_low_s16(acc));
                        wide[b][2 * i + 1] = vaddw_high_s16(wide[b][2 * i + 1], acc);
                    }
                }
                start = end;
            }
            let mut sums = [[0; BLOCK_ROWS]; B];
            for b in 0..B {
                store(wide[b], &mut sums[b]);
            }
            sums
        }
    }
}
