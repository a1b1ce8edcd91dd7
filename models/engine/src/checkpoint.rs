//! A model's files as the model sees them: a configuration, and tensors by the part that they play.
//!
//! [`Checkpoint::open`] takes a GGUF file or a Hugging Face directory. What differs between them (names,
//! packings, the direction of a scale, masters or codes) is translated below this interface, and nothing
//! above it knows about it: a projection is always a [`TernaryTensor`] in the canonical layout.
//!
//! Files are memory-mapped. **Changing or truncating a file while a checkpoint, or a tensor taken from
//! one, is alive is undefined behaviour**: replace files by renaming a new one over the old name (which
//! is what [`GgufWriter`](crate::gguf::GgufWriter) does).
//!
//! Files are not trusted. Every count, length and offset is checked against the size of the file before it
//! is used or allocates anything, and whatever is wrong becomes a [`LoadError`] that names the file, the
//! tensor or key, what was found and what would work.
//!
//! ```no_run
//! use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
//! use bitnet_burn::Projection;
//!
//! let checkpoint = Checkpoint::open("model.gguf".as_ref(), &OpenOptions::default())?;
//! println!("{} layers", checkpoint.config().n_layers);
//! let q = checkpoint.projection(0, Projection::Q)?;
//! println!("{}: [{}, {}], scale {}, stored as {}", q.name, q.n, q.k, q.scale, q.stored_as);
//! # Ok::<(), bitnet_burn_engine::checkpoint::LoadError>(())
//! ```

use crate::gguf::model::GgufModel;
use crate::gguf::{FileMap, GgufFile};
use crate::hf::HfModel;
use bitnet_burn::Norm;
use bitnet_burn::Projection;
use bitnet_burn::{Activation, ConfigError, ModelConfig};
use bitnet_burn_formats::DenseTensor;
use bitnet_burn_formats::TernaryTensor;
use bitnet_burn_formats::check_canonical;
use bytes::Bytes;
use std::fmt;
use std::path::{Path, PathBuf};

