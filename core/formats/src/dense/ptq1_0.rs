//! PTQ1_0 (Prism ML's, GGUF type 143): 128 ternary weights in base 3 and an f16 scale d in 28 bytes.
//!
//! | bytes | |
//! | --- | --- |
//! | 0..16 | byte i holds the weights i, 16+i, 32+i, 48+i, 64+i |
//! | 16..24 | byte i holds the weights 80 + (i, 8+i, 16+i, 24+i, 32+i) |
//! | 24..26 | byte i holds the weights 120 + (i, 2+i, 4+i, 6+i), and a fifth digit 0 |
//! | 26..28 | d: a weight's value is (digit - 1) * d |
//!
//! The digits of a byte are those of [`tq1_0`](crate::tq1_0).

use super::facts::{Facts, Ternary};
use crate::tq1_0::{Part, decode_digits, encode_digits};
use crate::{TernaryBlocks, f16_at};
use half::f16;

/// Weights in a block.
const LEN: usize = 128;
/// Bytes in a PTQ1_0 block.
pub const PTQ1_0_BYTES: usize = 28;

const BLOCKS: TernaryBlocks<LEN, PTQ1_0_BYTES> = TernaryBlocks { format: "PTQ1_0", decode, encode };

pub(super) const FACTS: Facts = Facts {
    name: "PTQ1_0",
    gguf_type: 143,
    dtype: None,
    block_len: LEN,
    block_bytes: PTQ1_0_BYTES,
    ternary: Some(Ternary {
        read: |row, weights, scales| BLOCKS.decode_row(row, weights, scales),
        write: |weights, scales, row| BLOCKS.encode_row(weights, scales, row),
        write_nearest: |x, row| BLOCKS.encode_nearest(x, row),
    }),
    decode: |row, out| BLOCKS.decode_values(row, out),
    encode: |x, row| BLOCKS.encode_values(x, row),
    random: |deviation, random, out| BLOCKS.random(deviation, random, out),
};

const PARTS: [Part; 3] = [(0, 16, 5, 0), (16, 8, 5, 80), (24, 2, 4, 120)];

#[inline(always)]
fn decode(block: &[u8; PTQ1_0_BYTES], weights: &mut [i8; LEN]) -> f32 {
    decode_digits(&PARTS, block, weights);
    f16_at(block, 26)
}

fn encode(weights: &[i8; LEN], d: f16, block: &mut [u8; PTQ1_0_BYTES]) {
    encode_digits(&PARTS, weights, block);
    [block[26], block[27]] = d.to_le_bytes();
}
