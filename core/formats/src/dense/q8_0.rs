//! Q8_0: 32 weights in 34 bytes, an f16 d and 32 x i8 q. A value is d * q.

use super::blocks::{QK, each_block, encode_blocks, inverse, random_signed_scale, signed_max};
use super::facts::Facts;
use crate::f16_at;
use half::f16;

/// Bytes in a Q8_0 block.
pub const Q8_0_BYTES: usize = 34;

pub(super) const FACTS: Facts = Facts {
    name: "Q8_0",
    gguf_type: 8,
    dtype: None,
    block_len: QK,
    block_bytes: Q8_0_BYTES,
    ternary: None,
    decode: |row, out| each_block(row, out, q8_0_block),
    encode: |x, row| encode_blocks("Q8_0", x, row, encode),
    random: |deviation, random, out| {
        out.extend(random_signed_scale(deviation, 256.0, random).to_le_bytes());
        random.bytes(QK, out);
    },
};

/// The 32 values of a Q8_0 block: d * q.
///
/// This and the other block decoders have loops without branches and are inlined always, so that a
/// caller compiled for a richer instruction set gets them vectorised for it.
#[inline(always)]
pub fn q8_0_block(block: &[u8; Q8_0_BYTES], out: &mut [f32; QK]) {
    let d = f16_at(block, 0);
    for (value, &q) in out.iter_mut().zip(&block[2..]) {
        *value = f32::from(q as i8) * d;
    }
}

/// `quantize_row_q8_0_ref`: d = max|x| / 127, q = x / d rounded half away from zero.
fn encode(x: &[f32; QK], block: &mut [u8; Q8_0_BYTES]) -> f32 {
    let d = signed_max(x).abs() / 127.0;
    let id = inverse(d);
    [block[0], block[1]] = f16::from_f32(d).to_le_bytes();
    for (q, &v) in block[2..].iter_mut().zip(x) {
        *q = (v * id).round() as i8 as u8;
    }
    d
}