/// Whatever can be wrong with a model's files.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The path leads to nothing that can be opened as a model.
    #[error(
        "{}: {problem}; a model is a GGUF file, or a directory with config.json and model.safetensors",
        path.display()
    )]
    NoModel {
        /// The path.
        path: PathBuf,
        /// What is there instead.
        problem: String,
    },
    /// The file is not GGUF.
    #[error("{}: not a GGUF file: it begins with {found}, not with \"GGUF\"", path.display())]
    WrongMagic {
        /// The file.
        path: PathBuf,
        /// The first bytes, printable, with a guess at what they are.
        found: String,
    },
    /// The file was written for big-endian machines.
    #[error(
        "{}: a big-endian GGUF file (version {version}, byte-swapped); only little-endian files are supported: \
         convert it with gguf-py's gguf_convert_endian", path.display()
    )]
    BigEndian {
        /// The file.
        path: PathBuf,
        /// Its version, in the right byte order.
        version: u32,
    },
    /// A version of GGUF that is not read.
    #[error("{}: GGUF version {version}; versions 2 and 3 are supported", path.display())]
    GgufVersion {
        /// The file.
        path: PathBuf,
        /// The version found.
        version: u32,
    },
    /// The file ends too early, or a length in it is wrong.
    #[error(
        "{}: {what} needs {needed} bytes at offset {at}, but the file has {size}: truncated or corrupt; \
         download it again", path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
        /// Where it begins.
        at: u64,
        /// How many bytes it needs.
        needed: u64,
        /// Size of the file.
        size: u64,
    },
    /// A count or length that no model needs.
    #[error("{}: {what} is {found}; at most {limit} is supported", path.display())]
    Limit {
        /// The file.
        path: PathBuf,
        /// The count or length.
        what: String,
        /// Its value.
        found: u64,
        /// The largest value accepted.
        limit: u64,
    },
    /// Text that is not UTF-8.
    #[error("{}: {what} at offset {at} is not valid UTF-8", path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// The text.
        what: String,
        /// Where it is.
        at: u64,
    },
    /// A metadata key or a tensor occurs twice.
    #[error("{}: {what} `{name}` occurs twice", path.display())]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// `key` or `tensor`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A metadata value whose encoding is unknown or invalid.
    #[error("{}: the value of key `{key}` {problem}", path.display())]
    InvalidValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong.
        problem: String,
    },
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
    /// A metadata key has a value of another type or out of range.
    #[error("{}: key `{key}` is {found}; expected {expected}", path.display())]
    WrongValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
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
    #[error("{}: architecture `{found}` is not supported; supported: {supported}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// The architecture found.
        found: String,
        /// Those that are implemented.
        supported: &'static str,
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
    /// A JSON file that is not what it should be.
    #[error("{}: {problem}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column where the parser knows them.
        problem: String,
    },
    /// A safetensors header that the format forbids.
    #[error("{}: not a valid safetensors file: {problem}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// An index names a file outside the model's directory.
    #[error(
        "{}: the index names the shard {shard:?}; a shard must be a plain file name in the same directory",
        path.display()
    )]
    ShardEscapes {
        /// The index.
        path: PathBuf,
        /// The name in it.
        shard: String,
    },
    /// A tensor whose type is unknown: not even its size can be told.
    #[error("{}: tensor `{tensor}` has type {found}; supported: {supported}", path.display())]
    UnknownTensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type, as name and number.
        found: String,
        /// The types that can be read.
        supported: String,
    },
    /// A known type that cannot play this part.
    #[error("{}: tensor `{tensor}` is {found}; {role} must be one of {supported}", path.display())]
    UnsupportedTensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
        /// The part that it plays.
        role: &'static str,
        /// The types that can.
        supported: String,
    },
    /// Dimensions that the format or the tensor's type forbids.
    #[error("{}: tensor `{tensor}` with dimensions {dims:?}: {problem}", path.display())]
    InvalidShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dimensions as the file lists them.
        dims: Vec<u64>,
        /// What is wrong.
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
    /// A tensor whose data does not begin on the file's alignment.
    #[error("{}: tensor `{tensor}` at offset {offset} is not aligned to {alignment} bytes", path.display())]
    Misaligned {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its offset within the data section.
        offset: u64,
        /// `general.alignment`.
        alignment: u64,
    },
    /// A tensor whose data lies outside the file.
    #[error(
        "{}: tensor `{tensor}` needs {bytes} bytes at offset {offset} of a data section of {available}: \
         truncated or corrupt; download it again", path.display()
    )]
    OutOfBounds {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its offset within the data section.
        offset: u64,
        /// Its size.
        bytes: u64,
        /// Size of the data section.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error(
        "{}: tensors `{first}` (ends at {first_end}) and `{second}` (begins at {second_start}) overlap",
        path.display()
    )]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The tensor that begins first.
        first: String,
        /// Where it ends.
        first_end: u64,
        /// The other one.
        second: String,
        /// Where that begins.
        second_start: u64,
    },
    /// A tensor that the model needs is not there.
    #[error("{}: tensor `{tensor}` is missing{help}", path.display())]
    MissingTensor {
        /// The file or directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What it is for; begins with punctuation, or is empty.
        help: String,
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

/// What the caller knows better than the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// The feed-forward activation, for files that don't state it (`--hidden-act`). Wins over the file,
    /// with a warning where the two differ.
    pub hidden_act: Option<Activation>,
    /// The pre-tokenizer of a GGUF vocabulary, for files without `tokenizer.ggml.pre` (`--pre`). Handed on
    /// in [`GgufTokenizer::pre`].
    pub pre: Option<String>,
}

/// Where the tokenizer is; reading it is the tokenizer's business.
#[derive(Clone, Debug)]
pub enum TokenizerSource {
    /// Inside the GGUF file.
    Gguf(Box<GgufTokenizer>),
    /// `tokenizer.json` and its companions in this directory.
    Hf {
        /// The model's directory.
        dir: PathBuf,
    },
}

