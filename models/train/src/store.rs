//! The directory of a run: its configuration and its checkpoints.
//!
//! A checkpoint is written under a name that begins with a dot, flushed to the disk and renamed, so that
//! `step-*` directories are complete whenever the process or the machine stops.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bitnet_burn_formats::files::{self, UnfinishedDirectory};
use burn::optim::{ModuleOptimizer, OptimizerRecord};
use burn::tensor::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::calibrate::LayerFit;
use crate::config::Task;
use crate::export::TOKENIZER_FILES;
use crate::origin::{Origin, TokenizerFiles};
use crate::{Dataset, TrainConfig, TrainError, lora};
use bitnet_burn::{BitNet, ModelConfig, Quantisation};
use bitnet_burn_engine::receipt::{FileRecord, ModelRecord};
use bitnet_burn_engine::{adapter, hf};

const CONFIG: &str = "config.toml";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";
const VALIDATION: &str = "validation.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const OPTIMIZER: &str = "optimizer.bpk";
const STATE: &str = "training.json";
const MODEL: &str = "model.safetensors";
const MASTERS: &str = "masters.safetensors";
/// The files of a model that adapters are trained for, with their hashes.
pub(super) const BASE: &str = "base.json";
const MODEL_CONFIG: &str = "model.json";
const FITS: &str = "layers.csv";
/// As `sha256sum` writes and checks it.
const CHECKSUMS: &str = "SHA256SUMS";

/// Whether a run has begun in a directory.
pub fn is_run(dir: &Path) -> bool {
    dir.join(CONFIG).exists()
}

/// The configuration of the run in a directory.
///
/// # Errors
/// If there is no run, or its configuration can't be read.
pub fn config_of(dir: &Path) -> Result<TrainConfig, TrainError> {
    if !is_run(dir) {
        let problem = format!("there is no training run in it (no {CONFIG})");
        return Err(TrainError::Directory { path: dir.to_owned(), problem });
    }
    TrainConfig::read(&dir.join(CONFIG))
}

/// Writes what a run begins with: for a run from a model also what that is, and its tokenizer's files. The configuration comes
/// last: without it there is no run.
pub(super) fn begin(
    dir: &Path,
    config: &TrainConfig,
    data: &Dataset,
    origin: Option<&(ModelConfig, TokenizerFiles)>,
) -> Result<(), TrainError> {
    let checkpoints = dir.join(CHECKPOINTS);
    std::fs::create_dir_all(&checkpoints).map_err(TrainError::io(&checkpoints, "make the directory"))?;
    let line = |text: &String| match (config.data.task, serde_json::from_str::<serde_json::Value>(text)) {
        (Task::Sft, Ok(messages)) => json!({ "messages": messages }).to_string() + "\n",
        _ => json!({ "text": text }).to_string() + "\n",
    };
    let lines: String = data.validation_texts.iter().map(line).collect();
    write_file(&dir.join(VALIDATION), lines.as_bytes())?;
    write_file(&dir.join(TOKENIZER), &data.tokenizer_json)?;
    if let Some((model, files)) = origin {
        for (name, bytes) in files {
            write_file(&dir.join(name), bytes)?;
        }
        write_file(&dir.join(MODEL_CONFIG), format!("{:#}\n", json!(model)).as_bytes())?;
    }
    write_file(&dir.join(CONFIG), config.to_toml().as_bytes())
}

/// Whether a model is still the one that adapters were begun for.
pub(super) fn check_base(dir: &Path, origin: &Origin) -> Result<(), TrainError> {
    let path = dir.join(BASE);
    let stated = std::fs::read(&path).map_err(TrainError::io(&path, "read"))?;
    let files = |json: &[u8]| -> Result<Vec<FileRecord>, TrainError> {
        let record = serde_json::from_slice::<ModelRecord>(json);
        let wrong = |error: serde_json::Error| TrainError::Checkpoint {
            path: path.clone(),
            problem: error.to_string(),
        };
        Ok(record.map_err(wrong)?.files)
    };
    if files(&stated)? == files(&origin.record()?)? {
        return Ok(());
    }
    let problem =
        format!("it has changed since the run began: its files are not those in {}", path.display());
    Err(TrainError::Model { path: origin.path().to_owned(), problem })
}

