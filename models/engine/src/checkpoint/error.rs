//! What can be wrong with a model's files.

use bitnet_burn::ConfigError;
use bitnet_burn_formats::FileError;
use std::path::PathBuf;

/// Whatever can be wrong with a model's files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The files themselves are wrong, whatever model they hold.
    #[error(transparent)]
    File(#[from] FileError),
    /// A metadata key that must be there is not.
    #[error("{}: key `{key}` is missing{help}", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it is for, or where else it was looked for; begins with punctuation, or is empty.
        help: String,
    },
    /// A field of the configuration that no model can have.
    #[error("{}: the configuration is impossible: {error}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field.
        error: ConfigError,
    },
    /// An architecture that this program does not implement.
    #[error("{}: architecture `{found}` is not supported; supported: {supported}{lacks}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// The architecture found.
        found: String,
        /// Those that are implemented.
        supported: &'static str,
        /// What its header has and no implemented architecture has, as the end of a sentence.
        lacks: String,
    },
    /// The feed-forward activation is unknown or can't be told.
    #[error("{}: {problem}", path.display())]
    UnknownActivation {
        /// The file.
        path: PathBuf,
        /// What was found, and how to choose.
        problem: String,
    },
    /// A feature of the model that this program does not implement.
    #[error("{}: {what} is {found}, which is not supported; supported: {supported}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The feature: a key of the file's configuration.
        what: String,
        /// Its value.
        found: String,
        /// The values that are implemented.
        supported: String,
    },
    /// How the weights were quantised is not stated, or not supported.
    #[error("{}: {problem}", path.display())]
    Quantization {
        /// The file.
        path: PathBuf,
        /// What was found, and what would work.
        problem: String,
    },
    /// Dimensions that don't fit the configuration.
    #[error(
        "{}: tensor `{tensor}` is {found:?} (rows first); the configuration asks for {expected:?}",
        path.display()
    )]
    WrongShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape, rows first.
        found: Vec<u64>,
        /// The shape that it should have.
        expected: Vec<u64>,
    },
    /// A tensor that changes the result and that this program would ignore.
    #[error("{}: tensor `{tensor}` is not supported: {problem}", path.display())]
    UnsupportedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why it can't be ignored.
        problem: String,
    },
    /// A projection whose values are not ternary.
    #[error(
        "{}: tensor `{tensor}` ({stored_as}) is not ternary: {problem}; a projection must be exactly \
         {{-s, 0, s}} with one s for the whole tensor", path.display()
    )]
    NotTernary {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type it is stored in.
        stored_as: &'static str,
        /// The value, and where it is.
        problem: String,
    },
    /// A scale that is not a usable number.
    #[error("{}: the scale of tensor `{tensor}` is {value}; it must be finite{help}", path.display())]
    InvalidScale {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The scale.
        value: f32,
        /// A further condition, beginning with a space, or empty.
        help: &'static str,
    },
    /// A weight that is not a number.
    #[error("{}: tensor `{tensor}` holds {value} at row {row}, column {column}", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row of the first such value.
        row: usize,
        /// Its column.
        column: usize,
        /// The value.
        value: f32,
    },
    /// Weights that can't be changed.
    #[error("tensor `{tensor}` can't be merged with an adapter: {problem}")]
    Unmerged {
        /// The tensor.
        tensor: String,
        /// Why.
        problem: String,
    },
    /// A layer that the model does not have was asked for.
    #[error("{}: layer {layer} was asked for; the model has {n_layers}", path.display())]
    NoSuchLayer {
        /// The file.
        path: PathBuf,
        /// The layer, from zero.
        layer: usize,
        /// Number of layers.
        n_layers: usize,
    },
}