/// The `tokenizer.*` keys of a GGUF file as they stand there; an absent key is `None` or empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// The file, for messages.
    pub path: PathBuf,
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE), `llama` (SentencePiece) ...
    pub model: Option<String>,
    /// The pre-tokenizer: [`OpenOptions::pre`], else `tokenizer.ggml.pre`.
    pub pre: Option<String>,
    /// Token texts by id.
    pub tokens: Vec<String>,
    /// Scores by id (SentencePiece); as long as `tokens`, or empty.
    pub scores: Vec<f32>,
    /// Token types by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; as long as
    /// `tokens`, or empty.
    pub token_types: Vec<i32>,
    /// BPE merges in order of rank, the two parts separated by a space.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`.
    pub eot: Option<u32>,
    /// `unknown_token_id`.
    pub unk: Option<u32>,
    /// `padding_token_id`.
    pub pad: Option<u32>,
    /// `seperator_token_id` (spelt so in the format).
    pub sep: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `remove_extra_whitespaces`.
    pub remove_extra_whitespaces: Option<bool>,
    /// `tokenizer.chat_template`: Jinja.
    pub chat_template: Option<String>,
}

impl GgufTokenizer {
    /// Whether the file has none: no `tokenizer.ggml.model`, or one that says so.
    pub fn is_empty(&self) -> bool {
        matches!(self.model.as_deref(), None | Some("no_vocab" | "none"))
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

/// What [`Checkpoint::check`] went through; getting one means that nothing was wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Tensors decoded.
    pub tensors: usize,
    /// Ternary weights, all of them -1, 0 or 1.
    pub ternary_weights: u64,
    /// Those that are zero.
    pub zero_weights: u64,
    /// Values of norms, embedding and head, all of them finite.
    pub dense_values: u64,
    /// Bytes of all tensors in the file.
    pub bytes: u64,
}

/// A part of what a checkpoint is read from.
#[derive(Clone, Debug)]
pub enum Content {
    /// A file.
    File(PathBuf),
    /// Bytes that were in memory from the start, and what stands for their path.
    Memory(PathBuf, Bytes),
}

/// What a kind of file must answer. Names and rules are the implementation's.
pub(crate) trait Source: Send + Sync {
    fn projection(&self, layer: usize, which: Projection) -> Result<TernaryTensor, LoadError>;
    fn master(&self, layer: usize, which: Projection) -> Result<Option<DenseTensor>, LoadError>;
    fn norm(&self, which: Norm) -> Result<DenseTensor, LoadError>;
    fn embedding(&self) -> Result<DenseTensor, LoadError>;
    fn output(&self) -> Result<Option<DenseTensor>, LoadError>;
    fn tokenizer_source(&self) -> TokenizerSource;
    fn contents(&self) -> Vec<Content>;
    fn tensors(&self) -> Vec<TensorInfo>;
    fn metadata(&self) -> Vec<(String, String)>;
    /// The mapped files.
    fn maps(&self) -> Vec<&FileMap>;
}

/// A model's files, opened and checked against the model's shape.
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    warnings: Vec<String>,
    source: Box<dyn Source>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, config, warnings, source: _ } = self;
        f.debug_struct("Checkpoint")
            .field("path", path)
            .field("config", config)
            .field("warnings", warnings)
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens a GGUF file, a Hugging Face directory, or a directory with exactly one GGUF file.
    ///
    /// The files are mapped, their headers read, and every tensor that the model needs is checked to be
    /// there with the right shape and a type that can be read. The weights are not touched.
    ///
    /// # Errors
    /// [`LoadError`]
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, LoadError> {
        let meta = std::fs::metadata(path).map_err(|error| LoadError::Io {
            path: path.to_owned(),
            action: "open",
            error,
        })?;
        let mut warnings = Vec::new();
        let gguf = if meta.is_dir() { gguf_in_directory(path)? } else { Some(path.to_owned()) };
        let (source, config): (Box<dyn Source>, _) = match gguf {
            Some(file) => {
                let (model, config) = GgufModel::new(GgufFile::open(&file)?, options, &mut warnings)?;
                (Box::new(model), config)
            }
            None => {
                let (model, config) = HfModel::open(path, options, &mut warnings)?;
                (Box::new(model), config)
            }
        };
        Ok(Self::opened(path, config, warnings, source))
    }

    /// A GGUF file that is in memory already; `name` stands for its path.
    ///
    /// # Errors
    /// [`LoadError`]
    pub fn from_gguf(name: &Path, bytes: Bytes, options: &OpenOptions) -> Result<Self, LoadError> {
        let mut warnings = Vec::new();
        let file = GgufFile::parse(name.to_owned(), bytes)?;
        let (model, config) = GgufModel::new(file, options, &mut warnings)?;
        Ok(Self::opened(name, config, warnings, Box::new(model)))
    }

    fn opened(path: &Path, config: ModelConfig, warnings: Vec<String>, source: Box<dyn Source>) -> Self {
        for warning in &warnings {
            tracing::warn!(path = %path.display(), "{warning}");
        }
        Self { path: path.to_owned(), config, warnings, source }
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What was odd about the files without being wrong, in sentences.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// A ternary matrix of a layer: [N, K] as [`Projection::shape`] says.
    ///
    /// # Errors
    /// [`LoadError::NoSuchLayer`], [`LoadError::NotTernary`], [`LoadError::InvalidScale`].
    pub fn projection(&self, layer: usize, which: Projection) -> Result<TernaryTensor, LoadError> {
        self.check_layer(layer)?;
        self.source.projection(layer, which)
    }

    /// The latent float weights [N, K] that a projection is quantised from, in row-major order, all finite;
    /// `None` where the file holds ternary weights.
    ///
    /// # Errors
    /// [`LoadError::NoSuchLayer`], [`LoadError::NotFinite`].
    pub fn master(&self, layer: usize, which: Projection) -> Result<Option<Vec<f32>>, LoadError> {
        self.check_layer(layer)?;
        self.source.master(layer, which)?.map(|tensor| floats(&self.path, &tensor)).transpose()
    }

    /// The weights of an RMSNorm, all finite.
    ///
    /// # Errors
    /// [`LoadError::NoSuchLayer`], [`LoadError::NotFinite`]; [`LoadError::MissingTensor`] for a sub-norm of
    /// a model that has none.
    pub fn norm(&self, which: Norm) -> Result<Vec<f32>, LoadError> {
        if let Some(layer) = which.layer() {
            self.check_layer(layer)?;
        }
        floats(&self.path, &self.source.norm(which)?)
    }

    /// The embedding, [vocabulary, hidden].
    ///
    /// # Errors
    /// None after a successful [`open`](Self::open) that a caller could expect.
    pub fn embedding(&self) -> Result<DenseTensor, LoadError> {
        self.source.embedding()
    }

    /// The output head, [vocabulary, hidden], or `None` where the embedding serves as such.
    ///
    /// # Errors
    /// As [`embedding`](Self::embedding).
    pub fn output(&self) -> Result<Option<DenseTensor>, LoadError> {
        if self.config.tied_embeddings { Ok(None) } else { self.source.output() }
    }

    /// Gives the memory of the mapped files back to the system. Everything stays readable: what is read
    /// again comes from the file again.
    pub fn release(&self) {
        self.source.maps().into_iter().for_each(FileMap::release);
    }

    /// Says that single rows of a tensor are read from now on, not all of it: in huge pages each of them would
    /// bring two megabytes along.
    pub fn read_by_rows(&self, tensor: &DenseTensor) {
        self.source.maps().into_iter().for_each(|map| map.read_by_parts(&tensor.data));
    }

    /// What the model is read from: the GGUF file, or the weights, configurations and tokenizer of a Hugging
    /// Face directory, where they are there.
    pub fn contents(&self) -> Vec<Content> {
        self.source.contents()
    }

    /// Where to find the tokenizer.
    pub fn tokenizer_source(&self) -> TokenizerSource {
        self.source.tokenizer_source()
    }

    /// All tensors of the files, for display.
    pub fn tensors(&self) -> Vec<TensorInfo> {
        self.source.tensors()
    }

    /// All metadata of the files, printable, long values cut.
    pub fn metadata(&self) -> Vec<(String, String)> {
        self.source.metadata()
    }

    /// Reads everything: that all projections hold nothing but -1, 0 and 1, and that all other weights are
    /// finite.
    ///
    /// # Errors
    /// [`LoadError::NotTernary`], [`LoadError::NotFinite`] or [`LoadError::InvalidScale`] for the first
    /// tensor that is wrong, in the order in which the model uses them.
    pub fn check(&self) -> Result<CheckReport, LoadError> {
        let mut report =
            CheckReport { bytes: self.tensors().iter().map(|t| t.bytes).sum(), ..Default::default() };
        let embedding = self.embedding()?;
        report.dense_values += self.check_dense(&embedding)?;
        report.tensors += 1;
        for layer in 0..self.config.n_layers {
            for norm in Norm::of_layer(layer, self.config.sub_norms) {
                report.dense_values += self.norm(norm)?.len() as u64;
                report.tensors += 1;
            }
            for which in Projection::ALL {
                let tensor = self.checked_projection(layer, which)?;
                report.ternary_weights += tensor.n as u64 * tensor.k as u64;
                report.zero_weights += tensor.zeros();
                report.tensors += 1;
            }
        }
        report.dense_values += self.norm(Norm::Output)?.len() as u64;
        report.tensors += 1;
        if let Some(output) = self.output()? {
            report.dense_values += self.check_dense(&output)?;
            report.tensors += 1;
        }
        Ok(report)
    }

    /// A projection whose codes have all been looked at.
    pub(crate) fn checked_projection(
        &self,
        layer: usize,
        which: Projection,
    ) -> Result<TernaryTensor, LoadError> {
        let tensor = self.projection(layer, which)?;
        match check_canonical(&tensor.codes, tensor.n, tensor.k) {
            Ok(()) => Ok(tensor),
            Err(error) => Err(LoadError::NotTernary {
                path: self.path.clone(),
                tensor: tensor.name,
                stored_as: tensor.stored_as,
                problem: error.to_string(),
            }),
        }
    }

    fn check_layer(&self, layer: usize) -> Result<(), LoadError> {
        let n_layers = self.config.n_layers;
        if layer < n_layers {
            return Ok(());
        }
        Err(LoadError::NoSuchLayer { path: self.path.clone(), layer, n_layers })
    }

    /// Checks that all values are finite; says how many there are.
    fn check_dense(&self, tensor: &DenseTensor) -> Result<u64, LoadError> {
        let mut row = vec![0.0; tensor.k];
        for n in 0..tensor.n {
            decode_finite(&self.path, tensor, n, &mut row)?;
        }
        Ok(tensor.n as u64 * tensor.k as u64)
    }
}

