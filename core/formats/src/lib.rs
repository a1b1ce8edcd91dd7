//! The formats in which files hold weights, and their translation to the canonical layout; the quantisers; and the
//! exact reference that every kernel is compared with. It knows neither Burn nor kernels.
//!
//! The canonical layout itself ([`canonical`], rows of I2_S) lives in the plugin crate, since every
//! kernel packs from it. Each other format's bit layout is written down in exactly one file here:
//!
//! | module | holds |
//! | --- | --- |
//! | [`hf`] | Hugging Face's packed uint8 |
//! | [`tq2_0`], [`tq1_0`] | llama.cpp's ternary blocks of 256, as tensors with one scale; [`dense`] has them too, with a scale for each block |
//! | [`iq_bn`] | ik_llama.cpp's ternary rows, as tensors with one scale or with one for each row |
//! | [`dense`] | what decodes to any values: floats, blocks of integers, blocks of ternary weights |
//! | [`dense_tiles`] | Q8_0, Q6_K and Q4_0 as kernels read them, 16 rows side by side |
//! | [`ternary`] | reading a dense tensor that holds ternary values |
//! | [`blocks`] | writing ternary matrices as blocks with a scale each |
//! | [`scales`] | the scales of matrices that have many |
//!
//! Two modules read and write the files that hold such tensors, [`gguf`] and [`safetensors`]; what a model is
//! they don't know.
//!
//! The formats are pure functions over byte slices in little-endian order. N is the number of rows
//! (output features), K the number of weights in a row (input features). Whatever the bytes say, a
//! function returns its result or a [`FormatError`]; none panics, and none allocates more than a
//! fixed multiple of the length of its input.
#![deny(unsafe_code)]

pub mod blocks;
pub mod dense;
pub mod dense_tiles;
mod error;
mod exact;
pub mod files;
pub mod gguf;
pub mod hf;
pub mod iq_bn;
mod json;
mod map;
pub mod quant;
pub mod random;
pub mod reference;
pub mod safetensors;
pub mod scales;
mod tensor;
pub mod ternary;
pub mod tq1_0;
pub mod tq2_0;

pub use bitnet_burn_plugin::canonical;
pub use dense::DenseFormat;
pub use error::{FileError, WriteError};
pub use exact::Progress;
pub use json::read_json;
pub use map::{FileMap, any_truncated, map_file, outlive_truncation};
pub use scales::{Scales, WeightScale};
pub use tensor::{DenseTensor, TernaryTensor};

use canonical::{Row, ZERO_BYTE};
use half::f16;

