//! Q4_K: 256 weights in 144 bytes, laid out as [`q4_k_block`] says. A value is d * scale * q - dmin * min.

use super::blocks::{each_block, encode_blocks, larger, random_scale, range};
use super::facts::Facts;
use super::q6_k::QK_K;
use crate::f16_at;
use crate::random::SplitMix64;
use half::f16;

/// Bytes in a Q4_K block.
pub const Q4_K_BYTES: usize = 144;

/// Weights that share a scale and a minimum.
const PART: usize = 32;
/// Where the codes begin, in Q4_K and Q5_K.
pub(super) const CODES: usize = 16;

pub(super) const FACTS: Facts = Facts {
    name: "Q4_K",
    gguf_type: 12,
    dtype: None,
    block_len: QK_K,
    block_bytes: Q4_K_BYTES,
    ternary: None,
    decode: |row, out| each_block(row, out, q4_k_block),
    encode: |x, row| {
        encode_blocks("Q4_K", x, row, |x, block: &mut [u8; Q4_K_BYTES]| {
            let (codes, d) = encode_parts(x, 15, block);
            set_nibbles(&codes, &mut block[CODES..]);
            d
        })
    },
    random: |deviation, random, out| {
        random_scales(deviation, 16.0, random, out);
        random.bytes(QK_K / 2, out);
    },
};

/// The 256 values of a Q4_K block: d * scale * q - dmin * min, the products with d and dmin first.
///
/// | bytes | |
/// | --- | --- |
/// | 0..2, 2..4 | f16 d, f16 dmin |
/// | 4..16 | a 6-bit scale and a 6-bit min for each of the 8 parts of 32 weights. Part i < 4: the low 6 bits of byte 4+i and of byte 8+i. Part i >= 4: the low and the high nibble of byte 8+i, with the high 2 bits of byte i and of byte 4+i above them |
/// | 16..144 | the codes, 32 bytes for two parts: byte i holds the weights i (low nibble) and 32+i |
#[inline(always)]
pub fn q4_k_block(block: &[u8; Q4_K_BYTES], out: &mut [f32; QK_K]) {
    let scales = parts(&block[..CODES]);
    for (pair, out) in out.as_chunks_mut::<{ 2 * PART }>().0.iter_mut().enumerate() {
        let ((d0, m0), (d1, m1)) = (scales[2 * pair], scales[2 * pair + 1]);
        let bytes = &block[CODES + PART * pair..][..PART];
        let (low, high) = out.split_at_mut(PART);
        for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
            *low = d0 * f32::from(byte & 15) - m0;
            *high = d1 * f32::from(byte >> 4) - m1;
        }
    }
}

/// (d * scale, dmin * min) of each part of a Q4_K or Q5_K block.
#[inline(always)]
pub(super) fn parts(head: &[u8]) -> [(f32, f32); 8] {
    let (d, dmin) = (f16_at(head, 0), f16_at(head, 2));
    let mut parts = [(0.0, 0.0); 8];
    for i in 0..4 {
        let (a, b, c) = (head[4 + i], head[8 + i], head[12 + i]);
        parts[i] = (d * f32::from(a & 63), dmin * f32::from(b & 63));
        parts[4 + i] = (d * f32::from(c & 15 | a >> 6 << 4), dmin * f32::from(c >> 4 | b >> 6 << 4));
    }
    parts
}

/// Writes d, dmin, and the scale and the min of each part: the inverse of [`parts`].
fn set_parts(d: f16, dmin: f16, scales: &[u8; 8], mins: &[u8; 8], head: &mut [u8]) {
    head[..2].copy_from_slice(&d.to_le_bytes());
    head[2..4].copy_from_slice(&dmin.to_le_bytes());
    for i in 0..4 {
        head[4 + i] = scales[i] | scales[4 + i] >> 4 << 6;
        head[8 + i] = mins[i] | mins[4 + i] >> 4 << 6;
        head[12 + i] = scales[4 + i] & 15 | mins[4 + i] << 4;
    }
}

/// Writes the low 4 bits of the codes.
pub(super) fn set_nibbles(codes: &[u8; QK_K], bytes: &mut [u8]) {
    for (codes, bytes) in codes.chunks_exact(2 * PART).zip(bytes.chunks_exact_mut(PART)) {
        for i in 0..PART {
            bytes[i] = codes[i] & 15 | codes[PART + i] << 4;
        }
    }
}

/// Writes the head of a block and returns its codes, at most `levels`, and the larger of d and dmin.
///
/// The min of a part is its least value (zero if that is positive), and its scale what maps the largest to
/// `levels`: ggml looks for the two with the least squared error instead.
pub(super) fn encode_parts(x: &[f32; QK_K], levels: u8, head: &mut [u8]) -> ([u8; QK_K], f32) {
    let levels = f32::from(levels);
    let ranges: [(f32, f32); 8] = std::array::from_fn(|i| range(&x[PART * i..][..PART]));
    // Finite, as x / 63 is, whose difference may overflow.
    let dmin = ranges.iter().fold(0.0f32, |largest, &(min, _)| largest.max(-min)) / 63.0;
    let dmin16 = f16::from_f32(dmin);
    let mut mins = [0u8; 8];
    let mut offsets = [0.0f32; 8];
    if dmin16 != f16::ZERO && dmin16.is_finite() {
        for (i, (min, _)) in ranges.iter().enumerate() {
            mins[i] = (-min / dmin16.to_f32()).round_ties_even().clamp(0.0, 63.0) as u8;
            offsets[i] = dmin16.to_f32() * f32::from(mins[i]);
        }
    }
    let steps: [f32; 8] = std::array::from_fn(|i| ((ranges[i].1 + offsets[i]) / levels).max(0.0));
    let d = steps.iter().fold(0.0f32, |largest, &step| largest.max(step)) / 63.0;
    let d16 = f16::from_f32(d);
    let mut scales = [0u8; 8];
    let mut codes = [0; QK_K];
    if d16 != f16::ZERO && d16.is_finite() {
        for i in 0..8 {
            // Upwards, so that the largest value is not cut off.
            scales[i] = (steps[i] / d16.to_f32()).ceil().clamp(0.0, 63.0) as u8;
            let step = d16.to_f32() * f32::from(scales[i]);
            if step != 0.0 {
                for j in PART * i..PART * (i + 1) {
                    codes[j] = ((x[j] + offsets[i]) / step).round_ties_even().clamp(0.0, levels) as u8;
                }
            }
        }
    }
    set_parts(d16, dmin16, &scales, &mins, head);
    (codes, larger(d, dmin))
}

/// Appends a head with which uniform codes below `codes` have the mean 0: 6-bit scales of 32 to 63, and mins equal
/// to them.
pub(super) fn random_scales(deviation: f32, codes: f32, random: &mut SplitMix64, out: &mut Vec<u8>) {
    let word = random.next_u64();
    let scales = std::array::from_fn(|i| 32 + (word >> (5 * i) & 31) as u8);
    // The root mean square of 32 .. 63.
    let d = random_scale(deviation, codes, 48.389);
    let dmin = f16::from_f32(d.to_f32() * (codes - 1.0) / 2.0);
    let mut head = [0; CODES];
    set_parts(d, dmin, &scales, &scales, &mut head);
    out.extend(head);
}