/// The GGUF file that a directory stands for, or `None` where it is a Hugging Face directory.
fn gguf_in_directory(path: &Path) -> Result<Option<PathBuf>, LoadError> {
    let io = |error| LoadError::Io { path: path.to_owned(), action: "list", error };
    let has = |name| path.join(name).exists();
    let config = has("config.json");
    if config && (has(crate::hf::SINGLE) || has(crate::hf::INDEX)) {
        return Ok(None);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            files.push(file);
        }
    }
    files.sort();
    match &files[..] {
        [file] => Ok(Some(file.clone())),
        [] if config => Ok(None),
        [] => Err(LoadError::NoModel {
            path: path.to_owned(),
            problem: "the directory has neither a config.json nor a GGUF file".into(),
        }),
        several => {
            let names: Vec<_> =
                several.iter().filter_map(|f| f.file_name()).map(|n| n.to_string_lossy()).collect();
            Err(LoadError::NoModel {
                path: path.to_owned(),
                problem: format!(
                    "the directory has several GGUF files ({}): name one of them",
                    names.join(", ")
                ),
            })
        }
    }
}

/// What canonical rows are aligned to: a block.
const ROW_ALIGNMENT: usize = 32;

/// The bytes in a buffer aligned to 32; they move only if they have to.
pub(crate) fn aligned(bytes: Vec<u8>) -> Bytes {
    aligned_view(Bytes::from_owner(bytes))
}

