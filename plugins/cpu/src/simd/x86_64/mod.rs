//! The operations in AVX-512 and AVX2.
//!
//! Small integers become floats without a conversion: put into the low bits of a power of two's mantissa,
//! they are that power plus the integer times the last bit's weight, and subtracting the power is exact.

mod avx2;
mod avx512;

use std::arch::x86_64::*;

pub use self::avx2::Avx2;
pub(super) use self::avx2::run_avx2;
pub use self::avx512::Avx512;
pub(super) use self::avx512::run_avx512;

/// Calls an intrinsic inside a method of a token.
macro_rules! by_token {
    ($($body:tt)*) => {
        // SAFETY: `self` is a token, which only `new` makes, after detecting the instructions; memory is
        // reached through references to arrays of the size that is read or written, by unaligned loads
        // and stores.
        unsafe { $($body)* }
    };
}
use by_token;

#[inline(always)]
pub(in crate::simd) fn prefetch(p: *const u8) {
    // SAFETY: SSE is part of x86-64, and prefetching is a hint that touches no memory and never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
}

/// The tree from eight lanes on.
#[inline]
#[target_feature(enable = "avx2")]
fn sum8(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

/// The base-3 digits of [`Isa::ternary_digits`](super::Isa::ternary_digits).
#[inline]
#[target_feature(enable = "avx2")]
fn digits(v: &[u8; 16], powers: &[u16; 16]) -> __m256i {
    // SAFETY: unaligned loads of the arrays' sizes.
    let (bytes, powers) =
        unsafe { (_mm_loadu_si128(v.as_ptr().cast()), _mm256_loadu_si256(powers.as_ptr().cast())) };
    // The fraction of byte / 256 * 3^i as 16 bits. The digit is the integer part of three times that.
    let fractions = _mm256_mullo_epi16(_mm256_cvtepu8_epi16(bytes), powers);
    _mm256_mulhi_epu16(fractions, _mm256_set1_epi16(3))
}
