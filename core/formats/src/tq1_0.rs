//! TQ1_0 (GGUF type 34): 256 weights in base 3 and an f16 scale d in 54 bytes.
//!
//! | bytes | |
//! | --- | --- |
//! | 0..32 | byte i holds the weights i, 32+i, 64+i, 96+i, 128+i |
//! | 32..48 | byte i holds the weights 160 + (i, 16+i, 32+i, 48+i, 64+i) |
//! | 48..52 | byte i holds the weights 240 + (i, 4+i, 8+i, 12+i), and a fifth digit 0 |
//! | 52..54 | d: a weight's value is (digit - 1) * d |
//!
//! A byte is a fixed-point fraction: five base-3 digits, most significant first, make a number
//! v in 0..243, stored as ceil(v * 256 / 243). So digit i is the integer part of 3 * frac(byte/256 *
//! 3^i): a multiplication by 3^i that drops the bits above the byte, then one by 3 whose bits above
//! the byte are the digit; no division. Every byte decodes to something; the 13 byte values that
//! `ceil` never yields mean the same as a neighbour, as in ggml.
//!
//! (ggml, `ggml-common.h`: `block_tq1_0`; `ggml-quants.c`: `quantize_row_tq1_0_ref`.) Scales as in
//! [`tq2_0`](super::tq2_0).

use super::{DenseFormat, FormatError, TernaryBlocks, blocks, f16_at};
use crate::dense::facts::{Facts, Ternary};
use half::f16;

/// Weights in a block.
pub const BLOCK: usize = 256;
/// Bytes in a block.
pub const BLOCK_BYTES: usize = 54;

const TQ1_0: TernaryBlocks<BLOCK, BLOCK_BYTES> = TernaryBlocks { format: "TQ1_0", decode, encode };

/// As a dense format, with a scale for each block.
pub(crate) const FACTS: Facts = Facts {
    name: "TQ1_0",
    gguf_type: 34,
    dtype: None,
    block_len: BLOCK,
    block_bytes: BLOCK_BYTES,
    ternary: Some(Ternary {
        read: |row, weights, scales| TQ1_0.decode_row(row, weights, scales),
        write: |weights, scales, row| TQ1_0.encode_row(weights, scales, row),
        write_nearest: |x, row| TQ1_0.encode_nearest(x, row),
    }),
    decode: |row, out| TQ1_0.decode_values(row, out),
    encode: |x, row| TQ1_0.encode_values(x, row),
    random: |deviation, random, out| TQ1_0.random(deviation, random, out),
};

/// A part of a block in base 3: (first byte, bytes, digits a byte, first weight). Its byte i holds the weights
/// first + i, first + bytes + i, ..., one a digit.
pub(crate) type Part = (usize, usize, usize, usize);

/// The three parts of a block.
const PARTS: [Part; 3] = [(0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240)];

/// Canonical rows and the scale of the [n, k] tensor in `data`.
///
/// The scale is the d that all blocks share. A block whose weights are all zero may hold any
/// d >= 0 (llama.cpp stores zero) and is not asked. A tensor without a single non-zero weight has
/// the scale 0.
///
/// # Errors
/// [`FormatError::Empty`], [`TooLarge`](FormatError::TooLarge),
/// [`NotAMultiple`](FormatError::NotAMultiple) (K by 256), [`Length`](FormatError::Length), and for
/// the scales [`BadBlockScale`](FormatError::BadBlockScale),
/// [`ZeroBlockScale`](FormatError::ZeroBlockScale), [`MixedScales`](FormatError::MixedScales) with
/// the block and both values.
pub fn to_canonical(data: &[u8], n: usize, k: usize) -> Result<(Vec<u8>, f32), FormatError> {
    TQ1_0.read(data, n, k)
}

/// The blocks of canonical rows [n, k] with the weight scale `scale`: byte for byte what llama.cpp
/// makes of the same tensor in floats.
///
/// # Errors
/// As [`tq2_0::from_canonical`](super::tq2_0::from_canonical): a scale that f16 can't hold is
/// refused, and the error holds the nearest one that it can.
pub fn from_canonical(rows: &[u8], n: usize, k: usize, scale: f32) -> Result<Vec<u8>, FormatError> {
    blocks::write_one_scale(DenseFormat::TQ1_0, rows, n, k, scale)
}

#[inline(always)]
fn decode(block: &[u8; BLOCK_BYTES], weights: &mut [i8; BLOCK]) -> f32 {
    decode_digits(&PARTS, block, weights);
    f16_at(block, 52)
}

fn encode(weights: &[i8; BLOCK], d: f16, block: &mut [u8; BLOCK_BYTES]) {
    encode_digits(&PARTS, weights, block);
    [block[52], block[53]] = d.to_le_bytes();
}