/// The bytes themselves if they are aligned to 32, else a copy that is.
pub(crate) fn aligned_view(bytes: Bytes) -> Bytes {
    let misalignment = |address: *const u8| address.addr() % ROW_ALIGNMENT;
    if misalignment(bytes.as_ptr()) == 0 {
        return bytes;
    }
    let mut buffer = Vec::with_capacity(bytes.len() + ROW_ALIGNMENT);
    let start = (ROW_ALIGNMENT - misalignment(buffer.as_ptr())) % ROW_ALIGNMENT;
    buffer.resize(start, 0);
    buffer.extend_from_slice(&bytes); // within the capacity, so the buffer stays where it is
    let end = buffer.len();
    Bytes::from_owner(buffer).slice(start..end)
}

/// A scale that can be computed with.
pub(crate) fn checked_scale(path: &Path, tensor: &str, value: f32) -> Result<f32, LoadError> {
    if value.is_finite() && value >= 0.0 {
        return Ok(value);
    }
    Err(LoadError::InvalidScale {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        value,
        help: " and not negative",
    })
}

/// Decodes row `n` of a tensor and checks it.
fn decode_finite(path: &Path, tensor: &DenseTensor, n: usize, row: &mut [f32]) -> Result<(), LoadError> {
    let impossible = |problem: String| LoadError::InvalidShape {
        path: path.to_owned(),
        tensor: tensor.name.clone(),
        dims: vec![tensor.k as u64, tensor.n as u64],
        problem,
    };
    let bytes = tensor.row(n).ok_or_else(|| impossible(format!("row {n} is not in the data")))?;
    tensor.format.decode_row(bytes, row).map_err(|e| impossible(e.to_string()))?;
    match row.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(column) => Err(LoadError::NotFinite {
            path: path.to_owned(),
            tensor: tensor.name.clone(),
            row: n,
            column,
            value: row[column],
        }),
    }
}

