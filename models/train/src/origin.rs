//! A model that training begins with: what the engine reads of a checkpoint, as latent weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bitnet_burn::backends::ops::{MatrixScale, TernaryMatrix};
use bitnet_burn::formats::{DenseTensor, Scales, ternary};
use bitnet_burn::{
    ActivationRule, BitLinear, BitLinearWeight, BitNet, FloatPart, ModelConfig, Norm, Projection,
    Quantisation, WeightScale, names,
};
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions, TokenizerSource, Weights};
use bitnet_burn_engine::load::{LoadOptions, load};
use bitnet_burn_engine::receipt::ModelRecord;
use bitnet_burn_engine::tokenizer::translate;
use burn::tensor::Device;

use crate::config::{ModelOptions, Task};
use crate::export::{TOKENIZER_FILES, newest_checkpoint};
use crate::sft::Chat;
use crate::store::{self, Parameters};
use crate::{TrainConfig, TrainError, Vocabulary};

/// Tokens of a sequence, where nothing is stated and the model sees more.
const SEQUENCE: usize = 512;

/// A checkpoint to begin with.
pub(crate) struct Origin {
    checkpoint: Checkpoint,
    /// The float masters of a training run that are not in the model's own file.
    masters: Option<Parameters>,
    parts: BTreeMap<String, Part>,
    device: Device,
}

/// What a parameter is.
#[derive(Clone, Copy)]
enum Part {
    Embedding,
    Head,
    Projection(usize, Projection),
    Norm(Norm),
    Float(usize, FloatPart),
}

/// A tokenizer's files by name, `tokenizer.json` first.
pub(crate) type TokenizerFiles = Vec<(String, Vec<u8>)>;

fn wrong(path: &Path, problem: impl ToString) -> TrainError {
    TrainError::Model { path: path.to_owned(), problem: problem.to_string() }
}

