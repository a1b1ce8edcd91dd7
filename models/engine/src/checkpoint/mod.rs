//! A model's files as the model sees them: a configuration, and tensors by the part that they play.
//!
//! [`Checkpoint::open`] takes a GGUF file or a Hugging Face directory. What differs between them (names,
//! packings, the direction of a scale, masters or codes) is translated below this interface, and nothing
//! above it knows about it: a projection is always a [`TernaryTensor`] in the canonical layout.
//!
//! Files are memory-mapped. **Changing or truncating a file while a checkpoint, or a tensor taken from
//! one, is alive is undefined behaviour**: replace files by renaming a new one over the old name (which
//! is what [`GgufWriter`](bitnet_burn_formats::gguf::GgufWriter) does).
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

mod choices;
mod embed;
mod error;
pub(crate) mod gguf;
pub(crate) mod hf;
mod merged;
mod missing;
mod source;
#[cfg(test)]
mod tests;
mod tokenizer_source;
mod values;

pub use embed::{EMBED_COMPANIONS, EmbedDefaults, Pooling};
pub use error::LoadError;
pub(crate) use hf::EXTENSION;
pub use hf::{COMPANIONS, Style};
pub use merged::MergeLoss;
pub use source::{Content, OpenOptions, Rotated, Signs, TensorInfo, Weights};
pub(crate) use tokenizer_source::{END_OF_GENERATION, end_of_generation};
pub use tokenizer_source::{GgufTokenizer, TokenizerSource};

use bitnet_burn::{ActivationRule, FloatPart, ModelConfig, Norm, Projection};
use bitnet_burn_formats::gguf::GgufFile;
use bitnet_burn_formats::{
    DenseTensor, FileError, FileMap, TernaryTensor, WeightScale, check_canonical, safetensors, ternary,
};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::adapter;
use gguf::GgufModel;
use hf::HfModel;
use source::Source;
use values::{decode_finite, f32_tensor, floats};

/// What [`Checkpoint::check`] went through; getting one means that nothing was wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Tensors decoded.
    pub tensors: usize,
    /// Ternary weights, all of them -1, 0 or 1.
    pub ternary_weights: u64,
    /// Those that are zero.
    pub zero_weights: u64,
    /// Projections by the weights that share a scale: `tensor`, `row`, `group:64`.
    pub scales: BTreeMap<String, usize>,
    /// Values of norms, embedding, head and projections that are not ternary, all of them finite.
    pub dense_values: u64,
    /// Bytes of all tensors in the file.
    pub bytes: u64,
}

impl CheckReport {
    /// Adds a matrix [n, k] of valid canonical codes.
    fn count_ternary(&mut self, codes: &[u8], scale: WeightScale, n: usize, k: usize) {
        self.ternary_weights += n as u64 * k as u64;
        self.zero_weights += ternary::zeros(codes, n, k);
        *self.scales.entry(scale.to_string()).or_default() += 1;
    }
}

