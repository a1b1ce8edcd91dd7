//! IQ4_NL: 32 weights in 18 bytes, laid out as Q4_0. A value is d * NUMBERS[q].

use super::blocks::{QK, each_block, encode_blocks, inverse, random_signed_scale, signed_max};
use super::facts::Facts;
use crate::f16_at;
use half::f16;

/// Bytes in an IQ4_NL block.
pub const IQ4_NL_BYTES: usize = 18;

/// What the codes stand for (ggml, `kvalues_iq4nl`).
pub const IQ4_NL_NUMBERS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

pub(super) const FACTS: Facts = Facts {
    name: "IQ4_NL",
    gguf_type: 20,
    dtype: None,
    block_len: QK,
    block_bytes: IQ4_NL_BYTES,
    ternary: None,
    decode: |row, out| each_block(row, out, iq4_nl_block),
    encode: |x, row| encode_blocks("IQ4_NL", x, row, encode),
    random: |deviation, random, out| {
        // The root mean square of the numbers is 67.44, as that of 233.6 equally likely codes.
        out.extend(random_signed_scale(deviation, 233.6, random).to_le_bytes());
        random.bytes(QK / 2, out);
    },
};

/// The 32 values of an IQ4_NL block. Bytes 0..2 are d; byte 2 + i holds the codes of the weights i (low nibble) and
/// 16+i.
#[inline(always)]
pub fn iq4_nl_block(block: &[u8; IQ4_NL_BYTES], out: &mut [f32; QK]) {
    let d = f16_at(block, 0);
    let values = IQ4_NL_NUMBERS.map(|number| d * f32::from(number));
    let (low, high) = out.split_at_mut(QK / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[2..]) {
        *low = values[usize::from(byte & 15)];
        *high = values[usize::from(byte >> 4)];
    }
}

/// The nearest numbers, with the d that maps the value of the largest magnitude to -127.
fn encode(x: &[f32; QK], block: &mut [u8; IQ4_NL_BYTES]) -> f32 {
    let d = signed_max(x) / -127.0;
    let id = inverse(d);
    [block[0], block[1]] = f16::from_f32(d).to_le_bytes();
    for i in 0..QK / 2 {
        let code = |v: f32| {
            // How many of the midpoints between neighbours lie below.
            let twice = 2.0 * v * id;
            IQ4_NL_NUMBERS.array_windows().filter(|&&[a, b]| twice > f32::from(a) + f32::from(b)).count()
                as u8
        };
        block[2 + i] = code(x[i]) | code(x[QK / 2 + i]) << 4;
    }
    d
}
