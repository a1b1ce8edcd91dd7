//! Tensor types: their numbers, names and sizes.

use super::others;
use crate::DenseFormat;
use crate::iq_bn::IqBn;
use std::fmt;

/// The tensor types that are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names of the format")]
pub enum TensorType {
    /// One of the dense formats.
    Dense(DenseFormat),
    /// BitNet's ternary format: blocks of 128 weights in 32 bytes, one f32 scale behind the tensor.
    I2_S,
    /// ik_llama.cpp's ternary formats: rows that begin with their scale.
    IqBn(IqBn),
}

impl TensorType {
    /// Blocks of 256 ternary weights at 1.69 bits, f16 scale.
    pub const TQ1_0: Self = Self::Dense(DenseFormat::TQ1_0);
    /// Blocks of 256 ternary weights at 2.06 bits, f16 scale.
    pub const TQ2_0: Self = Self::Dense(DenseFormat::TQ2_0);

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        let rows = [IqBn::IQ1_BN, IqBn::IQ2_BN].map(Self::IqBn);
        DenseFormat::ALL.into_iter().map(Self::Dense).chain([Self::I2_S]).chain(rows)
    }

    /// (number, name, weights per block, bytes per block).
    const fn facts(self) -> (u32, &'static str, u64, u64) {
        match self {
            Self::Dense(format) => {
                let facts = format.facts();
                (facts.gguf_type, facts.name, facts.block_len as u64, facts.block_bytes as u64)
            }
            Self::I2_S => (36, "I2_S", 128, 32),
            Self::IqBn(format) => {
                let (id, block, bytes, _) = format.facts();
                (id, format.name(), block, bytes)
            }
        }
    }

    /// The number in the file.
    pub const fn id(self) -> u32 {
        self.facts().0
    }

    /// The name, as llama.cpp spells it.
    pub const fn name(self) -> &'static str {
        self.facts().1
    }

    /// Weights per block: the columns of a tensor must be a multiple.
    pub const fn block_size(self) -> u64 {
        self.facts().2
    }

    /// Bytes of a tensor, whose rows are whole blocks, the scale behind an I2_S tensor included; `None` on overflow.
    ///
    /// # Arguments
    /// * `dims`: the length of a row first
    pub fn bytes(self, dims: &[u64]) -> Option<u64> {
        let (_, _, block, block_bytes) = self.facts();
        let rows = dims.iter().skip(1).try_fold(1u64, |n, &d| n.checked_mul(d))?;
        let blocks = (dims.first().copied().unwrap_or(1) / block).checked_mul(rows)?;
        let bytes = blocks.checked_mul(block_bytes)?;
        match self {
            Self::Dense(_) => Some(bytes),
            Self::I2_S => bytes.checked_add(I2_S_TAIL),
            Self::IqBn(format) => bytes.checked_add(rows.checked_mul(format.facts().3)?),
        }
    }

    /// The type with that number, if it is supported.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::all().find(|t| t.id() == id)
    }

    /// `F32 (0), F16 (1), ...` in the order of the numbers, for messages.
    pub fn supported() -> String {
        let mut all: Vec<_> = Self::all().collect();
        all.sort_by_key(|t| t.id());
        let names: Vec<_> = all.iter().map(|t| format!("{} ({})", t.name(), t.id())).collect();
        names.join(", ")
    }

    /// Name and number of any type that is in use somewhere, for messages.
    pub fn describe(id: u32) -> String {
        if let Some(known) = Self::from_id(id) {
            return format!("{known} ({id})");
        }
        match others::name(id) {
            Some(name) => format!("{name} ({id})"),
            None => format!("{id} (unknown)"),
        }
    }
}

impl From<DenseFormat> for TensorType {
    fn from(format: DenseFormat) -> Self {
        Self::Dense(format)
    }
}

/// Bytes behind the codes of an I2_S tensor: the f32 scale, padded.
pub(super) const I2_S_TAIL: u64 = 32;

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_formats() {
        assert_eq!(TensorType::Dense(DenseFormat::F32).bytes(&[7]), Some(28));
        assert_eq!(TensorType::Dense(DenseFormat::Q8_0).bytes(&[64]), Some(68));
        assert_eq!(TensorType::Dense(DenseFormat::Q6_K).bytes(&[512]), Some(420));
        assert_eq!(TensorType::TQ1_0.bytes(&[256]), Some(54));
        assert_eq!(TensorType::TQ2_0.bytes(&[256]), Some(66));
        assert_eq!(TensorType::Dense(DenseFormat::Q2_0).bytes(&[256]), Some(72));
        assert_eq!(TensorType::Dense(DenseFormat::PQ2_0).bytes(&[256]), Some(68));
        assert_eq!(TensorType::Dense(DenseFormat::PTQ1_0).bytes(&[256]), Some(56));
        assert_eq!(TensorType::Dense(DenseFormat::Q5_K).bytes(&[256]), Some(176));
        assert_eq!(TensorType::I2_S.bytes(&[2560 * 6912]), Some(2560 * 6912 / 4 + 32));
        assert_eq!(TensorType::IqBn(IqBn::IQ1_BN).bytes(&[256, 3, 2]), Some(6 * (2 + 4 * 13)));
        assert_eq!(TensorType::IqBn(IqBn::IQ2_BN).bytes(&[256, 3]), Some(3 * (4 + 64)));
        assert_eq!(TensorType::Dense(DenseFormat::F32).bytes(&[u64::MAX]), None);
        assert_eq!(TensorType::IqBn(IqBn::IQ2_BN).bytes(&[64, u64::MAX / 16]), None);
    }

    #[test]
    fn numbers_lead_back_to_types() {
        for t in TensorType::all() {
            assert_eq!(TensorType::from_id(t.id()), Some(t));
            assert_eq!(TensorType::describe(t.id()), format!("{t} ({})", t.id()));
        }
        assert_eq!(TensorType::from_id(10), None);
        assert_eq!(TensorType::describe(10), "Q2_K (10)");
        assert_eq!(TensorType::describe(4711), "4711 (unknown)");
    }
}
