//! Many scales of one matrix: by row, or by groups of a row's weights. How they lie in memory is the contract of plugins
//! ([`Weights::scales`](bitnet_burn_plugin::abi::Weights::scales)).
#![forbid(unsafe_code)]

use bitnet_burn_plugin::abi::SCALE_ROWS;
use bitnet_burn_plugin::sdk::{self, groups, scale_count};

use crate::FormatError;

/// The scales of a ternary matrix, in blocks of 32 rows as kernels read them.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    /// Weights of a row that share a scale; 0 for the whole row.
    pub group: usize,
    /// The scales, block after block.
    pub values: Vec<f32>,
}

impl Scales {
    /// Scales of a matrix [n, k] from rows of them, [n, groups].
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
        let mut values = vec![0.0; size];
        for (row, scales) in rows.chunks_exact(count).enumerate() {
            let (block, lane) = (row / SCALE_ROWS * count, row % SCALE_ROWS);
            scales.iter().enumerate().for_each(|(g, &s)| values[(block + g) * SCALE_ROWS + lane] = s);
        }
        Ok(Self { group, values })
    }

    /// As kernels take them.
    pub fn as_sdk(&self) -> sdk::Scales<'_> {
        sdk::Scales::F32 { group: self.group, values: &self.values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_of_32_rows_lie_side_by_side() {
        let (n, k, group) = (40, 200, 64);
        let rows: Vec<f32> = (0..n * 4).map(|i| i as f32).collect();
        let scales = Scales::from_rows(&rows, n, k, group).unwrap();
        assert_eq!(scales.values.len(), 64 * 4);
        for row in 0..64 {
            for g in 0..4 {
                let expected = if row < n { (row * 4 + g) as f32 } else { 0.0 };
                assert_eq!(scales.values[(row / 32 * 4 + g) * 32 + row % 32], expected);
                assert_eq!(scales.as_sdk().block(row / 32 * 32, g, 4)[row % 32], expected);
            }
        }
        assert_eq!(Scales::from_rows(&rows[..n], n, k, 0).unwrap().values[..40], rows[..40]);
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