/// A model's files, opened and checked against the model's shape.
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    warnings: Vec<String>,
    source: Box<dyn Source>,
    /// The map of its packed weights, if there is one.
    prepacked: OnceLock<FileMap>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, config, warnings, source: _, prepacked: _ } = self;
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
        let meta = std::fs::metadata(path).map_err(|error| FileError::Io {
            path: path.to_owned(),
            action: "open",
            error,
        })?;
        let mut warnings = Vec::new();
        let gguf = if meta.is_dir() { gguf_in_directory(path)? } else { Some(path.to_owned()) };
        let (source, config): (Box<dyn Source>, _) = match gguf {
            Some(file) => {
                let file = GgufFile::open(&file).map_err(gguf::what_matters)?;
                let (model, config) = GgufModel::new(file, options, &mut warnings)?;
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
        let file = GgufFile::parse(name.to_owned(), bytes).map_err(gguf::what_matters)?;
        let (model, config) = GgufModel::new(file, options, &mut warnings)?;
        Ok(Self::opened(name, config, warnings, Box::new(model)))
    }

    fn opened(path: &Path, config: ModelConfig, warnings: Vec<String>, source: Box<dyn Source>) -> Self {
        for warning in &warnings {
            tracing::warn!(path = %path.display(), "{warning}");
        }
        Self { path: path.to_owned(), config, warnings, source, prepacked: OnceLock::new() }
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

    /// A matrix of a layer: [N, K] as [`Projection::shape`] says.
    ///
    /// # Errors
    /// [`LoadError::NoSuchLayer`], [`LoadError::NotTernary`], [`LoadError::InvalidScale`].
    pub fn weights(&self, layer: usize, which: Projection) -> Result<Weights, LoadError> {
        self.check_layer(layer)?;
        self.source.weights(layer, which)
    }

    /// [`weights`](Self::weights) that are ternary with one scale.
    ///
    /// # Errors
    /// As there, and [`LoadError::NotTernary`] for those that are not.
    pub fn projection(&self, layer: usize, which: Projection) -> Result<TernaryTensor, LoadError> {
        match self.weights(layer, which)? {
            Weights::Ternary(tensor) => Ok(tensor),
            Weights::Dense(tensor) => Err(LoadError::NotTernary {
                path: self.path.clone(),
                tensor: tensor.name,
                stored_as: tensor.format.name(),
                problem: "it does not have one scale".into(),
            }),
        }
    }

    /// The size of a projection's weights, where the header says that they are [dense](Weights::Dense).
    pub fn dense_bytes(&self, layer: usize, which: Projection) -> Option<u64> {
        self.source.dense_bytes(layer, which)
    }

    /// How activations are quantised by a rule: what the files declare for [`ActivationRule::Model`], if they do.
    pub fn activations(&self, rule: ActivationRule) -> ActivationRule {
        match rule {
            ActivationRule::Model => self.declared_activations().unwrap_or(rule),
            _ => rule,
        }
    }

    /// How the files declare that activations are quantised, where they use a key of this project for that.
    pub(crate) fn declared_activations(&self) -> Option<ActivationRule> {
        self.source.activations()
    }

    /// How a matrix is rotated, if it is.
    pub fn rotation(&self, of: Rotated) -> Option<Signs> {
        self.source.rotation(of)
    }

    /// Whether any matrix is rotated.
    pub fn is_rotated(&self) -> bool {
        let layers = (0..self.config.n_layers)
            .flat_map(|layer| {
                Projection::of_layer(layer, &self.config).into_iter().map(move |of| (layer, of))
            })
            .map(|(layer, which)| Rotated::Projection(layer, which));
        layers.chain([Rotated::Embedding, Rotated::Output]).any(|of| self.rotation(of).is_some())
    }

    /// The bias of a projection that [has one](Projection::has_bias), all finite.
    ///
    /// # Errors
    /// [`LoadError::NoSuchLayer`], [`LoadError::NotFinite`]; [`FileError::MissingTensor`] for a projection without.
    pub fn bias(&self, layer: usize, which: Projection) -> Result<Vec<f32>, LoadError> {
        self.check_layer(layer)?;
        floats(&self.path, &self.source.bias(layer, which)?)
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

    /// A part of a layer that is floats in every model, in the [shape](FloatPart::shape) and with the values that layers
    /// take.
    ///
    /// # Errors
    /// [`LoadError::NoSuchLayer`], [`LoadError::NotFinite`]; [`FileError::MissingTensor`] for a layer without it.
    pub fn float_part(&self, layer: usize, which: FloatPart) -> Result<DenseTensor, LoadError> {
        self.check_layer(layer)?;
        self.source.float_part(layer, which)
    }

    /// The weights of an RMSNorm, all finite.
    ///
    /// # Errors
    /// [`LoadError::NoSuchLayer`], [`LoadError::NotFinite`]; [`FileError::MissingTensor`] for a sub-norm of
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

    /// The map of the file that these bytes are a part of; `None` for bytes that were read or made of it.
    pub(crate) fn map_of(&self, part: &[u8]) -> Option<FileMap> {
        self.source.maps().into_iter().find(|map| map.offset_of(part).is_some()).cloned()
    }

    /// That no part of a mapped file was missing when it was read. (A program must
    /// [outlive](bitnet_burn_formats::outlive_truncation) that first.)
    ///
    /// # Errors
    /// [`FileError::Shrank`].
    pub fn intact(&self) -> Result<(), FileError> {
        self.source.maps().into_iter().chain(self.prepacked.get()).try_for_each(FileMap::intact)
    }

    /// What lies beside the model and is mapped with it.
    pub(crate) fn keep_prepacked(&self, map: FileMap) {
        // Whoever opens the same file twice has it in view by the first map.
        let _ = self.prepacked.set(map);
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

    /// What the files say about embeddings of texts. What they say about pooling is not looked at where the caller
    /// has `asked` for one.
    ///
    /// # Errors
    /// [`LoadError`], for what the files say and this program does not compute, too.
    pub fn embed_defaults(&self, asked: Option<Pooling>) -> Result<EmbedDefaults, LoadError> {
        self.source.embed_defaults(asked)
    }

    /// All tensors of the files, for display.
    pub fn tensors(&self) -> Vec<TensorInfo> {
        self.source.tensors()
    }

    /// All metadata of the files, printable, long values cut.
    pub fn metadata(&self) -> Vec<(String, String)> {
        self.source.metadata()
    }

    /// Reads everything: that all packed projections hold nothing but -1, 0 and 1, and that all other weights are
    /// finite. Projections of floats or blocks count as ternary where each tensor, row or group of them has the values -s,
    /// 0 and s only.
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
            for norm in Norm::of_layer(layer, &self.config) {
                report.dense_values += self.norm(norm)?.len() as u64;
                report.tensors += 1;
            }
            for which in FloatPart::of_layer(layer, &self.config) {
                report.dense_values += self.check_dense(&self.float_part(layer, which)?)?;
                report.tensors += 1;
            }
            for which in Projection::of_layer(layer, &self.config) {
                match self.weights(layer, which)? {
                    Weights::Ternary(tensor) => {
                        self.check_codes(&tensor)?;
                        report.count_ternary(&tensor.codes, WeightScale::Tensor, tensor.n, tensor.k);
                    }
                    Weights::Dense(tensor) => {
                        let DenseTensor { format, ref data, n, k, .. } = tensor;
                        match ternary::scaled_from_dense(format, data, n, k) {
                            Ok((codes, scales)) => {
                                report.count_ternary(&codes, scales.shared_by(n, k), n, k);
                            }
                            Err(_) => report.dense_values += self.check_dense(&tensor)?,
                        }
                    }
                }
                report.tensors += 1;
                if which.has_bias(&self.config) {
                    report.dense_values += self.bias(layer, which)?.len() as u64;
                    report.tensors += 1;
                }
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
        self.check_codes(&tensor)?;
        Ok(tensor)
    }

    fn check_codes(&self, tensor: &TernaryTensor) -> Result<(), LoadError> {
        check_canonical(&tensor.codes, tensor.n, tensor.k).map_err(|error| LoadError::NotTernary {
            path: self.path.clone(),
            tensor: tensor.name.clone(),
            stored_as: tensor.stored_as,
            problem: error.to_string(),
        })
    }

    fn check_layer(&self, layer: usize) -> Result<(), LoadError> {
        let n_layers = self.config.n_layers;
        if layer < n_layers {
            return Ok(());
        }
        Err(LoadError::NoSuchLayer { path: self.path.clone(), layer, n_layers })
    }

    /// All values of a tensor, all finite.
    pub(crate) fn floats(&self, tensor: &DenseTensor) -> Result<Vec<f32>, LoadError> {
        floats(&self.path, tensor)
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
    let io = |error| FileError::Io { path: path.to_owned(), action: "list", error };
    let no_model = |problem| LoadError::from(FileError::NoModel { path: path.to_owned(), problem });
    let has = |name| path.join(name).exists();
    let config = has("config.json");
    if config && (has(safetensors::SINGLE) || has(safetensors::INDEX)) {
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
        [] if has(adapter::CONFIG) => {
            let problem =
                "this is an adapter, which belongs to a model: name that one, and the adapter with --adapter";
            Err(no_model(problem.into()))
        }
        [] => Err(no_model("the directory has neither a config.json nor a GGUF file".into())),
        several => match bitnet_burn_formats::gguf::first_part(several) {
            Some(first) => Ok(Some(first.clone())),
            None => {
                let names = several.iter().filter_map(|f| f.file_name()).map(|n| n.to_string_lossy());
                let names = names.collect::<Vec<_>>().join(", ");
                Err(no_model(format!("the directory has several GGUF files ({names}): name one of them")))
            }
        },
    }
}
