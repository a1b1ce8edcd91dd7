//! Many scales of one matrix: by row, or by groups of a row's weights. How they lie in memory is the contract of plugins
//! ([`Weights::scales`](bitnet_burn_plugin::abi::Weights::scales)).
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use bitnet_burn_plugin::abi::SCALE_ROWS;
use bitnet_burn_plugin::sdk::{self, groups, scale_count};
use bytes::Bytes;
use half::f16;
use serde::{Deserialize, Serialize};

use crate::FormatError;
use crate::ternary::GROUPS;

/// Which weights of a matrix [n, k] share a scale. Its text is `tensor`, `row` or `group:N`.
///
/// ```
/// use bitnet_burn_formats::WeightScale;
///
/// let scale: WeightScale = "group:64".parse()?;
/// assert_eq!(scale, WeightScale::Group(64));
/// assert_eq!(scale.run(10, 256), 64);
/// assert!(scale.problem(100).is_some_and(|problem| problem.contains("100")));
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum WeightScale {
    /// All of them.
    #[default]
    Tensor,
    /// Those of a row.
    Row,
    /// Groups of this many neighbours in a row: one of [`GROUPS`], which divides k.
    Group(usize),
}

impl WeightScale {
    /// Neighbours in row-major order that share a scale.
    pub fn run(self, n: usize, k: usize) -> usize {
        match self {
            Self::Tensor => n * k,
            Self::Row => k,
            Self::Group(group) => group,
        }
    }

    /// As [`Scales::group`]: 0 where a whole row shares a scale.
    pub fn group(self) -> usize {
        match self {
            Self::Tensor | Self::Row => 0,
            Self::Group(group) => group,
        }
    }

    /// Why rows of `k` weights can't have such scales.
    pub fn problem(self, k: usize) -> Option<String> {
        match self {
            Self::Group(group) if !GROUPS.contains(&group) => Some(of_groups(group)),
            Self::Group(group) if !k.is_multiple_of(group) => {
                Some(format!("{self}, which does not divide rows of {k} weights"))
            }
            _ => None,
        }
    }
}

fn of_groups(group: impl fmt::Display) -> String {
    format!("group:{group}: weights share a scale in groups of 32, 64, 128 or 256")
}

impl fmt::Display for WeightScale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor => f.write_str("tensor"),
            Self::Row => f.write_str("row"),
            Self::Group(group) => write!(f, "group:{group}"),
        }
    }
}

impl FromStr for WeightScale {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("group:")) {
            ("tensor", _) => Ok(Self::Tensor),
            ("row", _) => Ok(Self::Row),
            (_, Some(group)) => match group.parse() {
                Ok(group) if GROUPS.contains(&group) => Ok(Self::Group(group)),
                _ => Err(of_groups(group)),
            },
            _ => Err(format!("{text:?}: possible values: tensor, row, group:N")),
        }
    }
}

impl From<WeightScale> for String {
    fn from(scale: WeightScale) -> Self {
        scale.to_string()
    }
}

impl TryFrom<String> for WeightScale {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// The scales of a ternary matrix, in blocks of 32 rows as kernels read them.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    group: usize,
    half: bool,
    bytes: Bytes,
}

impl Scales {
    /// Scales of a matrix [n, k] from rows of them, [n, groups]: f16 where each of them is one.
    ///
    /// # Arguments
    /// * `group`: weights of a row that share a scale; 0 is the whole row
    ///
    /// # Errors
    /// [`FormatError::TooLarge`], [`Length`](FormatError::Length), and [`NotFinite`](FormatError::NotFinite) with row and
    /// group.
    pub fn from_rows(rows: &[f32], n: usize, k: usize, group: usize) -> Result<Self, FormatError> {
        let half = rows.iter().all(|&s| f16::from_f32(s).to_f32().to_bits() == s.to_bits());
        Self::new(rows, n, k, group, half)
    }

    /// [`from_rows`](Self::from_rows), as f32 whatever they are: for matrices that move between devices, some of which have
    /// no f16.
    ///
    /// # Errors
    /// As [`from_rows`](Self::from_rows).
    pub fn f32_from_rows(rows: &[f32], n: usize, k: usize, group: usize) -> Result<Self, FormatError> {
        Self::new(rows, n, k, group, false)
    }

    fn new(rows: &[f32], n: usize, k: usize, group: usize, half: bool) -> Result<Self, FormatError> {
        let (count, too_large) = (groups(k, group), FormatError::TooLarge { format: "scales", n, k });
        let size = scale_count(n, k, group).ok_or(too_large)?;
        crate::check_length("scales", n, k, "values", n.checked_mul(count).ok_or(too_large)?, rows.len())?;
        if let Some(at) = rows.iter().position(|v| !v.is_finite()) {
            return Err(FormatError::NotFinite { row: at / count, column: at % count, value: rows[at] });
        }
        let bytes = match half {
            true => Bytes::from_owner(Owner(in_blocks(rows, size, count, |s| f16::from_f32(s).to_bits()))),
            false => Bytes::from_owner(Owner(in_blocks(rows, size, count, |s| s))),
        };
        Ok(Self { group, half, bytes })
    }

