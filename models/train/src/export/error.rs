//! Why nothing was written.

use crate::TrainError;
use bitnet_burn_engine::checkpoint::LoadError;
use bitnet_burn_engine::gguf::{GgufWriteError, MatrixError};
use bitnet_burn_engine::hf::HfWriteError;
use bitnet_burn_engine::tokenizer::TranslateError;
use bitnet_burn_formats::WriteError;
use std::io;
use std::path::{Path, PathBuf};

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        error: io::Error,
    },
    /// There is something already.
    #[error("{} exists; it was not asked to be replaced", path.display())]
    Exists {
        /// The file or directory.
        path: PathBuf,
    },
    /// The model can't be put there.
    #[error("{} {problem}", path.display())]
    Place {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
    /// A directory of a training run without a finished checkpoint.
    #[error("{}: the training run has no finished checkpoint yet", path.display())]
    NoCheckpoint {
        /// The run's directory.
        path: PathBuf,
    },
    /// The directory of a training run can't be read.
    #[error(transparent)]
    Run(#[from] TrainError),
    /// The masters were asked for, and are gone.
    #[error(
        "{}: the latent weights (masters) are not in this checkpoint: it stores its projections as {stored_as}, \
         and what was rounded away can't be computed back; export the checkpoint that training wrote, or {instead}",
        path.display()
    )]
    NoMasters {
        /// The checkpoint.
        path: PathBuf,
        /// How it holds its projections.
        stored_as: &'static str,
        /// The style that holds them.
        instead: &'static str,
    },
    /// The target stands for other activations than the model's.
    #[error("{}: {format} stands for {stated}, and this model has {found}; {instead}", path.display())]
    Activations {
        /// The checkpoint.
        path: PathBuf,
        /// The type or style asked for.
        format: &'static str,
        /// The activations that a reader would take.
        stated: &'static str,
        /// Those of the model.
        found: &'static str,
        /// What would work.
        instead: &'static str,
    },
    /// A type can't hold a tensor's weights exactly.
    #[error("{error}; {instead}")]
    Matrix {
        /// The tensor, row, column and scale.
        error: MatrixError,
        /// What would work.
        instead: &'static str,
    },
    /// A type can't hold a tensor of this shape.
    #[error(
        "tensor `{tensor}` of [{n}, {k}] can't be written as {format}, which needs {dimension} to be a multiple \
         of {of}; {instead}"
    )]
    Shape {
        /// The tensor.
        tensor: String,
        /// Rows.
        n: usize,
        /// Columns.
        k: usize,
        /// The type asked for.
        format: &'static str,
        /// `K` or `N`.
        dimension: &'static str,
        /// What it must be a multiple of.
        of: usize,
        /// What would work.
        instead: String,
    },
    /// A safetensors file can't hold that type.
    #[error("a safetensors file has no type {0}; embedding and output head can be F32, F16 or BF16 there")]
    DenseType(&'static str),
    /// The source can't be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A file can't be written.
    #[error(transparent)]
    File(#[from] WriteError),
    /// The model can't be written as GGUF.
    #[error(transparent)]
    Gguf(#[from] GgufWriteError),
    /// The Hugging Face directory can't be written.
    #[error(transparent)]
    Hf(#[from] HfWriteError),
    /// The tokenizer can't be written.
    #[error(transparent)]
    Tokenizer(#[from] TranslateError),
    /// What was read back is not what it should be.
    #[error("what was written as `{tensor}` is not what was read: {problem}")]
    Differs {
        /// The tensor, or the part of the configuration.
        tensor: String,
        /// The difference.
        problem: String,
    },
    /// The caller did not want to go on.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

impl ExportError {
    /// The same, about the final place instead of the temporary one.
    pub(super) fn instead_of(mut self, temporary: &Path, out: &Path) -> Self {
        if let Self::Io { path, .. }
        | Self::File(WriteError::Io { path, .. })
        | Self::Hf(HfWriteError::File(WriteError::Io { path, .. })) = &mut self
            && let Ok(rest) = path.strip_prefix(temporary)
        {
            *path = if rest.as_os_str().is_empty() { out.to_owned() } else { out.join(rest) };
        }
        self
    }
}
