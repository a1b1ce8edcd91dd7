//! The types in which ternary matrices are written.

use super::TensorType;
use crate::DenseFormat;

/// How a ternary matrix is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names of the format")]
pub enum TernaryType {
    /// bitnet.cpp's: 2 bits a weight, one exact f32 scale. K must be a multiple of 128.
    #[default]
    I2_S,
    /// llama.cpp's: 2.06 bits a weight, an f16 scale for 256. K must be a multiple of 256.
    TQ2_0,
    /// llama.cpp's: 1.69 bits a weight, an f16 scale for 256. K must be a multiple of 256.
    TQ1_0,
    /// llama.cpp's: 2.25 bits a weight, an f16 scale for 64. K must be a multiple of 64.
    Q2_0,
    /// Prism ML's: 2.13 bits a weight, an f16 scale for 128. K must be a multiple of 128.
    PQ2_0,
    /// Prism ML's: 1.75 bits a weight, an f16 scale for 128. K must be a multiple of 128.
    PTQ1_0,
}

impl TernaryType {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::I2_S, Self::TQ2_0, Self::TQ1_0, Self::Q2_0, Self::PQ2_0, Self::PTQ1_0];

    /// The format of its blocks, which have a scale each; `None` for [`I2_S`](Self::I2_S), which has one scale.
    pub const fn blocks(self) -> Option<DenseFormat> {
        match self {
            Self::I2_S => None,
            Self::TQ2_0 => Some(DenseFormat::TQ2_0),
            Self::TQ1_0 => Some(DenseFormat::TQ1_0),
            Self::Q2_0 => Some(DenseFormat::Q2_0),
            Self::PQ2_0 => Some(DenseFormat::PQ2_0),
            Self::PTQ1_0 => Some(DenseFormat::PTQ1_0),
        }
    }

    /// The type whose blocks have a format.
    pub fn of_blocks(format: DenseFormat) -> Option<Self> {
        Self::ALL.into_iter().find(|ternary| ternary.blocks() == Some(format))
    }
}

impl From<TernaryType> for TensorType {
    fn from(ternary: TernaryType) -> Self {
        ternary.blocks().map_or(Self::I2_S, Self::Dense)
    }
}
