//! Q2_0 and PQ2_0: ternary weights at 2 bits in their order, and an f16 scale d for 64 or 128 of them.
//!
//! | bytes | |
//! | --- | --- |
//! | 0..2 | d: a weight's value is (code - 1) * d |
//! | 2.. | byte i holds the weights 4i, 4i+1, 4i+2, 4i+3 in the bit pairs 1..0, 3..2, 5..4, 7..6 |
//!
//! The code 3 stands for no ternary weight and decodes to 2d, as in ggml.
//!
//! (ggml, `block_q2_0`; PQ2_0 is Prism ML's, whose first files have it under Q2_0's number: see
//! [`FileError::GroupsOf128`](crate::FileError::GroupsOf128).)

use super::facts::{Facts, Ternary};
use crate::{TernaryBlocks, f16_at};
use half::f16;

/// Weights in a Q2_0 block.
const LEN: usize = 64;
/// Bytes in a Q2_0 block.
pub const Q2_0_BYTES: usize = 18;
/// Weights in a PQ2_0 block.
const P_LEN: usize = 128;
/// Bytes in a PQ2_0 block.
pub const PQ2_0_BYTES: usize = 34;

const Q2_0_BLOCKS: TernaryBlocks<LEN, Q2_0_BYTES> = TernaryBlocks { format: "Q2_0", decode, encode };
const PQ2_0_BLOCKS: TernaryBlocks<P_LEN, PQ2_0_BYTES> = TernaryBlocks { format: "PQ2_0", decode, encode };

pub(super) const Q2_0: Facts = Facts {
    name: "Q2_0",
    gguf_type: 42,
    dtype: None,
    block_len: LEN,
    block_bytes: Q2_0_BYTES,
    ternary: Some(Ternary {
        read: |row, weights, scales| Q2_0_BLOCKS.decode_row(row, weights, scales),
        write: |weights, scales, row| Q2_0_BLOCKS.encode_row(weights, scales, row),
        write_nearest: |x, row| Q2_0_BLOCKS.encode_nearest(x, row),
    }),
    decode: |row, out| Q2_0_BLOCKS.decode_values(row, out),
    encode: |x, row| Q2_0_BLOCKS.encode_values(x, row),
    random: |deviation, random, out| Q2_0_BLOCKS.random(deviation, random, out),
};

pub(super) const PQ2_0: Facts = Facts {
    name: "PQ2_0",
    gguf_type: 142,
    dtype: None,
    block_len: P_LEN,
    block_bytes: PQ2_0_BYTES,
    ternary: Some(Ternary {
        read: |row, weights, scales| PQ2_0_BLOCKS.decode_row(row, weights, scales),
        write: |weights, scales, row| PQ2_0_BLOCKS.encode_row(weights, scales, row),
        write_nearest: |x, row| PQ2_0_BLOCKS.encode_nearest(x, row),
    }),
    decode: |row, out| PQ2_0_BLOCKS.decode_values(row, out),
    encode: |x, row| PQ2_0_BLOCKS.encode_values(x, row),
    random: |deviation, random, out| PQ2_0_BLOCKS.random(deviation, random, out),
};

#[inline(always)]
fn decode<const LEN: usize, const BYTES: usize>(block: &[u8; BYTES], weights: &mut [i8; LEN]) -> f32 {
    for (byte, weights) in block[2..].iter().zip(weights.as_chunks_mut::<4>().0) {
        *weights = [0, 2, 4, 6].map(|shift| (byte >> shift & 3) as i8 - 1);
    }
    f16_at(block, 0)
}

fn encode<const LEN: usize, const BYTES: usize>(weights: &[i8; LEN], d: f16, block: &mut [u8; BYTES]) {
    [block[0], block[1]] = d.to_le_bytes();
    for (byte, weights) in block[2..].iter_mut().zip(weights.as_chunks::<4>().0) {
        let [a, b, c, d] = weights.map(|w| (w + 1) as u8);
        *byte = a | b << 2 | c << 4 | d << 6;
    }
}
