//! AVX-VNNI: `vpdpbusd` on 256-bit registers, for CPUs without AVX-512.

use std::arch::x86_64::*;

use bitnet_burn_plugin::canonical::{BLOCK, BLOCK_BYTES};

use super::kernels;
use super::ymm::{ROW_PREFETCH, TILE_PREFETCH, first, groups, load_rows, split, totals};
use crate::ternary::generic::{RowMicro, TileMicro, row_bytes};
use crate::ternary::tile::{BLOCK_ROWS, STEP, STEP_BYTES};

/// The products with `vpdpbusd ymm`.
struct Micro;

kernels!(
    Micro,
    features: ["avx2", "avxvnni"],
    rows: c"i2s-avxvnni",
    tiles: c"t2-avxvnni",
    scaled: c"t2-avxvnni-scaled",
    // `TileMicro::gemv` keeps sums that are 4 times too large, of every second weight: they reach
    // 4 * 2 * 128 * K/2 in magnitude, -2^31 at K = 2^22.
    tiles_max_k: 1 << 22,
);

impl TileMicro for Micro {
    const MR: usize = 4;

    #[inline(always)]
    unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS] {
        // SAFETY: the caller promises the features, `steps` steps of 128 bytes at w and 16 activations for
        // each at x; a prefetch may have any address.
        unsafe {
            // Sums in 16 registers have to share: acc[.][0] for the codes at bits 0 and 4, acc[.][1] for
            // those at 2 and 6, 4 times too large, since one shift then serves two groups.
            let masks = [_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c)];
            let mut acc = [[_mm256_setzero_si256(); 2]; 4];
            for j in 0..steps {
                let w = w.add(j * STEP_BYTES);
                let x = x.add(j * STEP).cast::<i32>();
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH).cast());
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH + 64).cast());
                let x = [
                    _mm256_set1_epi32(x.read_unaligned()),
                    _mm256_set1_epi32(x.add(1).read_unaligned()),
                    _mm256_set1_epi32(x.add(2).read_unaligned()),
                    _mm256_set1_epi32(x.add(3).read_unaligned()),
                ];
                for part in 0..4 {
                    let v = _mm256_loadu_si256(w.add(32 * part).cast());
                    let u = _mm256_srli_epi16::<4>(v);
                    for i in 0..2 {
                        let a = &mut acc[part][i];
                        *a = _mm256_dpbusd_avx_epi32(*a, _mm256_and_si256(v, masks[i]), x[i]);
                        *a = _mm256_dpbusd_avx_epi32(*a, _mm256_and_si256(u, masks[i]), x[2 + i]);
                    }
                }
            }
            let mut sums = [0; BLOCK_ROWS];
            for part in 0..4 {
                let sum = _mm256_add_epi32(acc[part][0], _mm256_srai_epi32::<2>(acc[part][1]));
                _mm256_storeu_si256(sums[8 * part..].as_mut_ptr().cast(), sum);
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn gemm<const M: usize>(w: *const u8, steps: usize, x: [*const i8; M]) -> [[i32; BLOCK_ROWS]; M] {
        // SAFETY: as in `gemv`, for each of the rows.
        unsafe {
            let mask = _mm256_set1_epi8(3);
            let mut sums = [[0; BLOCK_ROWS]; M];
            // The two tiles one after the other: 4 rows of activations by 16 of weights fill 8 registers.
            for tile in 0..2 {
                // Few activation rows leave registers free: more sums, so that each waits less for itself.
                let spread = if M <= 2 { 2 } else { 1 };
                let mut acc = [[[_mm256_setzero_si256(); 2]; 2]; M];
                for j in 0..steps {
                    let w = w.add(j * STEP_BYTES + 64 * tile);
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH).cast());
                    let mut v = [_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(32).cast())];
                    for t in 0..4 {
                        let codes = [_mm256_and_si256(v[0], mask), _mm256_and_si256(v[1], mask)];
                        for m in 0..M {
                            let x = x[m].add(j * STEP + 4 * t).cast::<i32>().read_unaligned();
                            let x = _mm256_set1_epi32(x);
                            let acc = &mut acc[m][t % spread];
                            acc[0] = _mm256_dpbusd_avx_epi32(acc[0], codes[0], x);
                            acc[1] = _mm256_dpbusd_avx_epi32(acc[1], codes[1], x);
                        }
                        v = [_mm256_srli_epi16::<2>(v[0]), _mm256_srli_epi16::<2>(v[1])];
                    }
                }
                for m in 0..M {
                    for half in 0..2 {
                        let out = sums[m][16 * tile + 8 * half..].as_mut_ptr();
                        _mm256_storeu_si256(out.cast(), _mm256_add_epi32(acc[m][0][half], acc[m][1][half]));
                    }
                }
            }
            sums
        }
    }
}

impl RowMicro for Micro {
    const MR: usize = 4;
    const NR: usize = 2;
    const GROUP: usize = 8;