/// The files of a tokenizer in a directory, `tokenizer.json` first if it is there.
pub(crate) fn files_in(dir: &Path) -> Result<TokenizerFiles, TrainError> {
    let mut files = Vec::new();
    for name in TOKENIZER_FILES {
        let file = dir.join(name);
        match std::fs::read(&file) {
            Ok(bytes) => files.push((name.to_owned(), bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(TrainError::io(&file, "read")(error)),
        }
    }
    Ok(files)
}

/// Opens a model, or the newest checkpoint of a training run.
pub(crate) fn open(path: &Path) -> Result<Checkpoint, TrainError> {
    let found = newest_checkpoint(path).map_err(|error| wrong(path, error))?;
    Ok(Checkpoint::open(&found, &OpenOptions::default())?)
}

/// The files of a model's tokenizer.
pub(crate) fn tokenizer_files(checkpoint: &Checkpoint) -> Result<TokenizerFiles, TrainError> {
    let path = checkpoint.path();
    let source = checkpoint.tokenizer_source();
    if !translate::is_there(&source) {
        return Err(wrong(path, "it has no tokenizer; training needs the one that it was made with"));
    }
    match source {
        TokenizerSource::Gguf(keys) => {
            let files = translate::to_hf(&keys, checkpoint.config()).map_err(|error| wrong(path, error))?;
            let config = format!("{:#}\n", files.config).into_bytes();
            Ok(vec![
                ("tokenizer.json".into(), files.tokenizer.into_bytes()),
                ("tokenizer_config.json".into(), config),
            ])
        }
        TokenizerSource::Hf { dir } => {
            let files = files_in(&dir)?;
            match files.first() {
                Some((name, _)) if name == "tokenizer.json" => Ok(files),
                _ => Err(wrong(path, "its tokenizer is a tokenizer.model; training reads tokenizer.json")),
            }
        }
    }
}

/// The vocabulary of a model, with its tokenizer's files; for a run that learns conversations, with their template.
pub(crate) fn vocabulary(
    files: &TokenizerFiles,
    task: Task,
    config: &ModelConfig,
    path: &Path,
) -> Result<Vocabulary, TrainError> {
    let json = files.first().map(|(_, bytes)| bytes.clone()).unwrap_or_default();
    let chat = (task == Task::Sft).then(|| Chat::of(files, config.vocab_size)).transpose()?;
    let end = config.eos_tokens.first().copied();
    let begin = config.bos_token.or(end).ok_or_else(|| {
        wrong(path, "it names no token that begins or ends a text, so that documents can't be told apart")
    })?;
    Ok(Vocabulary { json, size: config.vocab_size, begin, end: end.filter(|&end| end != begin), chat })
}

impl Origin {
    /// Opens the model that a configuration names, if it names one.
    pub fn of(config: &TrainConfig, device: &Device) -> Result<Option<Self>, TrainError> {
        let path = &config.model.from;
        if path.as_os_str().is_empty() {
            return Ok(None);
        }
        Self::new(open(path)?, config.lora.is_used(), device).map(Some)
    }

    fn new(checkpoint: Checkpoint, frozen: bool, device: &Device) -> Result<Self, TrainError> {
        let (path, config) = (checkpoint.path(), checkpoint.config());
        if checkpoint.is_rotated() && !frozen {
            return Err(wrong(
                path,
                "its weights are rotated by a Hadamard transform, which training has not",
            ));
        }
        let biased = Projection::every().find(|which| which.has_bias(config));
        if let Some(which) = biased.filter(|_| !frozen) {
            let problem = format!("its {} projections have biases, which training has not", which.name());
            return Err(wrong(path, problem));
        }
        let parts = parts(config);
        let masters = store::extra_masters(path)?;
        let device = device.clone().without_autodiff();
        Ok(Self { parts, masters, device, checkpoint })
    }

    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// Its files with their hashes, as JSON.
    pub fn record(&self) -> Result<Vec<u8>, TrainError> {
        let record = ModelRecord::of(&self.checkpoint).map_err(TrainError::io(self.path(), "read"))?;
        Ok(format!("{:#}\n", serde_json::json!(record)).into_bytes())
    }

    /// The model as it computes, on the device without gradients.
    pub fn frozen(&self, activations: ActivationRule) -> Result<BitNet, TrainError> {
        let options = LoadOptions { activations, prepacked: false, ..LoadOptions::default() };
        load(&self.checkpoint, &self.device, &options, &mut |_| {}).map_err(|error| wrong(self.path(), error))
    }

    /// Bytes of its tensors, as the files hold them.
    pub fn bytes(&self) -> u64 {
        self.checkpoint.tensors().iter().map(|tensor| tensor.bytes).sum()
    }

    /// Its tokenizer's files.
    pub fn tokenizer_files(&self) -> Result<TokenizerFiles, TrainError> {
        tokenizer_files(&self.checkpoint)
    }

    /// Takes its sizes over into the configuration of a run, and returns what the trained model is.
    pub fn adopt(&self, config: &mut TrainConfig) -> Result<ModelConfig, TrainError> {
        let (found, default) = (self.checkpoint.config(), ModelOptions::default());
        let m = &mut config.model;
        let quantisation = if config.lora.is_used() { None } else { self.quantisation()? };
        if let Some(Quantisation { scale, activations }) = quantisation.filter(|_| m.ternary) {
            if m.scales != default.scales && m.scales != scale {
                let problem = format!(
                    "its weights share a scale by {scale}; it can't be trained further with {}",
                    m.scales
                );
                return Err(wrong(self.path(), problem));
            }
            m.scales = scale;
            if m.activations == default.activations {
                m.activations = activations;
            }
        }
        if m.name == default.name {
            m.name = found.name.clone().unwrap_or(default.name);
        }
        m.hidden_size = found.hidden_size;
        m.intermediate_size = found.intermediate_size;
        m.n_layers = found.n_layers;
        m.n_heads = found.n_heads;
        m.n_kv_heads = found.n_kv_heads;
        m.head_dim = found.head_dim;
        m.context_length = found.context_length;
        m.rope_theta = found.rope_theta;
        m.rms_norm_eps = found.rms_norm_eps;
        m.activation = found.activation;
        m.tied_embeddings = found.tied_embeddings;
        m.sub_norms = found.sub_norms || config.distill.sub_norms;
        if config.run.sequence_length == 0 {
            config.run.sequence_length = found.context_length.min(SEQUENCE);
        }
        let (name, sub_norms) = (Some(m.name.clone()), m.sub_norms);
        let student = ModelConfig { name, sub_norms, ..found.clone() };
        student.validate().map_err(|error| wrong(self.path(), error))?;
        if let Some(quantisation) = m.quantisation() {
            quantisation.check_model(&student).map_err(|error| wrong(self.path(), error))?;
        }
        Ok(student)
    }

    /// How its projections are quantised; `None` for one that is not ternary.
    fn quantisation(&self) -> Result<Option<Quantisation>, TrainError> {
        let config = self.checkpoint.config();
        let activations = self.checkpoint.activations(ActivationRule::Model);
        let mut kind = None;
        for layer in 0..config.n_layers {
            for which in Projection::of_layer(layer, config) {
                let scale = match self.checkpoint.weights(layer, which)? {
                    Weights::Ternary(_) => WeightScale::Tensor,
                    Weights::Dense(tensor) => match scaled(&tensor) {
                        None => return Ok(None),
                        Some((_, scales)) if scales.group() == 0 => WeightScale::Row,
                        Some((_, scales)) => WeightScale::Group(scales.group()),
                    },
                };
                if *kind.get_or_insert(scale) != scale {
                    let name = names::projection_name(layer, which);
                    let problem = format!("`{name}` shares a scale by {scale}, and others do not");
                    return Err(wrong(self.path(), problem));
                }
            }
        }
        Ok(kind.map(|scale| Quantisation { scale, activations }))
    }

    /// Whether it has a parameter of this name.
    pub fn has(&self, name: &str) -> bool {
        self.parts.contains_key(name)
    }

    /// The values of a parameter by its name and shape, as [`BitNet::trainable`](bitnet_burn::BitNet::trainable) asks for
    /// them.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, TrainError> {
        if let Some(masters) = &self.masters {
            return masters.get(name, shape);
        }
        let Some(part) = self.parts.get(name) else {
            return Err(wrong(self.path(), format!("it has no `{name}`")));
        };
        let config = self.checkpoint.config();
        let values = match *part {
            Part::Embedding => self.floats(&self.checkpoint.embedding()?)?,
            Part::Head => match self.checkpoint.output()? {
                Some(head) => self.floats(&head)?,
                None => self.floats(&self.checkpoint.embedding()?)?,
            },
            Part::Norm(norm) => self.checkpoint.norm(norm)?,
            Part::Float(layer, which) => {
                which.to_checkpoint(&self.floats(&self.checkpoint.float_part(layer, which)?)?, config)
            }
            Part::Projection(layer, which) => self.latent(layer, which)?,
        };
        let (found, expected) = (values.len(), shape.iter().product::<usize>());
        if found != expected {
            return Err(wrong(
                self.path(),
                format!("`{name}` has {found} values, and {shape:?} were expected"),
            ));
        }
        Ok(values)
    }

    /// Masters as they are; of packed weights, latent weights with the same codes and scales.
    fn latent(&self, layer: usize, which: Projection) -> Result<Vec<f32>, TrainError> {
        if let Some(master) = self.checkpoint.master(layer, which)? {
            return Ok(master);
        }
        let name = names::projection_name(layer, which);
        let failed = |error: String| wrong(self.path(), format!("`{name}`: {error}"));
        let (codes, scale, (n, k)) = match self.checkpoint.weights(layer, which)? {
            Weights::Ternary(tensor) => {
                let shape = (tensor.n, tensor.k);
                bitnet_burn::formats::check_canonical(&tensor.codes, tensor.n, tensor.k)
                    .map_err(|error| failed(error.to_string()))?;
                (tensor.codes, MatrixScale::One(tensor.scale), shape)
            }
            Weights::Dense(tensor) => match scaled(&tensor) {
                None => return self.floats(&tensor),
                Some((codes, scales)) => {
                    let activations = scales.group();
                    (codes.into(), MatrixScale::Groups { scales, activations }, (tensor.n, tensor.k))
                }
            },
        };
        let packed = BitLinear::from_matrix(TernaryMatrix::canonical(codes, scale, n, k, &self.device));
        match packed.unpack().map_err(|error| failed(error.to_string()))?.weight {
            BitLinearWeight::Latent(weight) => Ok(weight.val().into_data().iter::<f32>().collect()),
            _ => Err(failed("it can't be unpacked".into())),
        }
    }

    fn floats(&self, tensor: &DenseTensor) -> Result<Vec<f32>, TrainError> {
        let mut values = vec![0.0; tensor.n * tensor.k];
        for (row, values) in values.chunks_exact_mut(tensor.k).enumerate() {
            let decoded = tensor.format.decode_row(tensor.row(row).unwrap_or_default(), values);
            decoded.map_err(|error| wrong(self.path(), format!("`{}`: {error}", tensor.name)))?;
        }
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => Err(wrong(self.path(), format!("`{}` holds {value}", tensor.name))),
            None => Ok(values),
        }
    }
}

