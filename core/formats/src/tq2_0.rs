//! TQ2_0 (GGUF type 35): 256 weights at 2 bits and an f16 scale d in 66 bytes.
//!
//! | bytes | |
//! | --- | --- |
//! | 0..64 | two groups of 128 weights in 32 bytes each: byte i of a group holds its weights i, 32+i, 64+i, 96+i in the bit pairs 1..0, 3..2, 5..4, 7..6; a code is the weight plus one |
//! | 64..66 | d: a weight's value is (code - 1) * d |
//!
//! (ggml, `ggml-common.h`: `block_tq2_0`; `ggml-quants.c`: `quantize_row_tq2_0_ref`.) It is a block
//! format, so a file may give every block a scale of its own. A BitNet tensor has one scale, and only such
//! tensors are read and written here; [`DenseFormat::TQ2_0`] reads the others, and
//! [`blocks`] writes them.

use super::{DenseFormat, FormatError, TernaryBlocks, blocks, f16_at};
use crate::dense::facts::{Facts, Ternary};
use half::f16;

/// Weights in a block.
pub const BLOCK: usize = 256;
/// Bytes in a block.
pub const BLOCK_BYTES: usize = 66;

const TQ2_0: TernaryBlocks<BLOCK, BLOCK_BYTES> = TernaryBlocks { format: "TQ2_0", decode, encode };

/// As a dense format, with a scale for each block.
pub(crate) const FACTS: Facts = Facts {
    name: "TQ2_0",
    gguf_type: 35,
    dtype: None,
    block_len: BLOCK,
    block_bytes: BLOCK_BYTES,
    ternary: Some(Ternary {
        read: |row, weights, scales| TQ2_0.decode_row(row, weights, scales),
        write: |weights, scales, row| TQ2_0.encode_row(weights, scales, row),
        write_nearest: |x, row| TQ2_0.encode_nearest(x, row),
    }),
    decode: |row, out| TQ2_0.decode_values(row, out),
    encode: |x, row| TQ2_0.encode_values(x, row),
    random: |deviation, random, out| TQ2_0.random(deviation, random, out),
};

/// Canonical rows and the scale of the [n, k] tensor in `data`.
///
/// The scale is the d that all blocks share. A block whose weights are all zero may hold any
/// d >= 0 (llama.cpp stores zero) and is not asked. A tensor without a single non-zero weight has
/// the scale 0.
///
/// # Errors
/// [`FormatError::Empty`], [`TooLarge`](FormatError::TooLarge),
/// [`NotAMultiple`](FormatError::NotAMultiple) (K by 256), [`Length`](FormatError::Length),
/// [`InvalidCode`](FormatError::InvalidCode), and for the scales
/// [`BadBlockScale`](FormatError::BadBlockScale), [`ZeroBlockScale`](FormatError::ZeroBlockScale),
/// [`MixedScales`](FormatError::MixedScales) with the block and both values.
pub fn to_canonical(data: &[u8], n: usize, k: usize) -> Result<(Vec<u8>, f32), FormatError> {
    TQ2_0.read(data, n, k)
}

/// The blocks of canonical rows [n, k] with the weight scale `scale`: byte for byte what llama.cpp
/// makes of the same tensor in floats.
///
/// # Errors
/// Those of [`blocks::write`]. The f32 mean of a trained tensor hardly ever is an f16.
pub fn from_canonical(rows: &[u8], n: usize, k: usize, scale: f32) -> Result<Vec<u8>, FormatError> {
    blocks::write_one_scale(DenseFormat::TQ2_0, rows, n, k, scale)
}

#[inline(always)]
fn decode(block: &[u8; BLOCK_BYTES], weights: &mut [i8; BLOCK]) -> f32 {
    for group in 0..2 {
        for pair in 0..4 {
            for i in 0..32 {
                weights[128 * group + 32 * pair + i] = ((block[32 * group + i] >> (2 * pair)) & 3) as i8 - 1;
            }
        }
    }
    f16_at(block, 64)
}

fn encode(weights: &[i8; BLOCK], d: f16, block: &mut [u8; BLOCK_BYTES]) {
    for group in 0..2 {
        for i in 0..32 {
            let code = |pair: usize| (weights[128 * group + 32 * pair + i] + 1) as u8;
            block[32 * group + i] = code(0) | code(1) << 2 | code(2) << 4 | code(3) << 6;
        }
    }
    [block[64], block[65]] = d.to_le_bytes();
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
        let golden = include_bytes!("../testdata/dense/ternary.tq2_0.bin");
        let (n, k) = (3, 512);
        let (rows, scale) = to_canonical(golden, n, k).unwrap();
        for (i, &v) in values.iter().enumerate() {
            let w = Row(&rows[i / k * canonical::row_bytes(k)..]).weight(i % k);
            assert_eq!(f32::from(w) * scale, v, "value {i}");
        }
        assert_eq!(from_canonical(&rows, n, k, scale).unwrap(), golden);
    }

    #[test]
    fn the_code_3_and_foreign_scales_are_refused() {
        let rows = canonical_rows(&[1; 2 * 512], 512);
        let good = from_canonical(&rows, 2, 512, 0.5).unwrap();
        let mut bad = good.clone();
        bad[2 * 66 + 32 + 7] |= 0b11_00_00_00; // row 1, block 0, group 1, weight 96 + 7
        assert_eq!(
            to_canonical(&bad, 2, 512),
            Err(FormatError::InvalidCode { format: "TQ2_0", row: 1, column: 128 + 103 })
        );
        bad.copy_from_slice(&good);
        bad[3 * 66 + 64..].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
        assert_eq!(
            to_canonical(&bad, 2, 512),
            Err(FormatError::MixedScales {
                format: "TQ2_0",
                block: 3,
                scale: 0.25,
                first_block: 0,
                first: 0.5
            })
        );
        assert!(matches!(
            to_canonical(&good, 1, 512),
            Err(FormatError::Length { expected: 132, got: 264, .. })
        ));
        assert!(matches!(
            to_canonical(&good, 4, 200),
            Err(FormatError::NotAMultiple { value: 200, of: 256, .. })
        ));
    }

    #[test]
    fn scales_that_f16_cannot_hold_are_refused() {
        let rows = canonical_rows(&[1; 256], 256);
        let error = |scale| from_canonical(&rows, 1, 256, scale).unwrap_err();
        let nearest = f16::from_f32(0.1).to_f32();
        let expected = FormatError::ScaleNotF16 { format: "TQ2_0", row: 0, column: 0, scale: 0.1, nearest };
        assert_eq!(error(0.1), expected);
        assert!(from_canonical(&rows, 1, 256, nearest).is_ok());
        assert!(matches!(error(1e6), FormatError::ScaleNotF16 { nearest: f32::INFINITY, .. }));
        for bad in [0.0, f32::NAN, f32::INFINITY] {
            assert!(matches!(error(bad), FormatError::BadScale { .. }));
        }
        // Without weights nothing depends on the scale.
        let zeros = canonical_rows(&[0; 256], 256);
        let data = from_canonical(&zeros, 1, 256, 1e-5).unwrap();
        assert_eq!(to_canonical(&data, 1, 256), Ok((zeros, 0.0)));
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