    #[inline(always)]
    unsafe fn gemv<const N: usize>(w: *const u8, stride: usize, x: *const i8) -> [i32; N] {
        // SAFETY: the caller promises the features and N rows of that many bytes at w.
        unsafe {
            let mut rows = [_mm256_setzero_si256(); 8];
            for (r, row) in rows.iter_mut().enumerate().take(N) {
                *row = row_sums(w.add(r * row_bytes(stride)), stride, x);
            }
            first(totals(rows))
        }
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
            let mask = _mm256_set1_epi8(3);
            // Few sums would wait for themselves: then the bit groups take turns at two sets of them.
            let spread = if M * N <= 4 { 2 } else { 1 };
            let mut acc = [[[_mm256_setzero_si256(); N]; M]; 2];
            for b in 0..stride.div_ceil(BLOCK) {
                let groups = groups(stride, b);
                let mut v = load_rows::<N>(w, stride, b);
                for g in (0..4).rev() {
                    if g < groups {
                        for m in 0..M {
                            let x = _mm256_loadu_si256(x[m].add(b * BLOCK + 32 * g).cast());
                            for r in 0..N {
                                let codes = _mm256_and_si256(v[r], mask);
                                let acc = &mut acc[g % spread][m][r];
                                *acc = _mm256_dpbusd_avx_epi32(*acc, codes, x);
                            }
                        }
                    }
                    for v in &mut v {
                        *v = _mm256_srli_epi16::<2>(*v);
                    }
                }
            }
            for m in 0..M {
                for r in 0..N {
                    acc[0][m][r] = _mm256_add_epi32(acc[0][m][r], acc[1][m][r]);
                }
            }
            split(acc[0])
        }
    }
}

/// The products of one row, in eight sums.
///
/// # Safety
/// The CPU has AVX-VNNI; a row of stride.div_ceil(128) blocks can be read at `w`, and `stride` activations
/// at `x`.
#[inline(always)]
unsafe fn row_sums(w: *const u8, stride: usize, x: *const i8) -> __m256i {
    // SAFETY: the caller's promise: 128 activations for a whole block, 64 for a last half one; a prefetch
    // may have any address.
    unsafe {
        let (blocks, half) = (stride / BLOCK, stride % BLOCK);
        // acc[.][0] for the bits 0 and 4, acc[.][1] for 2 and 6, 4 times too large: at most
        // 4 * 2 * 128 * 2^23/16 = 2^29 in a lane.
        let masks = [_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c)];
        let mut acc = [[_mm256_setzero_si256(); 2]; 4];
        let mut b = 0;
        while b + 4 <= blocks {
            for u in 0..4 {
                let w = w.add((b + u) * BLOCK_BYTES);
                if u % 2 == 0 {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ROW_PREFETCH).cast());
                }
                block(&mut acc[u], w, x.add((b + u) * BLOCK), &masks);
            }
            b += 4;
        }
        while b < blocks {
            let w = w.add(b * BLOCK_BYTES);
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ROW_PREFETCH).cast());
            block(&mut acc[0], w, x.add(b * BLOCK), &masks);
            b += 1;
        }
        if half != 0 {
            half_block(&mut acc[0], w.add(b * BLOCK_BYTES), x.add(b * BLOCK), &masks);
        }
        let mut sum = _mm256_setzero_si256();
        for [a, b] in acc {
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, _mm256_srai_epi32::<2>(b)));
        }
        sum
    }
}

/// Adds the products of one block.
///
/// # Safety
/// The CPU has AVX-VNNI; a block can be read at `w` and 128 activations at `x`.
#[inline(always)]
unsafe fn block(acc: &mut [__m256i; 2], w: *const u8, x: *const i8, masks: &[__m256i; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        let v = _mm256_loadu_si256(w.cast());
        for i in 0..2 {
            // Bits 1..0 hold group 3, bits 3..2 group 2.
            let x = _mm256_loadu_si256(x.add(32 * (3 - i)).cast());
            acc[i] = _mm256_dpbusd_avx_epi32(acc[i], _mm256_and_si256(v, masks[i]), x);
        }
        half_block(acc, w, x, masks);
    }
}

/// Adds the products of the first half of a block.
///
/// # Safety
/// The CPU has AVX-VNNI; a block can be read at `w` and 64 activations at `x`.
#[inline(always)]
unsafe fn half_block(acc: &mut [__m256i; 2], w: *const u8, x: *const i8, masks: &[__m256i; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        let u = _mm256_srli_epi16::<4>(_mm256_loadu_si256(w.cast()));
        for i in 0..2 {
            // Bits 5..4 hold group 1, bits 7..6 group 0.
            let x = _mm256_loadu_si256(x.add(32 * (1 - i)).cast());
            acc[i] = _mm256_dpbusd_avx_epi32(acc[i], _mm256_and_si256(u, masks[i]), x);
        }
    }
}
