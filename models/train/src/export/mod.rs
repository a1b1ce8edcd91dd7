//! Checkpoints from one format to another: GGUF and Hugging Face directories, whatever
//! [`Checkpoint::open`] reads, to GGUF or to a Hugging Face directory.
//!
//! | target | projections | needs |
//! | --- | --- | --- |
//! | GGUF, I2_S | codes and scale, exactly | K a multiple of 128 |
//! | GGUF, TQ2_0 or TQ1_0 | codes exactly; the scale rounded to f16 | K a multiple of 256 |
//! | Hugging Face, [`Style::PackedAuto`] | codes and scale, exactly | N a multiple of 4 |
//! | Hugging Face, [`Style::PackedInverse`] | codes exactly; the scale where 1 / (1 / s) is s | N a multiple of 4 |
//! | Hugging Face, [`Style::Online`] | the float masters, exactly | a checkpoint that has them |
//!
//! Embedding and output head keep their type, unless another is asked for, or a Hugging Face directory can't
//! have it (then they become F32, which holds all the others exactly). The tokenizer goes with the model.
//!
//! What was written is read back before it gets its name, every tensor is compared with the source, and the
//! [`Summary`] has what was found: a copy is exact where it says so. A model that can't be written leaves
//! nothing behind; one that is replaced stays until the new one is complete.
//!
//! ```no_run
//! use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
//! use bitnet_burn_train::export::{ExportOptions, Target, export};
//! use bitnet_burn_engine::gguf::GgufTypes;
//! use std::ops::ControlFlow;
//!
//! let checkpoint = Checkpoint::open("Falcon-E".as_ref(), &OpenOptions::default())?;
//! let options = ExportOptions::new(Target::Gguf(GgufTypes::default()));
//! let summary = export(&checkpoint, "falcon-e.gguf".as_ref(), &options, &mut |_| ControlFlow::Continue(()))?;
//! println!("{} bytes; exact: {}", summary.bytes, summary.is_exact());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod compare;
mod place;

use crate::TrainError;
use bitnet_burn::ModelConfig;
use bitnet_burn::{Norm, Projection};
use bitnet_burn_engine::checkpoint::{Checkpoint, LoadError, OpenOptions, TokenizerSource};
use bitnet_burn_engine::gguf::{self, GgufTypes, GgufWriteError, TernaryType};
use bitnet_burn_engine::hf;
use bitnet_burn_engine::hf::{HfWriteError, Style};
use bitnet_burn_engine::tokenizer::{TranslateError, translate};
use bitnet_burn_formats::WriteError;
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_formats::gguf::{Array, GgufFile, GgufWriter, TensorType, Value};
use place::{Kind, Place, io_error};
use serde::Serialize;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// One GGUF file.
    Gguf(GgufTypes),
    /// A Hugging Face directory.
    Hf {
        /// How the projections are stored.
        style: Style,
        /// The type of embedding, output head and norms, one of F32, F16 and BF16 (transformers needs one type
        /// for all of them); `None`: the checkpoint's type of the embedding where that holds the others
        /// exactly, else F32, which does in any case. With masters, F32.
        dense: Option<DenseFormat>,
    },
}

/// How a model is written.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The format.
    pub target: Target,
    /// The model's name in the file; `None`: the one that it has, else that of the source's file or directory.
    pub name: Option<String>,
    /// Whether the tokenizer goes with it.
    pub tokenizer: bool,
    /// The pre-tokenizer's name in GGUF, for a `tokenizer.json` whose own is not recognised.
    pub pre: Option<String>,
    /// Whether a model that is there already is replaced.
    pub overwrite: bool,
}

impl ExportOptions {
    /// With the tokenizer, under the model's own name, replacing nothing.
    pub fn new(target: Target) -> Self {
        Self { target, name: None, tokenizer: true, pre: None, overwrite: false }
    }
}