/// The codes and the scales of a tensor that is ternary by row or group.
fn scaled(tensor: &DenseTensor) -> Option<(Vec<u8>, Scales)> {
    ternary::scaled_from_dense(tensor.format, &tensor.data, tensor.n, tensor.k).ok()
}

/// The parameters of a model by their names.
fn parts(config: &ModelConfig) -> BTreeMap<String, Part> {
    let mut parts = BTreeMap::from([
        (names::EMBEDDING.to_owned(), Part::Embedding),
        (names::norm_name(Norm::Output), Part::Norm(Norm::Output)),
    ]);
    if !config.tied_embeddings {
        parts.insert(names::HEAD.to_owned(), Part::Head);
    }
    for layer in 0..config.n_layers {
        let norms = Norm::of_layer(layer, config);
        parts.extend(norms.map(|norm| (names::norm_name(norm), Part::Norm(norm))));
        let projections = Projection::of_layer(layer, config).into_iter();
        parts.extend(
            projections.map(|which| (names::projection_name(layer, which), Part::Projection(layer, which))),
        );
        let floats = FloatPart::of_layer(layer, config).into_iter();
        parts.extend(floats.map(|which| (names::float_part_name(layer, which), Part::Float(layer, which))));
    }
    parts
}

/// A path that means the same in every directory.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, TrainError> {
    std::path::absolute(path).map_err(TrainError::io(path, "find"))
}