/// What the model of a run is that did not begin from nothing.
pub(super) fn model_config(dir: &Path) -> Result<Option<ModelConfig>, TrainError> {
    let path = dir.join(MODEL_CONFIG);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TrainError::io(&path, "read")(error)),
    };
    let wrong = |problem: String| TrainError::Model { path: path.clone(), problem };
    let config: ModelConfig = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
    config.validate().map_err(|error| wrong(error.to_string()))?;
    Ok(Some(config))
}

/// Writes what ternary weights lose before training.
pub(super) fn write_fits(dir: &Path, fits: &[LayerFit]) -> Result<(), TrainError> {
    let path = dir.join(FITS);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let written = fits.iter().try_for_each(|fit| writer.serialize(fit));
    let failed = |error: String| TrainError::io(&path, "write")(std::io::Error::other(error));
    written.map_err(|error| failed(error.to_string()))?;
    write_file(&path, &writer.into_inner().map_err(|error| failed(error.to_string()))?)
}

/// Removes checkpoints that were never finished.
pub(super) fn clean(dir: &Path) {
    files::remove_leftovers(&dir.join(CHECKPOINTS));
}

fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>, TrainError> {
    let list = match std::fs::read_dir(dir) {
        Ok(list) => list,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(TrainError::io(dir, "list")(error)),
    };
    list.map(|entry| {
        let entry = entry.map_err(TrainError::io(dir, "list"))?;
        Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
    })
    .collect()
}

/// Whether a directory is one that checkpoints are kept in: that of a run, or what is left of one.
pub(crate) fn has_checkpoints(dir: &Path) -> bool {
    dir.join(CHECKPOINTS).is_dir()
}

/// The checkpoints of a run, as (steps done, directory), the oldest first.
///
/// # Errors
/// If the directory can't be listed.
pub fn checkpoints(dir: &Path) -> Result<Vec<(u64, PathBuf)>, TrainError> {
    let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
    let entries = entries(&dir.join(CHECKPOINTS))?;
    let mut all: Vec<(u64, PathBuf)> =
        entries.into_iter().filter_map(|(name, path)| Some((step(&name)?, path))).collect();
    all.sort();
    Ok(all)
}

/// The newest checkpoint of a run, if it has one.
///
/// # Errors
/// If the directory can't be listed.
pub fn newest(dir: &Path) -> Result<Option<PathBuf>, TrainError> {
    Ok(checkpoints(dir)?.pop().map(|(_, path)| path))
}

/// What a checkpoint says of its run.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    /// Steps done.
    pub step: u64,
    /// SHA-256 of the text.
    text_sha256: String,
    config: TrainConfig,
}

const VERSION: u32 = 1;

impl State {
    pub fn read(checkpoint: &Path) -> Result<Self, TrainError> {
        check_sums(checkpoint)?;
        let path = checkpoint.join(STATE);
        let bytes = std::fs::read(&path).map_err(TrainError::io(&path, "read"))?;
        let wrong = |problem: String| TrainError::Checkpoint { path: path.clone(), problem };
        let state: Self = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        if state.version != VERSION {
            return Err(wrong(format!(
                "version {} of training checkpoints; this program continues version {VERSION}",
                state.version
            )));
        }
        Ok(state)
    }

    /// Whether this is a checkpoint of that run, with that text.
    pub fn check(&self, checkpoint: &Path, config: &TrainConfig, data: &Dataset) -> Result<(), TrainError> {
        let wrong = |problem: &str| {
            Err(TrainError::Checkpoint { path: checkpoint.to_owned(), problem: problem.to_owned() })
        };
        if self.config != *config {
            return wrong("it was written with another configuration than the run's config.toml");
        }
        if self.text_sha256 != data.sha256 {
            return wrong(
                "the text is another than that which the run began with; resume with the same files",
            );
        }
        let path = checkpoint.join(TOKENIZER);
        let tokenizer = std::fs::read(&path).map_err(TrainError::io(&path, "read"))?;
        if tokenizer != data.tokenizer_json {
            return wrong("its vocabulary is not that of the run's tokenizer.json, which has changed");
        }
        Ok(())
    }
}

