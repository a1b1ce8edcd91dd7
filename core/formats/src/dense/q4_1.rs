//! Q4_1: 32 weights in 20 bytes, an f16 d, an f16 m and 16 bytes as those of Q4_0. A value is d * q + m.

use super::blocks::{QK, each_block, encode_blocks, inverse, larger, random_scale, range};
use super::facts::Facts;
use crate::f16_at;
use half::f16;

/// Bytes in a Q4_1 block.
pub const Q4_1_BYTES: usize = 20;

pub(super) const FACTS: Facts = Facts {
    name: "Q4_1",
    gguf_type: 3,
    dtype: None,
    block_len: QK,
    block_bytes: Q4_1_BYTES,
    ternary: None,
    decode: |row, out| each_block(row, out, q4_1_block),
    encode: |x, row| encode_blocks("Q4_1", x, row, encode),
    random: |deviation, random, out| {
        let d = random_scale(deviation, 16.0, 1.0);
        out.extend(d.to_le_bytes());
        out.extend(f16::from_f32(-7.5 * d.to_f32()).to_le_bytes());
        random.bytes(QK / 2, out);
    },
};

/// The 32 values of a Q4_1 block: d * q + m. Bytes 0..2 are d, 2..4 m; byte 4 + i holds the codes of the weights i
/// (low nibble) and 16+i.
#[inline(always)]
pub fn q4_1_block(block: &[u8; Q4_1_BYTES], out: &mut [f32; QK]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    let (low, high) = out.split_at_mut(QK / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[4..]) {
        *low = f32::from(byte & 15) * d + m;
        *high = f32::from(byte >> 4) * d + m;
    }
}

/// `quantize_row_q4_1_ref`: m = min, d = (max - min) / 15, q = min(15, trunc((x - m) / d + 0.5)).
fn encode(x: &[f32; QK], block: &mut [u8; Q4_1_BYTES]) -> f32 {
    let (min, max) = range(x);
    let d = (max - min) / 15.0;
    let id = inverse(d);
    [block[0], block[1]] = f16::from_f32(d).to_le_bytes();
    [block[2], block[3]] = f16::from_f32(min).to_le_bytes();
    for i in 0..QK / 2 {
        let code = |v: f32| (((v - min) * id + 0.5) as u8).min(15);
        block[4 + i] = code(x[i]) | code(x[QK / 2 + i]) << 4;
    }
    larger(d, min)
}
