//! Q4_0: 32 weights in 18 bytes, an f16 d and 16 bytes; byte i holds the weights i (low nibble) and 16+i. A value
//! is d * (q - 8).

use super::blocks::{QK, each_block, encode_blocks, inverse, random_signed_scale, signed_max};
use super::facts::Facts;
use crate::f16_at;
use half::f16;

/// Bytes in a Q4_0 block.
pub const Q4_0_BYTES: usize = 18;

pub(super) const FACTS: Facts = Facts {
    name: "Q4_0",
    gguf_type: 2,
    dtype: None,
    block_len: QK,
    block_bytes: Q4_0_BYTES,
    ternary: None,
    decode: |row, out| each_block(row, out, q4_0_block),
    encode: |x, row| encode_blocks("Q4_0", x, row, encode),
    random: |deviation, random, out| {
        out.extend(random_signed_scale(deviation, 16.0, random).to_le_bytes());
        random.bytes(QK / 2, out);
    },
};

/// The 32 values of a Q4_0 block: d * (q - 8).
#[inline(always)]
pub fn q4_0_block(block: &[u8; Q4_0_BYTES], out: &mut [f32; QK]) {
    let (d, codes) = (f16_at(block, 0), q4_0_codes(block));
    for (value, q) in out.iter_mut().zip(codes) {
        *value = f32::from(q as i8 - 8) * d;
    }
}

/// The 32 codes q (0..16) of a Q4_0 block.
#[inline(always)]
pub fn q4_0_codes(block: &[u8; Q4_0_BYTES]) -> [u8; QK] {
    let mut codes = [0; QK];
    for i in 0..QK / 2 {
        codes[i] = block[2 + i] & 15;
        codes[QK / 2 + i] = block[2 + i] >> 4;
    }
    codes
}

/// `quantize_row_q4_0_ref`: d = max / -8 with max the signed value of the largest magnitude, so that
/// it gets code 0; q = min(15, trunc(x / d + 8.5)).
fn encode(x: &[f32; QK], block: &mut [u8; Q4_0_BYTES]) -> f32 {
    let d = signed_max(x) / -8.0;
    let id = inverse(d);
    [block[0], block[1]] = f16::from_f32(d).to_le_bytes();
    for i in 0..QK / 2 {
        let code = |v: f32| ((v * id + 8.5) as u8).min(15);
        block[2 + i] = code(x[i]) | code(x[QK / 2 + i]) << 4;
    }
    d
}
