//! Checkpoints from one format to another: GGUF and Hugging Face directories, whatever
//! [`Checkpoint::open`] reads, to GGUF or to a Hugging Face directory.
//!
//! | target | projections | needs |
//! | --- | --- | --- |
//! | GGUF, I2_S | codes and scale, exactly | K a multiple of 128 |
//! | GGUF, Q2_0, PQ2_0, PTQ1_0, TQ2_0, TQ1_0 | exactly, if scales are f16 and shared by 64, 128 or 256 weights; else the nearest, if [that is allowed](GgufTypes::requantise) | K a multiple of 64, 128 or 256 |
//! | Hugging Face, [`Style::Values`] | float values, exactly | a model without int8 activations by row |
//! | Hugging Face, [`Style::PackedAuto`] | codes and scale, exactly | N a multiple of 4 |
//! | Hugging Face, [`Style::PackedInverse`] | codes exactly; the scale where 1 / (1 / s) is s | N a multiple of 4 |
//! | Hugging Face, [`Style::Online`] | the float masters, exactly | a checkpoint that has them |
//!
//! Projections with one scale and int8 activations by row go into I2_S and the packed styles, others do not: a reader takes
//! the activations from there. Embedding and output head keep their type, unless another is asked for, they are ternary
//! like the projections, or a Hugging Face directory can't have it (then they become a type that holds them exactly). The
//! tokenizer goes with the model.
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
mod error;
mod place;
mod target;
mod write;

use bitnet_burn::ModelConfig;
use bitnet_burn_engine::checkpoint::{Checkpoint, LoadError, OpenOptions};
use bitnet_burn_engine::gguf::GgufTypes;
use bitnet_burn_engine::hf::Style;
use bitnet_burn_formats::dense::DenseFormat;
pub use error::ExportError;
use place::{Kind, Place, io_error};
use serde::Serialize;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
pub use target::{default_style, default_ternary};

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
        /// exactly, else F32, which does in any case. With masters, F32. With [`Style::Values`] each keeps its own.
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
    /// Weights of projections, all of them equal to the source's but for those of scales and [requantised](Self::requantised)
    /// projections.
    pub ternary_weights: u64,
    /// Embedding and output head, where their type is another than in the source, and norms, where they had to
    /// be rounded.
    pub converted: Vec<Converted>,
    /// Scales that are not exactly those of the source, where there are any.
    pub scales: Option<RoundedScales>,
    /// Projections that are not those of the source, where there are any.
    pub requantised: Option<Requantised>,
    /// What else is not as in the source, in sentences.
    pub notes: Vec<String>,
    /// What other programs get wrong about the file, in sentences.
    pub warnings: Vec<String>,
}

impl Summary {
    /// Whether every weight is exactly that of the source.
    pub fn is_exact(&self) -> bool {
        self.scales.is_none()
            && self.requantised.is_none()
            && self.converted.iter().all(|c| c.max_error == 0.0)
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

/// Projections that the type could not hold exactly.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Requantised {
    /// How many.
    pub tensors: usize,
    /// Root mean square of the differences of their weights, by that of the weights.
    pub rms: f64,
    /// The largest difference of a weight.
    pub max_error: f32,
    /// The projection that has it.
    pub tensor: String,
    /// The projection with the largest root mean square, and that.
    pub worst: (String, f64),
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
    target::check(checkpoint, options.target)?;
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
            write::gguf(checkpoint, config, types, options, &path, &mut summary.notes, &mut advance)
        }
        Target::Hf { style, dense } => {
            write::hf(checkpoint, config, (style, dense), options, &path, &mut summary.notes, &mut advance)
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