/// How far [`export`] is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Of the file that is written.
    Writing {
        /// So far.
        done: u64,
        /// All of it.
        total: u64,
    },
    /// Of the source's tensors that were compared with what was written.
    Comparing {
        /// So far.
        done: u64,
        /// All of them.
        total: u64,
    },
}

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
        "{}: the latent weights (masters) are not in this checkpoint: its projections are ternary already \
         ({stored_as}), and what was rounded away can't be computed back; export the checkpoint that training \
         wrote, or write the packed style", path.display()
    )]
    NoMasters {
        /// The checkpoint.
        path: PathBuf,
        /// How it holds its projections.
        stored_as: &'static str,
    },
    /// The writers do not know models of this kind.
    #[error(
        "{}: models of the architecture `{architecture}` with projections of several scales, norms of queries and \
         keys, biases, scaled RoPE, factors or rotations can't be written yet; they can be run", path.display()
    )]
    Architecture {
        /// The checkpoint.
        path: PathBuf,
        /// Its architecture.
        architecture: String,
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
        instead: &'static str,
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
    fn instead_of(mut self, temporary: &Path, out: &Path) -> Self {
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

/// What was written, as it was found when it was read back.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// The file or directory.
    pub path: PathBuf,
    /// `GGUF`, or `Hugging Face`.
    pub format: &'static str,
    /// The architecture that it names.
    pub architecture: String,
    /// How the projections are stored.
    pub projections: String,
    /// How embedding and output head are stored.
    pub embedding: &'static str,
    /// Size of all files.
    pub bytes: u64,
    /// The files, with their sizes.
    pub files: Vec<(String, u64)>,
    /// Tensors, all of which were compared with the source.
    pub tensors: usize,
    /// Ternary weights, all of them equal to the source's.
    pub ternary_weights: u64,
    /// Embedding and output head, where their type is another than in the source, and norms, where they had to
    /// be rounded.
    pub converted: Vec<Converted>,
    /// Scales that are not exactly those of the source, where there are any.
    pub scales: Option<RoundedScales>,
    /// What else is not as in the source, in sentences.
    pub notes: Vec<String>,
    /// What other programs get wrong about the file, in sentences.
    pub warnings: Vec<String>,
}

impl Summary {
    /// Whether every weight is exactly that of the source.
    pub fn is_exact(&self) -> bool {
        self.scales.is_none() && self.converted.iter().all(|c| c.max_error == 0.0)
    }
}

/// An embedding, an output head or all norms in another type.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Converted {
    /// The tensor's name in the source, or `norms`.
    pub tensor: String,
    /// Its type there.
    pub from: &'static str,
    /// Its type now.
    pub to: &'static str,
    /// The largest difference of a value; 0: the values are the same.
    pub max_error: f32,
    /// The largest magnitude of a value.
    pub max_value: f32,
}

/// Scales that had to be rounded.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoundedScales {
    /// Why.
    pub reason: &'static str,
    /// Projections with such a scale.
    pub tensors: usize,
    /// The largest relative difference.
    pub max_relative_error: f32,
    /// The projection that has it.
    pub tensor: String,
}

/// What a tokenizer consists of in a Hugging Face directory.
pub(crate) const TOKENIZER_FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
];

/// The checkpoint that a path stands for: for the directory of a training run (one that has `checkpoints/` in
/// it and is no model itself) the newest that is finished, else the path.
///
/// # Errors
/// [`ExportError::NoCheckpoint`], or the directory can't be read.
pub fn newest_checkpoint(path: &Path) -> Result<PathBuf, ExportError> {
    if path.join("config.json").exists() || !crate::has_checkpoints(path) {
        return Ok(path.to_owned());
    }
    crate::newest(path)?.ok_or_else(|| ExportError::NoCheckpoint { path: path.to_owned() })
}