/// All values of a small tensor, all finite.
pub(crate) fn floats(path: &Path, tensor: &DenseTensor) -> Result<Vec<f32>, LoadError> {
    let mut values = vec![0.0; tensor.n * tensor.k];
    for (n, row) in values.chunks_exact_mut(tensor.k.max(1)).enumerate() {
        decode_finite(path, tensor, n, row)?;
    }
    Ok(values)
}

/// The value of a tensor of one element.
pub(crate) fn one_float(path: &Path, tensor: &DenseTensor) -> Result<f32, LoadError> {
    match floats(path, tensor)?[..] {
        [value] => Ok(value),
        _ => Err(LoadError::WrongShape {
            path: path.to_owned(),
            tensor: tensor.name.clone(),
            found: vec![tensor.n as u64, tensor.k as u64],
            expected: vec![1],
        }),
    }
}

/// The feed-forward activation: the option, else what the file states under `(key, name)`, else the default.
pub(crate) fn choose_activation(
    path: &Path,
    options: &OpenOptions,
    stated: Option<(&str, &str)>,
    warnings: &mut Vec<String>,
    default: impl FnOnce() -> Result<Activation, LoadError>,
) -> Result<Activation, LoadError> {
    let of_file = match stated {
        None => default(),
        Some((key, name)) => Activation::from_name(name).ok_or_else(|| LoadError::UnknownActivation {
            path: path.to_owned(),
            problem: format!(
                "key `{key}` is \"{name}\", an activation that is not supported; supported: relu2, silu"
            ),
        }),
    };
    let Some(asked) = options.hidden_act else { return of_file };
    match (of_file, stated) {
        (Ok(found), None) if found != asked => {
            warnings.push(format!(
                "the activation is {asked} as asked for; by its architecture it would be {found}"
            ));
        }
        (Ok(found), Some((key, _))) if found != asked => {
            warnings.push(format!("the activation is {asked} as asked for; key `{key}` says {found}"));
        }
        (Err(e), Some(_)) => warnings.push(format!("the activation is {asked} as asked for; {e}")),
        _ => {}
    }
    Ok(asked)
}

