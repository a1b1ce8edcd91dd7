//! What the formats of integer blocks share.

use crate::FormatError;
use crate::random::SplitMix64;
use half::f16;

/// Weights in a block of Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL.
pub const QK: usize = 32;

#[inline(always)]
pub(super) fn each_block<const BYTES: usize, const LEN: usize>(
    row: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in row.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, out);
    }
}

/// Encodes a row block after block: `encode` returns the scale of a block.
pub(super) fn encode_blocks<const LEN: usize, const BYTES: usize>(
    format: &'static str,
    x: &[f32],
    row: &mut [u8],
    encode: impl Fn(&[f32; LEN], &mut [u8; BYTES]) -> f32,
) -> Result<(), FormatError> {
    if let Some(column) = x.iter().position(|v| !v.is_finite()) {
        return Err(FormatError::NotFinite { row: 0, column, value: x[column] });
    }
    for (block, (x, bytes)) in x.as_chunks().0.iter().zip(row.as_chunks_mut().0).enumerate() {
        let scale = encode(x, bytes);
        if f16::from_f32(scale).is_infinite() {
            return Err(FormatError::ScaleOverflow { format, block, scale });
        }
    }
    Ok(())
}

/// 1/d, or zero for the zero that a block of zeros has.
pub(super) fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value of the largest magnitude, with its sign; the first of several.
pub(super) fn signed_max(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |max, &v| if v.abs() > max.abs() { v } else { max })
}

/// The least and the largest of finite values.
pub(super) fn range(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &v| (min.min(v), max.max(v)))
}

/// The one of two scales that f16 is likelier not to hold.
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if b.abs() > a.abs() { b } else { a }
}

/// The scale with which `codes` equally likely codes, times `scale`, have this standard deviation.
pub(super) fn random_scale(deviation: f32, codes: f32, scale: f32) -> f16 {
    // The deviation of uniform codes: sqrt((n^2 - 1) / 12) for n of them.
    f16::from_f32(deviation / (((codes * codes - 1.0) / 12.0).sqrt() * scale))
}

/// [`random_scale`] with a random sign.
pub(super) fn random_signed_scale(deviation: f32, codes: f32, random: &mut SplitMix64) -> f16 {
    let negative = random.next_u64() >> 63 == 1;
    let d = random_scale(deviation, codes, 1.0);
    if negative { -d } else { d }
}
