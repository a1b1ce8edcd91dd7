//! What a kind of file must answer, and what its answers are made of.

use super::embed::{EmbedDefaults, Pooling};
use super::error::LoadError;
use super::tokenizer_source::TokenizerSource;
use bitnet_burn::{ActivationRule, FloatPart, GatedActivation, Norm, Projection};
use bitnet_burn_formats::files::FileIdentity;
use bitnet_burn_formats::{DenseTensor, FileMap, FormatError, TernaryTensor, canonical};
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;

/// What parts that are floats in every model are called in errors.
pub(super) const FLOATS: &str = "a router or a part of a gated DeltaNet";

/// What the caller knows better than the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// The feed-forward activation, for files that don't state it (`--hidden-act`). Wins over the file,
    /// with a warning where the two differ.
    pub hidden_act: Option<GatedActivation>,
    /// The pre-tokenizer of a GGUF vocabulary, for files without `tokenizer.ggml.pre` (`--pre`). Handed on
    /// in `GgufTokenizer::pre`.
    pub pre: Option<String>,
}

/// The weights of a projection.
#[derive(Clone, Debug)]
pub enum Weights {
    /// Ternary with one scale, for int8 activations by row.
    Ternary(TernaryTensor),
    /// Anything else: ternary with many scales, or not ternary.
    Dense(DenseTensor),
}

impl Weights {
    /// The tensor's name in the file.
    pub fn name(&self) -> &str {
        match self {
            Self::Ternary(tensor) => &tensor.name,
            Self::Dense(tensor) => &tensor.name,
        }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Ternary(tensor) => (tensor.n, tensor.k),
            Self::Dense(tensor) => (tensor.n, tensor.k),
        }
    }

    /// The values of a row.
    ///
    /// # Errors
    /// [`FormatError::Length`] if `values` is no row, or the tensor has no such row.
    pub fn decode_row(&self, row: usize, values: &mut [f32]) -> Result<(), FormatError> {
        match self {
            Self::Dense(tensor) => tensor.format.decode_row(tensor.row(row).unwrap_or_default(), values),
            Self::Ternary(TernaryTensor { n, k, scale, codes, .. }) => {
                let bytes = canonical::row_bytes(*k);
                let codes = codes.chunks_exact(bytes).nth(row).filter(|_| values.len() == *k);
                let (n, k, expected, got) = (*n, *k, *k, values.len());
                let (format, unit) = ("I2_S", "values");
                let codes = codes.ok_or(FormatError::Length { format, n, k, unit, expected, got })?;
                let mut weights = vec![0; k];
                canonical::unpack_row(codes, &mut weights);
                values.iter_mut().zip(weights).for_each(|(value, w)| *value = f32::from(w) * scale);
                Ok(())
            }
        }
    }
}

/// A tensor of the file, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its type's name.
    pub type_name: String,
    /// Its shape, rows first (a GGUF file lists the columns first).
    pub shape: Vec<u64>,
    /// Its size in the file.
    pub bytes: u64,
}

/// A part of what a checkpoint is read from.
#[derive(Clone, Debug)]
pub enum Content {
    /// A file, and which one was opened there.
    File(PathBuf, FileIdentity),
    /// Bytes that were in memory from the start, and what stands for their path.
    Memory(PathBuf, Bytes),
}

/// A Walsh-Hadamard transform with signs, x' = H(s * x), of runs of `block` values.
#[derive(Clone, Debug, PartialEq)]
pub struct Signs {
    /// -1 or 1, for each value of a row.
    pub signs: Arc<[f32]>,
    /// A power of two that divides their number.
    pub block: usize,
}

/// A matrix whose input, or whose rows, may be rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotated {
    /// The input of a projection of a layer.
    Projection(usize, Projection),
    /// The input of the output projection.
    Output,
    /// The rows of the embedding: to be taken back.
    Embedding,
}

/// What a kind of file must answer. Names and rules are the implementation's.
pub(crate) trait Source: Send + Sync {
    fn weights(&self, layer: usize, which: Projection) -> Result<Weights, LoadError>;
    /// The size of weights of which the header says that they are [`Weights::Dense`].
    fn dense_bytes(&self, layer: usize, which: Projection) -> Option<u64>;
    /// Of a projection that [has one](Projection::has_bias).
    fn bias(&self, layer: usize, which: Projection) -> Result<DenseTensor, LoadError>;
    fn master(&self, layer: usize, which: Projection) -> Result<Option<DenseTensor>, LoadError>;
    /// Of a layer that has it, in the [shape](FloatPart::shape) and with the values that layers take.
    fn float_part(&self, layer: usize, which: FloatPart) -> Result<DenseTensor, LoadError>;
    fn norm(&self, which: Norm) -> Result<DenseTensor, LoadError>;
    fn embedding(&self) -> Result<DenseTensor, LoadError>;
    fn output(&self) -> Result<Option<DenseTensor>, LoadError>;
    /// How a matrix is rotated, if it is.
    fn rotation(&self, _: Rotated) -> Option<Signs> {
        None
    }
    /// How the activations of projections that are not [`Weights::Ternary`] are quantised, where the files say so.
    fn activations(&self) -> Option<ActivationRule> {
        None
    }
    fn tokenizer_source(&self) -> TokenizerSource;
    fn embed_defaults(&self, asked: Option<Pooling>) -> Result<EmbedDefaults, LoadError>;
    fn contents(&self) -> Vec<Content>;
    fn tensors(&self) -> Vec<TensorInfo>;
    fn metadata(&self) -> Vec<(String, String)>;
    /// The mapped files.
    fn maps(&self) -> Vec<&FileMap>;
}