/// Each way in which the bytes of a tensor can be wrong. Rows, columns, blocks and codes count from
/// zero; blocks count through the tensor, row after row.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// A tensor without rows or without columns.
    #[error("{format}: a tensor of {n} x {k} weights has nothing in it")]
    Empty {
        /// The format's name.
        format: &'static str,
        /// Rows.
        n: usize,
        /// Weights in a row.
        k: usize,
    },
    /// A format without tiles, where one with them is wanted.
    #[error("{format} has no tiles; Q8_0, Q6_K and Q4_0 have")]
    NoTiles {
        /// The format's name.
        format: &'static str,
    },
    /// The size in bytes does not fit in a usize.
    #[error("{format}: a tensor of {n} x {k} weights is larger than this machine can address")]
    TooLarge {
        /// The format's name.
        format: &'static str,
        /// Rows.
        n: usize,
        /// Weights in a row.
        k: usize,
    },
    /// A dimension that the format cannot hold.
    #[error("{format} needs {dimension} to be a multiple of {of}, and it is {value}")]
    NotAMultiple {
        /// The format's name.
        format: &'static str,
        /// Which dimension: "K" or "N".
        dimension: &'static str,
        /// Its value.
        value: usize,
        /// What it must be a multiple of.
        of: usize,
    },
    /// A buffer whose length does not follow from the shape.
    #[error("{format}: {n} x {k} weights take {expected} {unit}, got {got}")]
    Length {
        /// The format's name.
        format: &'static str,
        /// Rows.
        n: usize,
        /// Weights in a row.
        k: usize,
        /// "bytes" or "values".
        unit: &'static str,
        /// The length that the shape asks for.
        expected: usize,
        /// The length that was found.
        got: usize,
    },
    /// The 2-bit code 3, which stands for no weight.
    #[error("{format}: row {row}, column {column} holds the code 3, which is no ternary weight")]
    InvalidCode {
        /// The format's name.
        format: &'static str,
        /// Row of the weight.
        row: usize,
        /// Column of the weight.
        column: usize,
    },
    /// The scale of a block is negative or not finite.
    #[error("{format}: block {block} has the scale {scale}, which is not a finite number >= 0")]
    BadBlockScale {
        /// The format's name.
        format: &'static str,
        /// The block.
        block: usize,
        /// Its scale.
        scale: f32,
    },
    /// A block with non-zero codes whose scale is zero: its values were lost when it was written.
    #[error("{format}: block {block} has non-zero weights and a scale of zero")]
    ZeroBlockScale {
        /// The format's name.
        format: &'static str,
        /// The block.
        block: usize,
    },
    /// Two blocks of a ternary tensor with different scales: no single scale fits the tensor.
    #[error(
        "{format}: block {block} has the scale {scale} and block {first_block} has {first}; \
         a ternary tensor has one scale"
    )]
    MixedScales {
        /// The format's name.
        format: &'static str,
        /// The first block that differs.
        block: usize,
        /// Its scale.
        scale: f32,
        /// The first block with non-zero weights.
        first_block: usize,
        /// Its scale.
        first: f32,
    },
    /// A code of a 4-bit block that does not occur when a ternary tensor is quantised.
    #[error(
        "{format}: weight {index} of block {block} has the code {code}; \
         only 0, 8 and 15 occur in a ternary tensor"
    )]
    NotTernaryCode {
        /// The format's name.
        format: &'static str,
        /// The block.
        block: usize,
        /// The weight within the block.
        index: usize,
        /// Its code.
        code: u8,
    },
    /// A value of a dense tensor that breaks {-s, 0, s}.
    #[error(
        "row {row}, column {column} holds {value}, which is none of 0 and \u{b1}{scale}: not a ternary tensor"
    )]
    NotTernary {
        /// Row of the value.
        row: usize,
        /// Column of the value.
        column: usize,
        /// The value.
        value: f32,
        /// s: the magnitude of the first non-zero value of the tensor, or of the group.
        scale: f32,
    },
    /// A NaN or an infinity where only finite values make sense.
    #[error("row {row}, column {column} holds {value}, which is not a finite number")]
    NotFinite {
        /// Row of the value.
        row: usize,
        /// Column of the value.
        column: usize,
        /// The value.
        value: f32,
    },
    /// The scale to be written is zero though there are non-zero weights, or not finite.
    #[error("row {row}, from column {column}: {format} cannot hold non-zero weights with the scale {scale}")]
    BadScale {
        /// The format's name.
        format: &'static str,
        /// The row.
        row: usize,
        /// Where the weights with that scale begin.
        column: usize,
        /// The scale.
        scale: f32,
    },
    /// The format stores scales as f16, and this scale is not an f16. Rounding it would change the weights: see
    /// [`blocks::write_nearest`].
    #[error(
        "row {row}, from column {column}: the scale is {scale}, and {format} holds scales as f16, of which {nearest} \
         is the nearest"
    )]
    ScaleNotF16 {
        /// The format's name.
        format: &'static str,
        /// The row.
        row: usize,
        /// Where the weights with that scale begin.
        column: usize,
        /// The scale.
        scale: f32,
        /// The nearest f16 (infinite or zero where the scale is out of range).
        nearest: f32,
    },
    /// The weights that share a scale in the format have several.
    #[error(
        "row {row}, from column {column}: the scale is {scale}, and before it {first}; {format} has one scale for \
         {block} weights of a row"
    )]
    SmallerGroups {
        /// The format's name.
        format: &'static str,
        /// Weights that share a scale in the format.
        block: usize,
        /// The row.
        row: usize,
        /// Where the weights with another scale begin.
        column: usize,
        /// Their scale.
        scale: f32,
        /// The scale of others in the same block.
        first: f32,
    },
    /// A format without blocks of ternary weights, where one with them is wanted.
    #[error("{format} has no blocks of ternary weights; Q2_0, PQ2_0, PTQ1_0, TQ1_0 and TQ2_0 have")]
    NoTernaryBlocks {
        /// The format's name.
        format: &'static str,
    },
    /// Values so large that the f16 scale of their block overflows.
    #[error("{format}: block {block} would need the scale {scale}, and f16 ends at 65504")]
    ScaleOverflow {
        /// The format's name.
        format: &'static str,
        /// The block within the row.
        block: usize,
        /// The scale.
        scale: f32,
    },
}