/// Removes special tokens outside the vocabulary: they could never be embedded or sampled.
pub(crate) fn drop_foreign_tokens(config: &mut ModelConfig, warnings: &mut Vec<String>) {
    let size = config.vocab_size;
    let mut known = |what: &str, id: u32| {
        let known = (id as usize) < size;
        if !known {
            warnings.push(format!("the {what} token {id} is outside the vocabulary of {size} and ignored"));
        }
        known
    };
    config.bos_token = config.bos_token.filter(|&id| known("beginning", id));
    config.eos_tokens.retain(|&id| known("end", id));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgufTypes, GgufWriter};
    use std::process::Command;

    /// A directory or file of the golden data: in `BITNET_GOLDEN_DIR`, else the part that is kept here.
    fn golden(name: &str) -> Option<PathBuf> {
        let given = std::env::var_os("BITNET_GOLDEN_DIR").map(PathBuf::from);
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/golden");
        let found = given.into_iter().chain([kept]).map(|dir| dir.join(name)).find(|path| path.exists());
        if found.is_none() {
            eprintln!("SKIPPED: golden data {name} is not here; set BITNET_GOLDEN_DIR");
        }
        found
    }

    fn open(path: &Path) -> Checkpoint {
        let checkpoint = Checkpoint::open(path, &OpenOptions::default()).unwrap();
        assert_eq!(checkpoint.warnings(), &[] as &[String]);
        checkpoint
    }

    /// All projections of a model, each with its layer.
    fn projections(checkpoint: &Checkpoint) -> impl Iterator<Item = (usize, Projection, TernaryTensor)> {
        (0..checkpoint.config().n_layers).flat_map(move |layer| {
            Projection::ALL.map(|which| (layer, which, checkpoint.projection(layer, which).unwrap()))
        })
    }

    /// Equal codes; scales within `tolerance`, relative.
    fn assert_equal_ternary(a: &Checkpoint, b: &Checkpoint, tolerance: f32) {
        for (layer, which, ours) in projections(a) {
            let theirs = b.projection(layer, which).unwrap();
            assert_eq!((ours.n, ours.k), (theirs.n, theirs.k));
            assert!(ours.codes == theirs.codes, "codes of layer {layer} {which:?}");
            let (s, t) = (ours.scale, theirs.scale);
            assert!((s - t).abs() <= tolerance * s, "layer {layer} {which:?}: {ours:?} {theirs:?}");
            assert!(ours.codes.as_ptr().addr().is_multiple_of(ROW_ALIGNMENT));
        }
    }

    fn assert_equal_dense(a: &Checkpoint, b: &Checkpoint) {
        let n_layers = a.config().n_layers;
        for norm in (0..n_layers).flat_map(|l| Norm::of_layer(l, a.config().sub_norms)).chain([Norm::Output])
        {
            assert_eq!(a.norm(norm).unwrap(), b.norm(norm).unwrap(), "{norm:?}");
        }
        let matrices = |c: &Checkpoint| {
            [Some(c.embedding().unwrap()), c.output().unwrap()].map(|m| m.map(|m| (m.format, m.data)))
        };
        assert!(matrices(a) == matrices(b));
    }

    /// The contents of an xz file, by whichever program there is.
    fn unxz(path: &Path) -> Option<Vec<u8>> {
        let python = "import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())";
        let commands: [(&str, &[&str]); 2] = [("xz", &["-dc"]), ("python3", &["-c", python])];
        for (program, arguments) in commands {
            match Command::new(program).args(arguments).arg(path).output() {
                Ok(output) if output.status.success() => return Some(output.stdout),
                _ => {}
            }
        }
        eprintln!("SKIPPED: neither xz nor python3 could unpack {}", path.display());
        None
    }

    #[test]
    fn gguf_golden_opens_and_checks() {
        let checkpoint = open(&golden("gguf/tiny_a-i2_s.gguf").expect("kept in the repository"));
        let config = checkpoint.config();
        assert_eq!((config.hidden_size, config.intermediate_size, config.n_layers), (256, 768, 2));
        assert_eq!((config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size), (4, 2, 64, 320));
        assert_eq!((config.rope_theta, config.rms_norm_eps), (500_000.0, 1e-5));
        assert_eq!(
            (config.activation, config.sub_norms, config.tied_embeddings),
            (Activation::Relu2, true, true)
        );
        let report = checkpoint.check().unwrap();
        assert_eq!(report.ternary_weights, config.ternary_parameters());
        assert_eq!(report.tensors, 14 + 8 + 2);
        assert!(
            (0.2..0.5).contains(&(report.zero_weights as f64 / report.ternary_weights as f64)),
            "{report:?}"
        );
        for (_, _, tensor) in projections(&checkpoint) {
            assert_eq!(tensor.stored_as, "I2_S");
        }
        let TokenizerSource::Gguf(tokenizer) = checkpoint.tokenizer_source() else {
            panic!("a GGUF tokenizer")
        };
        assert_eq!((tokenizer.tokens.len(), tokenizer.model.as_deref()), (320, Some("gpt2")));
    }

    #[test]
    fn i2_s_and_floats_of_the_same_model_are_the_same() {
        let Some(packed) = golden("gguf/tiny_a-f32.gguf.xz") else { return };
        let Some(bytes) = unxz(&packed) else { return };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny_a-f32.gguf");
        std::fs::write(&path, bytes).unwrap();
        let floats = open(&path);
        assert_eq!(floats.projection(0, Projection::Q).unwrap().stored_as, "F32");
        let i2_s = open(&golden("gguf/tiny_a-i2_s.gguf").expect("kept in the repository"));
        assert_equal_ternary(&i2_s, &floats, 0.0);
        let (ours, theirs) = (i2_s.config(), floats.config());
        assert_eq!(ModelConfig { name: None, ..ours.clone() }, ModelConfig { name: None, ..theirs.clone() });
    }

    #[test]
    fn the_styles_of_hugging_face_hold_the_same_codes() {
        let auto = open(&golden("hf/A-packed-auto").expect("kept in the repository"));
        let inverse = open(&golden("hf/A-packed-bitlinear").expect("kept in the repository"));
        assert_eq!(auto.config(), inverse.config());
        assert_eq!((auto.config().vocab_size, auto.config().bos_token), (320, Some(312)));
        // Scales were rounded to bf16 (8 bits), in either direction.
        assert_equal_ternary(&auto, &inverse, 1.0 / 128.0);
        auto.check().unwrap();
        if let Some(path) = golden("hf/A-online-bf16") {
            let online = open(&path);
            assert_equal_ternary(&online, &auto, 1.0 / 256.0);
            assert_eq!(online.projection(0, Projection::Q).unwrap().stored_as, "BF16 master (absmean)");
        }
        if let Some(path) = golden("hf/A-online-f32") {
            let report = open(&path).check().unwrap();
            assert_eq!(report.ternary_weights, auto.config().ternary_parameters());
        }
        if let (Some(auto), Some(inverse)) = (golden("hf/B-packed-auto"), golden("hf/B-packed-bitlinear")) {
            let (auto, inverse) = (open(&auto), open(&inverse));
            assert_equal_ternary(&auto, &inverse, 2e-7);
            let config = auto.config();
            assert_eq!(
                (config.rope_theta, config.rms_norm_eps, config.tied_embeddings),
                (10_000.0, 1e-6, false)
            );
            auto.check().unwrap();
        }
    }

    #[test]
    fn a_model_survives_the_way_into_gguf() {
        let names = ["A-packed-auto", "A-packed-bitlinear", "A-online-bf16", "A-online-f32", "B-packed-auto"];
        for path in names.iter().filter_map(|name| golden(&format!("hf/{name}"))) {
            let original = open(&path);
            let dir = tempfile::tempdir().unwrap();
            let mut writer = GgufWriter::new();
            writer.checkpoint(&original, GgufTypes::default()).unwrap();
            writer.write(&dir.path().join("model.gguf")).unwrap();

            let copy = open(dir.path()); // the only GGUF file in it
            let expected = ModelConfig { architecture: "bitnet-b1.58".into(), ..original.config().clone() };
            assert_eq!(copy.config(), &expected);
            assert_equal_ternary(&original, &copy, 0.0);
            assert_equal_dense(&original, &copy);
            assert_eq!(copy.check().unwrap().zero_weights, original.check().unwrap().zero_weights);
        }
    }

    #[test]
    fn owned_buffers_are_aligned() {
        for offset in 0..70 {
            let bytes = Bytes::from(vec![7u8; 1000]).slice(offset..);
            let view = aligned_view(bytes.clone());
            assert!(view.as_ptr().addr().is_multiple_of(ROW_ALIGNMENT) && view == bytes);
        }
        assert!(aligned(Vec::new()).is_empty());
    }

    #[test]
    fn a_checkpoint_can_be_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Checkpoint>();
        shared::<LoadError>();
    }
}
