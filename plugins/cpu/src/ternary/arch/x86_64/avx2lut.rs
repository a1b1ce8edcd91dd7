//! AVX2: the look-up tables of [`lut`], read by `vpshufb` for 32 rows at once.

use std::arch::x86_64::*;

use crate::ternary::lut::{self, GROUPS, INDEX_BYTES, RADIX, STEPS_PER_FLUSH, TABLE_BYTES, TableMicro};
use crate::ternary::tile::BLOCK_ROWS;

/// The sums with `vpshufb ymm`.
struct Micro;

/// Steps ahead to prefetch in each stream: 2 KiB and more.
const AHEAD: usize = 16;

lut::kernels!(
    Micro,
    feature: "avx2",
    tl1: c"tl1-avx2",
    tl2: c"tl2-avx2",
);

impl TableMicro for Micro {
    #[inline(always)]
    unsafe fn gemv<const G: usize, const B: usize>(
        w: *const u8,
        steps: usize,
        tables: *const u8,
    ) -> [[i32; BLOCK_ROWS]; B] {
        // SAFETY: the caller promises the features, the blocks at w and their tables; a prefetch may have any
        // address.
        unsafe {
            let block_bytes = steps * lut::step_bytes::<G>();
            let one = _mm256_set1_epi8(1);
            let nibble = _mm256_set1_epi8(15);
            // Of each pair of bytes, the low digit counts once and the high one 27 times.
            let weights = _mm256_set1_epi16(1 | RADIX << 8);
            // Eight rows each: 0 .. 7, 8 .. 15, 16 .. 23, 24 .. 31.
            let mut wide = [[_mm256_setzero_si256(); 4]; B];
            let mut start = 0;
            while start < steps {
                let end = steps.min(start + STEPS_PER_FLUSH);
                // Sixteen rows each: eight from both halves of a register.
                let mut acc = [[_mm256_setzero_si256(); 2]; B];
                for j in start..end {
                    let w = w.add(j * lut::step_bytes::<G>());
                    let tables = tables.add(j * GROUPS * TABLE_BYTES).cast::<__m128i>();
                    // A group's sign is in bit 7 when its turn comes. The lowest bit, set, keeps the others
                    // from being zero, which would mean a factor of zero.
                    let mut signs = [one; B];
                    let mut last = [one; B];
                    // Sums of the low and of the high digits.
                    let mut sums = [[_mm256_setzero_si256(); 2]; B];
                    // Behind the end of its block, a stream goes on behind the other blocks.
                    let skip = if j + AHEAD < steps { 0 } else { (B - 1) * block_bytes };
                    for b in 0..B {
                        let w = w.add(b * block_bytes);
                        for line in 0..lut::step_bytes::<G>().div_ceil(64) {
                            let ahead = AHEAD * lut::step_bytes::<G>() + skip + 64 * line;
                            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ahead).cast());
                        }
                        if G == 3 {
                            let bits = _mm256_loadu_si256(w.add(INDEX_BYTES).cast());
                            signs[b] = _mm256_or_si256(bits, one);
                            last[b] = _mm256_or_si256(_mm256_slli_epi16::<7>(bits), one);
                        }
                    }
                    for i in 0..GROUPS {
                        let table = tables.add(2 * i);
                        let digits = [
                            _mm256_broadcastsi128_si256(_mm_loadu_si128(table)),
                            _mm256_broadcastsi128_si256(_mm_loadu_si128(table.add(1))),
                        ];
                        for b in 0..B {
                            let index = w.add(b * block_bytes + BLOCK_ROWS * (i / 2));
                            let index = _mm256_loadu_si256(index.cast());
                            let index = if i % 2 == 0 { index } else { _mm256_srli_epi16::<4>(index) };
                            let index = _mm256_and_si256(index, nibble);
                            let sign = if i == GROUPS - 1 { last[b] } else { signs[b] };
                            for d in 0..2 {
                                let mut digit = _mm256_shuffle_epi8(digits[d], index);
                                if G == 3 {
                                    digit = _mm256_sign_epi8(digit, sign);
                                }
                                sums[b][d] = _mm256_add_epi8(sums[b][d], digit);
                            }
                            signs[b] = _mm256_add_epi8(signs[b], signs[b]);
                        }
                    }
                    for b in 0..B {
                        let [low, high] = sums[b];
                        let pairs = [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)];
                        for i in 0..2 {
                            let sums = _mm256_maddubs_epi16(weights, pairs[i]);
                            acc[b][i] = _mm256_add_epi16(acc[b][i], sums);
                        }
                    }
                }
                for b in 0..B {
                    for i in 0..2 {
                        let (first, second) =
                            (_mm256_castsi256_si128(acc[b][i]), _mm256_extracti128_si256::<1>(acc[b][i]));
                        wide[b][i] = _mm256_add_epi32(wide[b][i], _mm256_cvtepi16_epi32(first));
                        wide[b][2 + i] = _mm256_add_epi32(wide[b][2 + i], _mm256_cvtepi16_epi32(second));
                    }
                }
                start = end;
            }
            let mut sums = [[0; BLOCK_ROWS]; B];
            for b in 0..B {
                for i in 0..4 {
                    _mm256_storeu_si256(sums[b][8 * i..].as_mut_ptr().cast(), wide[b][i]);
                }
            }
            sums
        }
    }
}
