//! What the two kernels on 256-bit registers share: loads and horizontal sums of canonical rows.

use std::arch::x86_64::*;

use bitnet_burn_plugin::canonical::{BLOCK, BLOCK_BYTES};

use crate::ternary::generic::row_bytes;

/// Bytes ahead to prefetch in blocks of 32 rows, one sequential stream.
pub(super) const TILE_PREFETCH: usize = 2048;
/// The same for rows, which are short.
pub(super) const ROW_PREFETCH: usize = 2048;

/// Bit groups of block `b` that have activations: all four, or the first two of a last half block.
#[inline(always)]
pub(super) fn groups(stride: usize, b: usize) -> usize {
    if (b + 1) * BLOCK <= stride { 4 } else { 2 }
}

/// Block `b` of `N` rows.
///
/// # Safety
/// The CPU has AVX; `N` rows whose activations take `stride` bytes, with more than `b` blocks each, can be
/// read at `w`.
#[inline(always)]
pub(super) unsafe fn load_rows<const N: usize>(w: *const u8, stride: usize, b: usize) -> [__m256i; N] {
    // SAFETY: the caller's promise; a prefetch may have any address.
    unsafe {
        let mut v = [_mm256_setzero_si256(); N];
        for r in 0..N {
            let w = w.add(r * row_bytes(stride) + b * BLOCK_BYTES);
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(ROW_PREFETCH).cast());
            v[r] = _mm256_loadu_si256(w.cast());
        }
        v
    }
}

/// The sums of the lanes of each vector; at most eight vectors.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn split<const M: usize, const N: usize>(acc: [[__m256i; N]; M]) -> [[i32; N]; M] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut flat = [_mm256_setzero_si256(); 8];
        for m in 0..M {
            for r in 0..N {
                flat[m * N + r] = acc[m][r];
            }
        }
        let totals: [i32; 8] = first(totals(flat));
        let mut sums = [[0; N]; M];
        for m in 0..M {
            for r in 0..N {
                sums[m][r] = totals[m * N + r];
            }
        }
        sums
    }
}

/// Lane i of the result is the sum of the lanes of `v[i]`.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn totals(v: [__m256i; 8]) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        // In each 128 bits [v0, v1, v2, v3], and [v4, v5, v6, v7]; then one half plus the other.
        let low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
        let high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
        let first = _mm256_permute2x128_si256::<0x20>(low, high);
        _mm256_add_epi32(first, _mm256_permute2x128_si256::<0x31>(low, high))
    }
}

/// The first `N` lanes.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
pub(super) unsafe fn first<const N: usize>(v: __m256i) -> [i32; N] {
    let mut all = [0; 8];
    // SAFETY: the caller's promise; `all` has 32 bytes.
    unsafe { _mm256_storeu_si256(all.as_mut_ptr().cast(), v) };
    let mut lanes = [0; N];
    lanes.copy_from_slice(&all[..N]);
    lanes
}