/// Checks that `rows` is an [n, k] matrix in the canonical layout: its length, and that no code is 3.
/// Kernels are entitled to both.
///
/// # Errors
/// [`FormatError::Empty`], [`TooLarge`](FormatError::TooLarge), [`Length`](FormatError::Length), or
/// [`InvalidCode`](FormatError::InvalidCode) with the first offender; its column is K or more where
/// it sits in the padding.
pub fn check_canonical(rows: &[u8], n: usize, k: usize) -> Result<(), FormatError> {
    const FORMAT: &str = "I2_S";
    let expected = canonical_bytes(FORMAT, n, k)?;
    check_length(FORMAT, n, k, "bytes", expected, rows.len())?;
    for (row, bytes) in rows.chunks_exact(canonical::row_bytes(k)).enumerate() {
        // The whole row without a branch; the position only when it is needed.
        if bytes.iter().fold(0, |bad, &b| bad | (b & (b >> 1))) & ZERO_BYTE != 0 {
            let codes = Row(bytes);
            let column = (0..bytes.len() * 4).find(|&c| codes.code(c) == 3).unwrap_or(k);
            return Err(FormatError::InvalidCode { format: FORMAT, row, column });
        }
    }
    Ok(())
}

/// Bytes of an [n, k] matrix in the canonical layout; neither dimension may be zero.
pub(crate) fn canonical_bytes(format: &'static str, n: usize, k: usize) -> Result<usize, FormatError> {
    if n == 0 || k == 0 {
        return Err(FormatError::Empty { format, n, k });
    }
    canonical::matrix_bytes(n, k).ok_or(FormatError::TooLarge { format, n, k })
}

impl FormatError {
    /// The same of row `n` of a matrix, where it was found in a row by itself.
    fn in_row(self, n: usize) -> Self {
        self.moved(n, 0)
    }

    /// The same of row `n` of a matrix, where it was found in a part of a row that begins with column `k`.
    fn moved(mut self, n: usize, k: usize) -> Self {
        if let Self::NotFinite { row, column, .. }
        | Self::NotTernary { row, column, .. }
        | Self::BadScale { row, column, .. }
        | Self::ScaleNotF16 { row, column, .. }
        | Self::SmallerGroups { row, column, .. } = &mut self
        {
            *row = n;
            *column += k;
        }
        self
    }
}

fn check_length(
    format: &'static str,
    n: usize,
    k: usize,
    unit: &'static str,
    expected: usize,
    got: usize,
) -> Result<(), FormatError> {
    if expected == got { Ok(()) } else { Err(FormatError::Length { format, n, k, unit, expected, got }) }
}

/// Checks the shape and the length of `[n, k]` values.
pub(crate) fn check_values(
    format: &'static str,
    n: usize,
    k: usize,
    got: usize,
) -> Result<usize, FormatError> {
    let bytes = canonical_bytes(format, n, k)?;
    let expected = n.checked_mul(k).ok_or(FormatError::TooLarge { format, n, k })?;
    check_length(format, n, k, "values", expected, got)?;
    Ok(bytes)
}

/// An f16 that a block stores in two bytes.
///
/// `to_f32_const` is the software conversion: it inlines into a caller's SIMD loop, where the
/// run-time detection behind `to_f32` would be a call per block.
#[inline(always)]
fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32_const()
}