/// Writes `checkpoint` to `out`, a file or directory by the target's kind.
///
/// # Arguments
/// - `progress`: is told how far it is, and can end it
///
/// # Errors
/// [`ExportError`]; `out` is then as it was, and there is nothing new beside it.
pub fn export(
    checkpoint: &Checkpoint,
    out: &Path,
    options: &ExportOptions,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Summary, ExportError> {
    check_target(checkpoint, options.target)?;
    let kind = match options.target {
        Target::Gguf(_) => Kind::File,
        Target::Hf { .. } => Kind::Directory,
    };
    let place = Place::new(checkpoint.path(), out, kind, options.overwrite)?;
    let path = place.path();
    let mut summary = Summary { path: out.to_owned(), ..Summary::default() };
    let name =
        options.name.clone().or(checkpoint.config().name.clone()).or_else(|| name_of(checkpoint.path()));
    let config = ModelConfig { name, ..checkpoint.config().clone() };

    let mut interrupted = false;
    let mut done = 0;
    let mut advance = |bytes: u64, total: u64| {
        done += bytes;
        match progress(Progress::Writing { done, total: total.max(done) }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => {
                interrupted = true;
                Err(io::Error::other("interrupted"))
            }
        }
    };
    let written = match options.target {
        Target::Gguf(types) => {
            write_gguf(checkpoint, config, types, options, &path, &mut summary.notes, &mut advance)
        }
        Target::Hf { style, dense } => {
            write_hf(checkpoint, config, style, dense, options, &path, &mut summary.notes, &mut advance)
        }
    };
    match written {
        Err(_) if interrupted => return Err(ExportError::Interrupted),
        result => result.map_err(|error| error.instead_of(&path, out))?,
    }

    let copy = Checkpoint::open(&path, &OpenOptions::default())?;
    compare::compare(checkpoint, &copy, options, &mut summary, progress)?;
    drop(copy);
    summary.files = match kind {
        Kind::File => vec![(file_name(out), size_of(&path)?)],
        Kind::Directory => files_of(&path)?,
    };
    summary.bytes = summary.files.iter().map(|(_, bytes)| bytes).sum();
    checkpoint.intact().map_err(LoadError::from)?;
    place.commit()?;
    Ok(summary)
}

/// Refuses what no writer could do, before anything is written.
fn check_target(checkpoint: &Checkpoint, target: Target) -> Result<(), ExportError> {
    let config = checkpoint.config();
    if !config.options.is_default()
        || checkpoint.dense_bytes(0, Projection::Q).is_some()
        || checkpoint.is_rotated()
    {
        let (path, architecture) = (checkpoint.path().to_owned(), config.architecture.clone());
        return Err(ExportError::Architecture { path, architecture });
    }
    let projections = || {
        Projection::ALL.map(|which| {
            let (n, k) = which.shape(config);
            (format!("{which:?} projection"), n, k)
        })
    };
    let dense = match target {
        Target::Gguf(types) => {
            let (tensor_type, of) = match types.ternary {
                TernaryType::I2_S => (TensorType::I2_S, 128),
                TernaryType::TQ2_0 => (TensorType::TQ2_0, 256),
                TernaryType::TQ1_0 => (TensorType::TQ1_0, 256),
            };
            let all = projections();
            if let Some((tensor, n, k)) = all.iter().find(|(_, _, k)| !k.is_multiple_of(of)).cloned() {
                let instead = if fits_i2_s(&all) {
                    "I2_S needs 128 only"
                } else if fits_packed(&all) {
                    "GGUF has no ternary type for that: write a Hugging Face directory, whose packed style has \
                     no such limit"
                } else {
                    NO_TYPE
                };
                let format = tensor_type.name();
                return Err(ExportError::Shape { tensor, n, k, format, dimension: "K", of, instead });
            }
            types.dense
        }
        Target::Hf { style: Style::Online, dense } => {
            if checkpoint.master(0, Projection::Q)?.is_none() {
                let stored_as = checkpoint.projection(0, Projection::Q)?.stored_as;
                return Err(ExportError::NoMasters { path: checkpoint.path().to_owned(), stored_as });
            }
            dense
        }
        Target::Hf { dense, .. } => {
            let all = projections();
            if let Some((tensor, n, k)) = all.iter().find(|(_, n, _)| !n.is_multiple_of(4)).cloned() {
                let instead = if fits_i2_s(&all) {
                    "four rows go into a byte there: write a GGUF file, which has no such limit"
                } else {
                    NO_TYPE
                };
                let format = "packed uint8";
                return Err(ExportError::Shape { tensor, n, k, format, dimension: "N", of: 4, instead });
            }
            dense
        }
    };
    let Some(dense) = dense else { return Ok(()) };
    if matches!(target, Target::Hf { .. }) && dense.block_len() > 1 {
        return Err(ExportError::DenseType(dense.name()));
    }
    let (n, k, of) = (config.vocab_size, config.hidden_size, dense.block_len());
    if !k.is_multiple_of(of) {
        let instead = "F32, F16 and BF16 hold any width, Q8_0 and Q4_0 multiples of 32";
        let (tensor, format) = ("embedding".into(), dense.name());
        return Err(ExportError::Shape { tensor, n, k, format, dimension: "K", of, instead });
    }
    Ok(())
}

/// What to do with a model that fits no packed format.
const NO_TYPE: &str = "neither GGUF's ternary types nor the packed style hold this model; only --style master, \
                       from float masters, does";

/// A matrix's name, N and K.
type Shape = (String, usize, usize);

fn fits_i2_s(shapes: &[Shape]) -> bool {
    shapes.iter().all(|(_, _, k)| k.is_multiple_of(128))
}

fn fits_packed(shapes: &[Shape]) -> bool {
    shapes.iter().all(|(_, n, _)| n.is_multiple_of(4))
}

/// Gets the bytes of a write and the size of the whole.
type Advance<'p> = dyn FnMut(u64, u64) -> io::Result<()> + 'p;

fn write_gguf(
    checkpoint: &Checkpoint,
    mut config: ModelConfig,
    types: GgufTypes,
    options: &ExportOptions,
    path: &Path,
    notes: &mut Vec<String>,
    advance: &mut Advance<'_>,
) -> Result<(), ExportError> {
    let mut metadata: Vec<(String, Value)> = Vec::new();
    let source = checkpoint.tokenizer_source();
    let found = options.tokenizer && translate::is_there(&source);
    match &source {
        TokenizerSource::Gguf(keys) => {
            // Everything that is no fact about the tensors, also what nothing here reads.
            let about_tensors =
                ["architecture", "name", "type", "alignment", "file_type", "quantization_version"];
            for (key, value) in GgufFile::open(&keys.path).map_err(LoadError::from)?.metadata() {
                let general = key.strip_prefix("general.").is_some_and(|k| !about_tensors.contains(&k));
                let tokenizer = key.starts_with("tokenizer.") && key != "tokenizer.ggml.pre";
                if general || (found && tokenizer) {
                    metadata.push((key.clone(), value.clone()));
                }
            }
            if let Some(pre) = keys.pre.clone().filter(|_| found) {
                metadata.push(("tokenizer.ggml.pre".into(), pre.into()));
            }
        }
        TokenizerSource::Hf { dir } if found => {
            let keys = translate::to_gguf(dir, &config, options.pre.as_deref(), notes)?;
            config.bos_token = keys.bos;
            metadata.extend(tokenizer_keys(keys));
        }
        TokenizerSource::Hf { .. } => {}
    }
    if !found {
        metadata.push(("tokenizer.ggml.model".into(), "no_vocab".into()));
    }
    let mut writer = GgufWriter::new();
    gguf::write_checkpoint(&mut writer, &config, checkpoint, types)?;
    writer.set("general.type", "model")?;
    // The numbers of llama.cpp (`llama_ftype`), and of bitnet.cpp for I2_S.
    let file_type = match types.ternary {
        TernaryType::TQ1_0 => 36u32,
        TernaryType::TQ2_0 => 37,
        TernaryType::I2_S => 40,
    };
    writer.set("general.file_type", file_type)?;
    writer.set("general.quantization_version", 2u32)?;
    for (key, value) in metadata {
        match writer.set(key, value) {
            // The ids of tokens with a role come from the configuration.
            Ok(_) | Err(WriteError::Duplicate { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let total = writer.file_size();
    Ok(writer.write_with(path, &mut |bytes| advance(bytes, total))?)
}

/// The keys of a tokenizer but for the ids that the configuration has.
fn tokenizer_keys(keys: bitnet_burn_engine::checkpoint::GgufTokenizer) -> Vec<(String, Value)> {
    let arrays = [
        ("tokens", Some(Array::from_strings(keys.tokens))),
        ("scores", (!keys.scores.is_empty()).then(|| Array::from_f32(keys.scores))),
        ("token_type", Some(Array::from_i32(keys.token_types))),
        ("merges", (!keys.merges.is_empty()).then(|| Array::from_strings(keys.merges))),
    ];
    let values = [
        ("model", keys.model.map(Value::from)),
        ("pre", keys.pre.map(Value::from)),
        ("eos_token_id", keys.eos.map(Value::from)),
        ("unknown_token_id", keys.unk.map(Value::from)),
        ("padding_token_id", keys.pad.map(Value::from)),
        ("add_bos_token", keys.add_bos.map(Value::from)),
        ("add_eos_token", keys.add_eos.map(Value::from)),
        ("add_space_prefix", keys.add_space_prefix.map(Value::from)),
    ];
    let arrays = arrays.into_iter().filter_map(|(key, array)| Some((key, array?.into())));
    let values = values.into_iter().filter_map(|(key, value)| Some((key, value?)));
    let keyed = values.chain(arrays).map(|(key, value)| (format!("tokenizer.ggml.{key}"), value));
    keyed.chain(keys.chat_template.map(|t| ("tokenizer.chat_template".to_owned(), t.into()))).collect()
}

#[allow(clippy::too_many_arguments, reason = "called once")]
fn write_hf(
    checkpoint: &Checkpoint,
    config: ModelConfig,
    style: Style,
    dense: Option<DenseFormat>,
    options: &ExportOptions,
    path: &Path,
    notes: &mut Vec<String>,
    advance: &mut Advance<'_>,
) -> Result<(), ExportError> {
    let dense = match dense {
        Some(dense) => dense,
        None => exact_dense(checkpoint, style)?,
    };
    if config.sub_norms && config.q_size() != config.hidden_size {
        notes.push(format!(
            "transformers' BitNetForCausalLM can't compute this model: its heads are {} wide together, the residual \
             stream {}",
            config.q_size(),
            config.hidden_size
        ));
    }
    let total = hf::checkpoint_size(&config, style, dense);
    let progress = &mut |bytes| advance(bytes, total);
    hf::write_checkpoint(path, checkpoint, &config, style, dense, progress)?;
    let copy = |from: &Path, name: &str| match std::fs::read(from.join(name)) {
        Ok(bytes) => Ok(hf::write_bytes(&path.join(name), &bytes)?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error(&from.join(name), "read")(error)),
    };
    let source = checkpoint.tokenizer_source();
    if let TokenizerSource::Hf { dir } = &source {
        // It may hold more than the end tokens: how to sample.
        copy(dir, "generation_config.json")?;
    }
    match source {
        _ if !options.tokenizer => {}
        TokenizerSource::Hf { dir } => TOKENIZER_FILES.iter().try_for_each(|name| copy(&dir, name))?,
        TokenizerSource::Gguf(keys) if !keys.is_empty() => {
            let files = translate::to_hf(&keys, &config)?;
            hf::write_bytes(&path.join("tokenizer.json"), files.tokenizer.as_bytes())?;
            hf::write_json(&path.join("tokenizer_config.json"), &files.config)?;
        }
        TokenizerSource::Gguf(_) => {}
    }
    Ok(())
}

/// The type in which a Hugging Face directory holds embedding, head and norms exactly.
fn exact_dense(checkpoint: &Checkpoint, style: Style) -> Result<DenseFormat, LoadError> {
    let (config, stored) = (checkpoint.config(), checkpoint.embedding()?.format);
    let head = checkpoint.output()?.map_or(stored, |output| output.format);
    if style == Style::Online || stored.block_len() > 1 || head != stored {
        return Ok(DenseFormat::F32);
    }
    let layers = (0..config.n_layers).flat_map(|layer| Norm::of_layer(layer, config));
    for which in layers.chain([Norm::Output]) {
        let weights = checkpoint.norm(which)?;
        if compare::rounded(&weights, stored).is_none_or(|rounded| rounded != weights) {
            return Ok(DenseFormat::F32);
        }
    }
    Ok(stored)
}

/// The name of a file or directory, without a file's extension.
fn name_of(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    name.map(|name| name.to_string_lossy().into_owned())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn size_of(path: &Path) -> Result<u64, ExportError> {
    Ok(std::fs::metadata(path).map_err(io_error(path, "read"))?.len())
}

fn files_of(path: &Path) -> Result<Vec<(String, u64)>, ExportError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io_error(path, "list"))? {
        let file = entry.map_err(io_error(path, "list"))?.path();
        files.push((file_name(&file), size_of(&file)?));
    }
    files.sort();
    Ok(files)
}