/// The weights of the parts of a block in base 3.
#[inline(always)]
pub(crate) fn decode_digits(parts: &[Part; 3], block: &[u8], weights: &mut [i8]) {
    for &(first, bytes, digits, weight) in parts {
        let mut power = 1u8;
        for digit in 0..digits {
            for i in 0..bytes {
                let fraction = block[first + i].wrapping_mul(power);
                weights[weight + digit * bytes + i] = ((u16::from(fraction) * 3) >> 8) as i8 - 1;
            }
            power = power.wrapping_mul(3);
        }
    }
}

/// The inverse of [`decode_digits`], of weights that are -1, 0 or 1.
pub(crate) fn encode_digits(parts: &[Part; 3], weights: &[i8], block: &mut [u8]) {
    for &(first, bytes, digits, weight) in parts {
        for i in 0..bytes {
            let digit = |digit: usize| {
                if digit < digits { (weights[weight + digit * bytes + i] + 1) as u16 } else { 0 }
            };
            let value = (0..5).fold(0, |value, d| value * 3 + digit(d));
            block[first + i] = (value * 256).div_ceil(243) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::canonical::{self, Row};
    use super::super::testing::{canonical_rows, f16_scale, floats, matrix};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gguf_py_golden() {
        let values = floats(include_bytes!("../testdata/dense/ternary.input.f32.bin"));
        let golden = include_bytes!("../testdata/dense/ternary.tq1_0.bin");
        let (n, k) = (3, 512);
        let (rows, scale) = to_canonical(golden, n, k).unwrap();
        for (i, &v) in values.iter().enumerate() {
            let w = Row(&rows[i / k * canonical::row_bytes(k)..]).weight(i % k);
            assert_eq!(f32::from(w) * scale, v, "value {i}");
        }
        assert_eq!(from_canonical(&rows, n, k, scale).unwrap(), golden);
    }

    /// Random bytes, among them those that no encoder writes, decode as gguf-py decodes them.
    #[test]
    fn gguf_py_golden_of_every_byte() {
        let blocks = include_bytes!("../testdata/dense/tq1_0.bin");
        let values = floats(include_bytes!("../testdata/dense/tq1_0.f32.bin"));
        for (block, values) in blocks.as_chunks().0.iter().zip(values.as_chunks::<256>().0) {
            let mut weights = [0; 256];
            let d = decode(block, &mut weights);
            assert_eq!(&weights.map(|w| f32::from(w) * d), values);
        }
    }

    #[test]
    fn every_group_of_five_digits_survives() {
        for value in 0..243u32 {
            let digits: Vec<i8> = (0..5).map(|i| (value / 3u32.pow(4 - i) % 3) as i8 - 1).collect();
            let mut weights = [0; 256];
            for (i, &w) in digits.iter().enumerate() {
                weights[32 * i + 3] = w;
            }
            let (mut block, mut back) = ([0; 54], [9; 256]);
            encode(&weights, f16::ONE, &mut block);
            assert_eq!(u32::from(block[3]), (value * 256).div_ceil(243));
            assert_eq!(decode(&block, &mut back), 1.0);
            assert_eq!(back, weights);
        }
    }

    #[test]
    fn foreign_scales_and_shapes_are_refused() {
        let rows = canonical_rows(&[1; 512], 512);
        let mut data = from_canonical(&rows, 1, 512, 0.5).unwrap();
        assert!(matches!(to_canonical(&data, 2, 512), Err(FormatError::Length { .. })));
        assert!(matches!(to_canonical(&data, 2, 300), Err(FormatError::NotAMultiple { .. })));
        assert!(matches!(from_canonical(&rows, 1, 512, 0.1), Err(FormatError::ScaleNotF16 { .. })));
        data[54 + 52..].copy_from_slice(&f16::NAN.to_le_bytes());
        assert!(matches!(to_canonical(&data, 1, 512), Err(FormatError::BadBlockScale { block: 1, .. })));
        data[54 + 52..].copy_from_slice(&[0, 0]);
        assert!(matches!(to_canonical(&data, 1, 512), Err(FormatError::ZeroBlockScale { block: 1, .. })));
    }

    proptest! {
        #[test]
        fn round_trip((n, k, weights) in matrix(1, 4, 256, 1024), scale in f16_scale()) {
            let rows = canonical_rows(&weights, k);
            let data = from_canonical(&rows, n, k, scale).unwrap();
            let expected = if weights.iter().all(|&w| w == 0) { 0.0 } else { scale };
            prop_assert_eq!(to_canonical(&data, n, k).unwrap(), (rows, expected));
        }

        #[test]
        fn any_bytes_give_a_result_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), n in 0usize..4, k in 0usize..4,
        ) {
            let _ = to_canonical(&bytes, n, k * 256);
            let _ = from_canonical(&bytes, n, k * 256, 1.0);
        }
    }
}
