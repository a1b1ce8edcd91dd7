//! Q5_K: 256 weights in 176 bytes, laid out as [`q5_k_block`] says. A value is d * scale * q - dmin * min.

use super::blocks::{each_block, encode_blocks};
use super::facts::Facts;
use super::q4_k::{CODES, encode_parts, parts, random_scales, set_nibbles};
use super::q6_k::QK_K;

/// Bytes in a Q5_K block.
pub const Q5_K_BYTES: usize = 176;

/// Where the low 4 bits of the codes begin.
const LOW: usize = CODES + 32;

pub(super) const FACTS: Facts = Facts {
    name: "Q5_K",
    gguf_type: 13,
    dtype: None,
    block_len: QK_K,
    block_bytes: Q5_K_BYTES,
    ternary: None,
    decode: |row, out| each_block(row, out, q5_k_block),
    encode: |x, row| encode_blocks("Q5_K", x, row, encode),
    random: |deviation, random, out| {
        random_scales(deviation, 32.0, random, out);
        random.bytes(Q5_K_BYTES - CODES, out);
    },
};

/// The 256 values of a Q5_K block: d * scale * q - dmin * min, the products with d and dmin first.
///
/// | bytes | |
/// | --- | --- |
/// | 0..16 | d, dmin, scales and mins, as [`q4_k_block`](super::q4_k_block) has them |
/// | 16..48 | the high bit of the codes: bit p of byte i is that of weight i of part p |
/// | 48..176 | the low 4 bits of the codes, as those of Q4_K |
#[inline(always)]
pub fn q5_k_block(block: &[u8; Q5_K_BYTES], out: &mut [f32; QK_K]) {
    let scales = parts(&block[..CODES]);
    let bits = &block[CODES..LOW];
    for (pair, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let ((d0, m0), (d1, m1)) = (scales[2 * pair], scales[2 * pair + 1]);
        let bytes = &block[LOW + 32 * pair..][..32];
        let (low, high) = out.split_at_mut(32);
        for (((low, high), &byte), &bits) in low.iter_mut().zip(high).zip(bytes).zip(bits) {
            let bits = bits >> (2 * pair);
            *low = d0 * f32::from(byte & 15 | (bits & 1) << 4) - m0;
            *high = d1 * f32::from(byte >> 4 | (bits & 2) << 3) - m1;
        }
    }
}

fn encode(x: &[f32; QK_K], block: &mut [u8; Q5_K_BYTES]) -> f32 {
    let (codes, d) = encode_parts(x, 31, block);
    set_nibbles(&codes, &mut block[LOW..]);
    for (i, bits) in block[CODES..LOW].iter_mut().enumerate() {
        *bits = (0..8).fold(0, |bits, part| bits | codes[32 * part + i] >> 4 << part);
    }
    d
}