/// The one scale of a ternary tensor that is stored in blocks with a scale each.
///
/// A block whose weights are all zero says nothing about the scale, whatever it stores (llama.cpp
/// stores zero there). All others must agree.
struct SharedScale {
    format: &'static str,
    first: Option<(usize, f32)>,
}

impl SharedScale {
    fn new(format: &'static str) -> Self {
        Self { format, first: None }
    }

    fn add(&mut self, block: usize, scale: f32, all_zero: bool) -> Result<(), FormatError> {
        let format = self.format;
        if !scale.is_finite() || scale < 0.0 {
            return Err(FormatError::BadBlockScale { format, block, scale });
        }
        if all_zero {
            return Ok(());
        }
        if scale == 0.0 {
            return Err(FormatError::ZeroBlockScale { format, block });
        }
        let (first_block, first) = *self.first.get_or_insert((block, scale));
        if scale != first {
            return Err(FormatError::MixedScales { format, block, scale, first_block, first });
        }
        Ok(())
    }

    /// The shared scale; zero for a tensor that is zero everywhere.
    fn finish(self) -> f32 {
        self.first.map_or(0.0, |(_, scale)| scale)
    }
}

/// A format of blocks of ternary weights: `LEN` of them and one f16 scale in `BYTES` bytes.
pub(crate) struct TernaryBlocks<const LEN: usize, const BYTES: usize> {
    format: &'static str,
    /// Writes the weights of a block and returns its scale. Code 3 comes out as weight 2.
    decode: fn(&[u8; BYTES], &mut [i8; LEN]) -> f32,
    /// Writes a block from weights that are -1, 0 or 1.
    encode: fn(&[i8; LEN], f16, &mut [u8; BYTES]),
}

impl<const LEN: usize, const BYTES: usize> TernaryBlocks<LEN, BYTES> {
    fn bytes(&self, n: usize, k: usize) -> Result<usize, FormatError> {
        let format = self.format;
        if !k.is_multiple_of(LEN) {
            return Err(FormatError::NotAMultiple { format, dimension: "K", value: k, of: LEN });
        }
        n.checked_mul(k / LEN).and_then(|blocks| blocks.checked_mul(BYTES)).ok_or(FormatError::TooLarge {
            format,
            n,
            k,
        })
    }

