//! Q5_1: 32 weights in 24 bytes, an f16 d, an f16 m and 20 bytes as those of Q5_0. A value is d * q + m.

use super::blocks::{QK, each_block, encode_blocks, inverse, larger, random_scale, range};
use super::facts::Facts;
use super::q5_0::{fives, set_fives};
use crate::f16_at;
use half::f16;

/// Bytes in a Q5_1 block.
pub const Q5_1_BYTES: usize = 24;

pub(super) const FACTS: Facts = Facts {
    name: "Q5_1",
    gguf_type: 7,
    dtype: None,
    block_len: QK,
    block_bytes: Q5_1_BYTES,
    ternary: None,
    decode: |row, out| each_block(row, out, q5_1_block),
    encode: |x, row| encode_blocks("Q5_1", x, row, encode),
    random: |deviation, random, out| {
        let d = random_scale(deviation, 32.0, 1.0);
        out.extend(d.to_le_bytes());
        out.extend(f16::from_f32(-15.5 * d.to_f32()).to_le_bytes());
        random.bytes(4 + QK / 2, out);
    },
};

/// The 32 values of a Q5_1 block: d * q + m. Bytes 0..2 are d, 2..4 m, and the others the codes, as
/// [`q5_0_block`](super::q5_0_block) has them.
#[inline(always)]
pub fn q5_1_block(block: &[u8; Q5_1_BYTES], out: &mut [f32; QK]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    for (value, q) in out.iter_mut().zip(fives(&block[4..])) {
        *value = f32::from(q) * d + m;
    }
}

/// `quantize_row_q5_1_ref`: m = min, d = (max - min) / 31, q = trunc((x - m) / d + 0.5).
fn encode(x: &[f32; QK], block: &mut [u8; Q5_1_BYTES]) -> f32 {
    let (min, max) = range(x);
    let d = (max - min) / 31.0;
    let id = inverse(d);
    [block[0], block[1]] = f16::from_f32(d).to_le_bytes();
    [block[2], block[3]] = f16::from_f32(min).to_le_bytes();
    set_fives(&x.map(|v| (((v - min) * id + 0.5) as u8).min(31)), &mut block[4..]);
    larger(d, min)
}
