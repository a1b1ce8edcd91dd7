//! Many scales of one matrix: by row, or by groups of a row's weights. How they lie in memory is the contract of plugins
//! ([`Weights::scales`](bitnet_burn_plugin::abi::Weights::scales)).
#![forbid(unsafe_code)]

use bitnet_burn_plugin::abi::SCALE_ROWS;
pub use bitnet_burn_plugin::sdk::scale_count;
use bitnet_burn_plugin::sdk::{self, groups};
use half::f16;

use crate::FormatError;

/// The scales of a ternary matrix, in blocks of 32 rows as kernels read them.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    /// Weights of a row that share a scale; 0 for the whole row.
    pub group: usize,
    /// The scales, block after block.
    pub values: ScaleValues,
}

/// The numbers of [`Scales`].
#[derive(Clone, Debug, PartialEq)]
pub enum ScaleValues {
    /// f32.
    F32(Vec<f32>),
    /// The bits of IEEE half precision.
    F16(Vec<u16>),
}

impl Scales {
    /// Scales of a matrix [n, k] from rows of them, [n, groups]: f16 where each of them is one.
    ///
    /// # Errors
    /// [`FormatError::TooLarge`], [`Length`](FormatError::Length), and [`NotFinite`](FormatError::NotFinite) with row and
    /// group.
    pub fn from_rows(rows: &[f32], n: usize, k: usize, group: usize) -> Result<Self, FormatError> {
        let (count, too_large) = (groups(k, group), FormatError::TooLarge { format: "scales", n, k });
        let size = scale_count(n, k, group).ok_or(too_large)?;
        crate::check_length("scales", n, k, "values", n.checked_mul(count).ok_or(too_large)?, rows.len())?;
        if let Some(at) = rows.iter().position(|v| !v.is_finite()) {
            return Err(FormatError::NotFinite { row: at / count, column: at % count, value: rows[at] });
        }
        let half = |s: f32| f16::from_f32(s);
        let values = match rows.iter().all(|&s| half(s).to_f32().to_bits() == s.to_bits()) {
            true => ScaleValues::F16(in_blocks(rows, size, count, |s| half(s).to_bits())),
            false => ScaleValues::F32(in_blocks(rows, size, count, |s| s)),
        };
        Ok(Self { group, values })
    }

    /// The scale of row `n` and group `g`, of rows of `k` weights.
    ///
    /// # Panics
    /// If there is none.
    pub fn get(&self, n: usize, g: usize, k: usize) -> f32 {
        self.as_sdk().block(n / SCALE_ROWS * SCALE_ROWS, g, groups(k, self.group))[n % SCALE_ROWS]
    }

    /// Whether they are f16.
    pub fn is_half(&self) -> bool {
        matches!(self.values, ScaleValues::F16(_))
    }

    /// As kernels take them.
    pub fn as_sdk(&self) -> sdk::Scales<'_> {
        match &self.values {
            ScaleValues::F32(values) => sdk::Scales::F32 { group: self.group, values },
            ScaleValues::F16(values) => sdk::Scales::F16 { group: self.group, values },
        }
    }
}

/// Rows of `count` scales in blocks of 32 rows, with zeros behind the last row.
fn in_blocks<T: Copy + Default>(rows: &[f32], size: usize, count: usize, of: impl Fn(f32) -> T) -> Vec<T> {
    let mut values = vec![T::default(); size];
    for (row, scales) in rows.chunks_exact(count).enumerate() {
        let (block, lane) = (row / SCALE_ROWS * count, row % SCALE_ROWS);
        scales.iter().enumerate().for_each(|(g, &s)| values[(block + g) * SCALE_ROWS + lane] = of(s));
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_of_32_rows_lie_side_by_side() {
        let (n, k, group) = (40, 200, 64);
        for half in [true, false] {
            let one = if half { 1.0 } else { 1.000_1 };
            let rows: Vec<f32> = (0..n * 4).map(|i| i as f32 * one).collect();
            let scales = Scales::from_rows(&rows, n, k, group).unwrap();
            assert_eq!(scales.is_half(), half);
            for row in 0..64 {
                for g in 0..4 {
                    let expected = if row < n { rows[row * 4 + g] } else { 0.0 };
                    let value = match &scales.values {
                        ScaleValues::F32(values) => values[(row / 32 * 4 + g) * 32 + row % 32],
                        ScaleValues::F16(values) => {
                            f16::from_bits(values[(row / 32 * 4 + g) * 32 + row % 32]).to_f32()
                        }
                    };
                    assert_eq!((value, scales.get(row, g, k)), (expected, expected));
                }
            }
        }
        let rows: Vec<f32> = (0..n * 4).map(|i| i as f32).collect();
        let by_row = Scales::from_rows(&rows[..n], n, k, 0).unwrap();
        assert!((0..n).all(|row| by_row.get(row, 0, k) == rows[row]));
        assert!(matches!(Scales::from_rows(&rows[1..], n, k, group), Err(FormatError::Length { .. })));
        let bad = Scales::from_rows(&[1.0, f32::NAN], 1, 64, 32);
        assert!(matches!(bad, Err(FormatError::NotFinite { row: 0, column: 1, .. })));
        assert!(matches!(Scales::from_rows(&[], usize::MAX, 64, 32), Err(FormatError::TooLarge { .. })));
    }

    #[test]
    fn every_finite_f16_has_its_value() {
        for bits in (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00) {
            assert_eq!(sdk::f16_value(bits).to_bits(), half::f16::from_bits(bits).to_f32().to_bits());
        }
    }
}
