//! The types in which ternary matrices are written.

use super::TensorType;
use super::writer::write_i2_s;
use crate::{FormatError, TernaryTensor, tq1_0, tq2_0};
use std::io::{self, Write};

/// How a ternary matrix is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names of the format")]
pub enum TernaryType {
    /// bitnet.cpp's: 2 bits a weight, the exact f32 scale. K must be a multiple of 128.
    #[default]
    I2_S,
    /// llama.cpp's: 2.06 bits a weight, an f16 scale. K must be a multiple of 256.
    TQ2_0,
    /// llama.cpp's: 1.69 bits a weight, an f16 scale. K must be a multiple of 256.
    TQ1_0,
}

impl From<TernaryType> for TensorType {
    fn from(ternary: TernaryType) -> Self {
        match ternary {
            TernaryType::I2_S => Self::I2_S,
            TernaryType::TQ2_0 => Self::TQ2_0,
            TernaryType::TQ1_0 => Self::TQ1_0,
        }
    }
}

impl TernaryType {
    /// Writes the bytes of a tensor of this type. Where the type stores its scale as f16, the scale is rounded
    /// to the nearest.
    ///
    /// # Errors
    /// Those of `out`, and those of the format as [`io::Error::other`].
    pub fn write(self, tensor: &TernaryTensor, out: &mut dyn Write) -> io::Result<()> {
        let TernaryTensor { n, k, scale, ref codes, .. } = *tensor;
        let blocks = match self {
            TernaryType::I2_S => return write_i2_s(out, codes, scale),
            TernaryType::TQ2_0 => tq2_0::from_canonical,
            TernaryType::TQ1_0 => tq1_0::from_canonical,
        };
        let bytes = match blocks(codes, n, k, scale) {
            Err(FormatError::ScaleNotF16 { nearest, .. }) if nearest.is_finite() && nearest > 0.0 => {
                blocks(codes, n, k, nearest)
            }
            result => result,
        };
        out.write_all(&bytes.map_err(io::Error::other)?)
    }
}