    /// Scales that lie in a file as [`bytes`](Self::bytes) gave them, in place if they are aligned.
    ///
    /// # Errors
    /// [`FormatError::TooLarge`], and [`Length`](FormatError::Length) where they are not those of a matrix [n, k].
    pub fn stored(bytes: Bytes, half: bool, n: usize, k: usize, group: usize) -> Result<Self, FormatError> {
        let expected = stored_bytes(half, n, k, group);
        let expected = expected.ok_or(FormatError::TooLarge { format: "scales", n, k })?;
        crate::check_length("scales", n, k, "bytes", expected, bytes.len())?;
        if bytes.as_ptr().addr().is_multiple_of(4) {
            return Ok(Self { group, half, bytes });
        }
        let mut words = vec![0u32; expected.div_ceil(4)];
        bytemuck::cast_slice_mut(&mut words)[..expected].copy_from_slice(&bytes);
        let bytes = Bytes::from_owner(Owner(words)).slice(..expected);
        Ok(Self { group, half, bytes })
    }

    /// Weights of a row that share a scale; 0 for the whole row.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Which weights of a matrix [n, k] share one: all of them, where the rows' scales are equal. (Rows of zeros have any.)
    ///
    /// # Panics
    /// If the matrix has other rows.
    pub fn shared_by(&self, n: usize, k: usize) -> WeightScale {
        if self.group > 0 {
            return WeightScale::Group(self.group);
        }
        let mut scales = (0..n).map(|row| self.get(row, 0, k)).filter(|&scale| scale != 0.0);
        let first = scales.next();
        if scales.all(|scale| Some(scale) == first) { WeightScale::Tensor } else { WeightScale::Row }
    }

    /// Whether they are f16; they are f32 otherwise.
    pub fn is_half(&self) -> bool {
        self.half
    }

    /// The scales, block after block, aligned as their type asks.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The scale of row `n` and group `g`, of rows of `k` weights.
    ///
    /// # Panics
    /// If the matrix has no such row or group.
    pub fn get(&self, n: usize, g: usize, k: usize) -> f32 {
        self.as_sdk().block(n / SCALE_ROWS * SCALE_ROWS, g, groups(k, self.group))[n % SCALE_ROWS]
    }

    /// As kernels take them.
    pub fn as_sdk(&self) -> sdk::Scales<'_> {
        match self.half {
            true => sdk::Scales::F16 { group: self.group, values: bytemuck::cast_slice(&self.bytes) },
            false => sdk::Scales::F32 { group: self.group, values: bytemuck::cast_slice(&self.bytes) },
        }
    }
}

/// Bytes of the scales of a matrix [n, k], or `None` where that overflows.
pub fn stored_bytes(half: bool, n: usize, k: usize, group: usize) -> Option<usize> {
    scale_count(n, k, group)?.checked_mul(if half { 2 } else { 4 })
}

/// Numbers as bytes.
struct Owner<T>(Vec<T>);

impl<T: bytemuck::Pod> AsRef<[u8]> for Owner<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
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
            // As they lie in a file, at any place.
            for from in [0, 1, 4] {
                let file = Bytes::from([&vec![0; from][..], scales.bytes()].concat()).slice(from..);
                assert_eq!(Scales::stored(file, half, n, k, group).unwrap(), scales);
            }
            assert!(Scales::stored(scales.bytes().slice(1..), half, n, k, group).is_err());
            for row in 0..64 {
                for g in 0..4 {
                    let expected = if row < n { rows[row * 4 + g] } else { 0.0 };
                    let at = (row / 32 * 4 + g) * 32 + row % 32;
                    let value = match half {
                        true => f16::from_le_bytes([scales.bytes[2 * at], scales.bytes[2 * at + 1]]).to_f32(),
                        false => f32::from_le_bytes(*scales.bytes[4 * at..].first_chunk().unwrap()),
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
    fn kinds_of_scales_have_names() {
        for (text, scale) in [
            ("tensor", WeightScale::Tensor),
            ("row", WeightScale::Row),
            ("group:32", WeightScale::Group(32)),
            ("group:256", WeightScale::Group(256)),
        ] {
            assert_eq!((text.parse(), scale.to_string()), (Ok(scale), text.to_owned()));
        }
        for text in ["", "rows", "group", "group:", "group:0", "group:96", "group:-32", "group:512"] {
            assert!(text.parse::<WeightScale>().is_err(), "{text}");
        }
        assert_eq!([WeightScale::Tensor, WeightScale::Row].map(|scale| scale.problem(33)), [None, None]);
        assert_eq!(WeightScale::Group(64).problem(192), None);
        assert!(WeightScale::Group(64).problem(96).is_some() && WeightScale::Group(96).problem(96).is_some());
    }

    #[test]
    fn every_finite_f16_has_its_value() {
        for bits in (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00) {
            assert_eq!(sdk::f16_value(bits).to_bits(), half::f16::from_bits(bits).to_f32().to_bits());
        }
    }
}
