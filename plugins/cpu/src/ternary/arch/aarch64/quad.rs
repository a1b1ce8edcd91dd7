//! What the kernels on 128-bit registers share: loads and horizontal sums.

use std::arch::aarch64::*;

use bitnet_burn_plugin::canonical::BLOCK_BYTES;

use crate::ternary::generic::row_bytes;

/// `N` registers from `w`, one behind the other.
///
/// # Safety
/// The CPU has NEON; 16 * `N` bytes can be read at `w`.
#[inline(always)]
pub(super) unsafe fn load<const N: usize>(w: *const u8) -> [uint8x16_t; N] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut v = [vdupq_n_u8(0); N];
        for (i, v) in v.iter_mut().enumerate() {
            *v = vld1q_u8(w.add(16 * i));
        }
        v
    }
}

/// Bytes 16 * `half` .. 16 * `half` + 16 of block `b` of `N` rows.
///
/// # Safety
/// The CPU has NEON; `N` rows whose activations take `stride` bytes, with more than `b` blocks each, can be
/// read at `w`; `half` is 0 or 1.
#[inline(always)]
pub(super) unsafe fn load_rows<const N: usize>(
    w: *const u8,
    stride: usize,
    b: usize,
    half: usize,
) -> [uint8x16_t; N] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut v = [vdupq_n_u8(0); N];
        for (r, v) in v.iter_mut().enumerate() {
            *v = vld1q_u8(w.add(r * row_bytes(stride) + b * BLOCK_BYTES + 16 * half));
        }
        v
    }
}

/// The lowest codes of each byte, 0 to 3.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
pub(super) unsafe fn low(v: uint8x16_t) -> int8x16_t {
    // SAFETY: the caller's promise.
    unsafe { vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(3))) }
}

/// Writes `N` vectors of four sums to `sums`.
///
/// # Safety
/// The CPU has NEON; `sums` has 4 * `N` elements.
#[inline(always)]
pub(super) unsafe fn store<const N: usize>(v: [int32x4_t; N], sums: &mut [i32]) {
    for (v, sums) in v.into_iter().zip(sums.chunks_exact_mut(4)) {
        // SAFETY: the caller's promise; a chunk has four elements.
        unsafe { vst1q_s32(sums.as_mut_ptr(), v) }
    }
}

/// The sums of the lanes of each vector.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
pub(super) unsafe fn totals<const M: usize, const N: usize>(v: [[int32x4_t; N]; M]) -> [[i32; N]; M] {
    // SAFETY: the caller's promise.
    v.map(|v| v.map(|v| unsafe { vaddvq_s32(v) }))
}
