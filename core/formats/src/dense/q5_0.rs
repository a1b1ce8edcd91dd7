//! Q5_0: 32 weights in 22 bytes, laid out as [`q5_0_block`] says. A value is d * (q - 16).

use super::blocks::{QK, each_block, encode_blocks, inverse, random_signed_scale, signed_max};
use super::facts::Facts;
use crate::f16_at;
use half::f16;

/// Bytes in a Q5_0 block.
pub const Q5_0_BYTES: usize = 22;

pub(super) const FACTS: Facts = Facts {
    name: "Q5_0",
    gguf_type: 6,
    dtype: None,
    block_len: QK,
    block_bytes: Q5_0_BYTES,
    ternary: None,
    decode: |row, out| each_block(row, out, q5_0_block),
    encode: |x, row| encode_blocks("Q5_0", x, row, encode),
    random: |deviation, random, out| {
        out.extend(random_signed_scale(deviation, 32.0, random).to_le_bytes());
        random.bytes(4 + QK / 2, out);
    },
};

/// The 32 values of a Q5_0 block: d * (q - 16).
///
/// | bytes | |
/// | --- | --- |
/// | 0..2 | f16 d |
/// | 2..6 | the high bits of q: bit i of this little-endian u32 is that of weight i |
/// | 6..22 | the low 4 bits of q: byte i holds the weights i (low nibble) and 16+i |
#[inline(always)]
pub fn q5_0_block(block: &[u8; Q5_0_BYTES], out: &mut [f32; QK]) {
    let d = f16_at(block, 0);
    for (value, q) in out.iter_mut().zip(fives(&block[2..])) {
        *value = f32::from(q as i8 - 16) * d;
    }
}

/// The 32 codes q (0..32) of a Q5_0 or Q5_1 block, from where its high bits begin.
#[inline(always)]
pub(super) fn fives(bytes: &[u8]) -> [u8; QK] {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let mut codes = [0; QK];
    for i in 0..QK / 2 {
        codes[i] = bytes[4 + i] & 15 | ((bits >> i & 1) << 4) as u8;
        codes[QK / 2 + i] = bytes[4 + i] >> 4 | ((bits >> (QK / 2 + i) & 1) << 4) as u8;
    }
    codes
}

/// The inverse of [`fives`].
pub(super) fn set_fives(codes: &[u8; QK], bytes: &mut [u8]) {
    let bits = codes.iter().rev().fold(0u32, |bits, q| bits << 1 | u32::from(q >> 4));
    bytes[..4].copy_from_slice(&bits.to_le_bytes());
    for i in 0..QK / 2 {
        bytes[4 + i] = codes[i] & 15 | codes[QK / 2 + i] << 4;
    }
}

/// `quantize_row_q5_0_ref`: d = max / -16 with max the signed value of the largest magnitude, so that it gets code
/// 0; q = min(31, trunc(x / d + 16.5)).
fn encode(x: &[f32; QK], block: &mut [u8; Q5_0_BYTES]) -> f32 {
    let d = signed_max(x) / -16.0;
    let id = inverse(d);
    [block[0], block[1]] = f16::from_f32(d).to_le_bytes();
    set_fives(&x.map(|v| ((v * id + 16.5) as u8).min(31)), &mut block[2..]);
    d
}