/// The float masters of a checkpoint by name.
pub(super) struct Parameters {
    path: PathBuf,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

/// The file with the float masters. Hugging Face's format knows how to make BitNet's ternary; for other scales and activations
/// the model's file holds the ternary values themselves.
fn masters_file(config: &TrainConfig) -> &'static str {
    if config.model.quantisation().is_none_or(Quantisation::is_bitnet) { MODEL } else { MASTERS }
}

/// Reads the float masters of a checkpoint.
pub(super) fn parameters(checkpoint: &Path, config: &TrainConfig) -> Result<Parameters, TrainError> {
    read_masters(checkpoint.join(masters_file(config)))
}

/// The float masters that a checkpoint has in a file of their own.
pub(super) fn extra_masters(checkpoint: &Path) -> Result<Option<Parameters>, TrainError> {
    let path = checkpoint.join(MASTERS);
    if path.exists() { read_masters(path).map(Some) } else { Ok(None) }
}

fn read_masters(path: PathBuf) -> Result<Parameters, TrainError> {
    let bytes = std::fs::read(&path).map_err(TrainError::io(&path, "read"))?;
    let wrong = |problem: String| TrainError::Checkpoint { path: path.clone(), problem };
    let file = SafeTensors::deserialize(&bytes).map_err(|error| wrong(error.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(wrong(format!("tensor `{name}` is {:?}; masters are F32", view.dtype())));
        }
        let values = view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        tensors.insert(name, (view.shape().to_vec(), values));
    }
    Ok(Parameters { path, tensors })
}

impl Parameters {
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, TrainError> {
        let wrong = |problem: String| TrainError::Checkpoint { path: self.path.clone(), problem };
        match self.tensors.get(name) {
            Some((found, values)) if found == shape => Ok(values.clone()),
            Some((found, _)) => Err(wrong(format!(
                "tensor `{name}` is {found:?}; the run's model and vocabulary ask for {shape:?}"
            ))),
            None => Err(wrong(format!("tensor `{name}` is missing"))),
        }
    }
}

/// Reads the optimiser's state of a checkpoint.
pub(super) fn optimizer(checkpoint: &Path) -> Result<OptimizerRecord, TrainError> {
    let path = checkpoint.join(OPTIMIZER);
    let bytes = std::fs::read(&path).map_err(TrainError::io(&path, "read"))?;
    OptimizerRecord::from_bytes(Bytes::from_bytes_vec(bytes))
        .map_err(|error| TrainError::Checkpoint { path, problem: error.to_string() })
}