    fn read(&self, data: &[u8], n: usize, k: usize) -> Result<(Vec<u8>, f32), FormatError> {
        let format = self.format;
        let size = canonical_bytes(format, n, k)?;
        check_length(format, n, k, "bytes", self.bytes(n, k)?, data.len())?;
        let mut rows = vec![0; size];
        let mut weights = vec![0; k];
        let mut scale = SharedScale::new(format);
        let blocks_in_row = k / LEN;
        let (blocks, _) = data.as_chunks::<BYTES>();
        let rows_of_blocks = blocks.chunks_exact(blocks_in_row);
        for (row, (blocks, out)) in
            rows_of_blocks.zip(rows.chunks_exact_mut(canonical::row_bytes(k))).enumerate()
        {
            for (b, (block, weights)) in blocks.iter().zip(weights.as_chunks_mut().0).enumerate() {
                let d = (self.decode)(block, weights);
                let (mut any, mut bad) = (false, false);
                for &w in weights.iter() {
                    any |= w != 0;
                    bad |= w > 1;
                }
                if bad {
                    let column = b * LEN + weights.iter().position(|&w| w > 1).unwrap_or(0);
                    return Err(FormatError::InvalidCode { format, row, column });
                }
                scale.add(row * blocks_in_row + b, d, !any)?;
            }
            canonical::pack_row(&weights, out);
        }
        Ok((rows, scale.finish()))
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! What the tests of the formats share.
    use super::*;
    use proptest::prelude::*;

    /// Canonical rows of an [n, k] matrix.
    pub fn canonical_rows(weights: &[i8], k: usize) -> Vec<u8> {
        let mut rows = vec![0; weights.len() / k * canonical::row_bytes(k)];
        for (w, row) in weights.chunks_exact(k).zip(rows.chunks_exact_mut(canonical::row_bytes(k))) {
            canonical::pack_row(w, row);
        }
        rows
    }

    /// (n, k, weights) with `n` a multiple of `n_of` and `k` of `k_of`.
    pub fn matrix(
        n_of: usize,
        n_max: usize,
        k_of: usize,
        k_max: usize,
    ) -> impl Strategy<Value = (usize, usize, Vec<i8>)> {
        (1..=n_max / n_of, 1..=k_max / k_of).prop_flat_map(move |(n, k)| {
            let (n, k) = (n * n_of, k * k_of);
            // Some matrices are nearly all zero, so that whole blocks are.
            let weight = prop_oneof![Just(0u8), Just(250)].prop_flat_map(move |zeros| {
                proptest::collection::vec(
                    any::<u8>().prop_map(move |r| if r < zeros { 0 } else { (r % 3) as i8 - 1 }),
                    n * k,
                )
            });
            (Just(n), Just(k), weight)
        })
    }

    /// A positive finite f16 as f32.
    pub fn f16_scale() -> impl Strategy<Value = f32> {
        (1u16..0x7c00).prop_map(|bits| f16::from_bits(bits).to_f32())
    }

    /// The f32 values in a golden file.
    pub fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    pub fn assert_bits(got: &[f32], expected: &[f32]) {
        assert_eq!(got.len(), expected.len());
        for (i, (g, e)) in got.iter().zip(expected).enumerate() {
            assert_eq!(g.to_bits(), e.to_bits(), "value {i}: {g} instead of {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_rows_are_checked_for_shape_and_codes() {
        let mut rows = vec![ZERO_BYTE; 3 * 64];
        assert_eq!(check_canonical(&rows, 3, 200), Ok(()));
        assert!(matches!(
            check_canonical(&rows, 3, 257),
            Err(FormatError::Length { expected: 288, got: 192, .. })
        ));
        assert!(matches!(check_canonical(&rows, 0, 200), Err(FormatError::Empty { .. })));
        assert!(matches!(check_canonical(&rows, 3, 0), Err(FormatError::Empty { .. })));
        assert!(matches!(check_canonical(&rows, usize::MAX, 200), Err(FormatError::TooLarge { .. })));
        rows[64 + 32 + 5] = 0b01_11_01_01; // block 1 of row 1, weight 32 + 5
        let bad = |rows: &[u8]| check_canonical(rows, 3, 200);
        assert_eq!(bad(&rows), Err(FormatError::InvalidCode { format: "I2_S", row: 1, column: 128 + 37 }));
        rows[64 + 32 + 5] = 0b01_01_01_11; // padding is checked as well
        assert_eq!(bad(&rows), Err(FormatError::InvalidCode { format: "I2_S", row: 1, column: 128 + 101 }));
    }

    #[test]
    fn scales_are_shared_by_the_blocks_that_have_weights() {
        let run = |blocks: &[(f32, bool)]| {
            let mut scale = SharedScale::new("T");
            for (i, &(d, all_zero)) in blocks.iter().enumerate() {
                scale.add(i, d, all_zero)?;
            }
            Ok(scale.finish())
        };
        assert_eq!(run(&[(0.0, true), (0.5, false), (0.25, true), (0.5, false)]), Ok(0.5));
        assert_eq!(run(&[(0.5, true)]), Ok(0.0));
        assert_eq!(
            run(&[(0.5, false), (0.0, false)]),
            Err(FormatError::ZeroBlockScale { format: "T", block: 1 })
        );
        assert_eq!(
            run(&[(0.0, true), (0.5, false), (0.25, false)]),
            Err(FormatError::MixedScales { format: "T", block: 2, scale: 0.25, first_block: 1, first: 0.5 })
        );
        for bad in [f32::NAN, f32::INFINITY, -0.5] {
            assert!(matches!(run(&[(bad, true)]), Err(FormatError::BadBlockScale { block: 0, .. })));
        }
    }
}

// The example of the README runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