/// Writes a checkpoint and drops old ones.
pub(super) fn write(
    dir: &Path,
    config: &TrainConfig,
    data: &Dataset,
    model: &BitNet,
    optimizer: &ModuleOptimizer,
    step: u64,
) -> Result<PathBuf, TrainError> {
    let parent = dir.join(CHECKPOINTS);
    let path = parent.join(format!("step-{step:08}"));
    if path.exists() {
        return Ok(path);
    }
    let temporary =
        UnfinishedDirectory::new(&parent).map_err(TrainError::io(&parent, "make a directory in it"))?;
    let at = temporary.path();
    match config.model.quantisation() {
        _ if config.lora.is_used() => lora::write(at, config, model)?,
        // A float twin is no BitNet: nothing must load it as one.
        None => hf::write_values(at, model.config(), None, model.parameters())?,
        Some(quantisation) if quantisation.is_bitnet() => {
            hf::write_masters(at, model.config(), model.parameters())?;
        }
        Some(quantisation) => {
            let rule = Some(match &quantisation.activation_rules(model.config())[..] {
                [rule] => *rule,
                _ => quantisation.activations,
            });
            hf::write_values(at, model.config(), rule, model.frozen_parameters())?;
            hf::write_tensors(&at.join(MASTERS), model.config(), model.parameters())?;
        }
    }
    hf::write_bytes(&at.join(TOKENIZER), &data.tokenizer_json)?;
    // The other files of the tokenizer are those of the model that the run began with, if it began with one.
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": crate::END_OF_TEXT,
        "eos_token": crate::END_OF_TEXT,
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.model.context_length,
    });
    if !dir.join(MODEL_CONFIG).exists() {
        hf::write_json(&at.join("tokenizer_config.json"), &tokenizer_config)?;
    }
    for name in TOKENIZER_FILES.iter().filter(|&&name| name != TOKENIZER) {
        let file = dir.join(name);
        if file.exists() {
            let bytes = std::fs::read(&file).map_err(TrainError::io(&file, "read"))?;
            hf::write_bytes(&at.join(name), &bytes)?;
        }
    }
    let record = optimizer
        .to_record()
        .into_bytes()
        .map_err(|error| TrainError::Checkpoint { path: at.join(OPTIMIZER), problem: error.to_string() })?;
    hf::write_bytes(&at.join(OPTIMIZER), &record)?;
    let state = State { version: VERSION, step, text_sha256: data.sha256.clone(), config: config.clone() };
    hf::write_json(&at.join(STATE), &json!(state))?;
    hf::write_bytes(&at.join(CHECKSUMS), sums(at)?.as_bytes())?;
    files::sync_directory(at).map_err(TrainError::io(at, "flush to the disk"))?;
    #[cfg(unix)]
    {
        // As any new directory: temporary ones are for their owner alone.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(at, mode).map_err(TrainError::io(at, "set the permissions"))?;
    }
    temporary.rename(&path).map_err(TrainError::io(&path, "rename the finished checkpoint"))?;
    files::sync_directory(&parent).map_err(TrainError::io(&parent, "flush to the disk"))?;
    let mut old = checkpoints(dir)?;
    old.truncate(old.len().saturating_sub(config.run.keep));
    for (_, path) in old {
        // Away from its name first: a directory that is half removed must not look whole.
        let removed = UnfinishedDirectory::new(&parent)
            .and_then(|doomed| std::fs::rename(&path, doomed.path().join("old")).map(|()| doomed));
        drop(removed.map_err(TrainError::io(&path, "remove the old checkpoint"))?);
    }
    Ok(path)
}

/// The checksums of a checkpoint's files but [`CHECKSUMS`], by name.
fn sums(checkpoint: &Path) -> Result<String, TrainError> {
    let mut lines = Vec::new();
    for (name, path) in entries(checkpoint)?.into_iter().filter(|(name, _)| name != CHECKSUMS) {
        let (_, sum) = files::sha256_of_file(&path).map_err(TrainError::io(&path, "read"))?;
        lines.push((name, sum));
    }
    lines.sort();
    Ok(lines.iter().map(|(name, sum)| format!("{sum}  {name}\n")).collect())
}

/// Compares the files of a checkpoint with their checksums.
fn check_sums(checkpoint: &Path) -> Result<(), TrainError> {
    let path = checkpoint.join(CHECKSUMS);
    let stated = std::fs::read_to_string(&path).map_err(TrainError::io(&path, "read"))?;
    let found = sums(checkpoint)?;
    let name = |line: &str| line.split_once("  ").map_or(line, |(_, name)| name).to_owned();
    let differs = stated.lines().find(|line| !found.lines().any(|found| found == *line)).map(name);
    let unstated = || {
        let stated: Vec<_> = stated.lines().map(name).collect();
        let weights =
            if stated.iter().any(|name| name == adapter::CONFIG) { adapter::WEIGHTS } else { MODEL };
        [STATE, OPTIMIZER, weights].map(str::to_owned).into_iter().find(|name| !stated.contains(name))
    };
    let Some(name) = differs.or_else(unstated) else { return Ok(()) };
    let problem = format!(
        "it is damaged or missing: its checksum is not that in {CHECKSUMS}; resume from an older one"
    );
    Err(TrainError::Checkpoint { path: checkpoint.join(name), problem })
}

/// Writes a file as a whole or not at all.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    files::replace(path, |out| out.write_all(bytes)).map_err(TrainError::io(path, "write"))
}
