//! LoRA adapters in PEFT's format: a directory with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An adapter is made for one model: its matrices belong to projections, by their names in the model's Hugging Face
//! checkpoint, and its rows are in that checkpoint's order. That is the order of this engine, too, whatever file the model is
//! read from.
//!
//! A key of the configuration that would change the result and that is not implemented is an error, and so is a tensor that
//! belongs to no projection: an adapter is computed as a whole or not at all.
//!
//! ```no_run
//! use bitnet_burn_engine::Engine;
//!
//! let engine = Engine::options().adapter("adapter").open("model.gguf")?;
//! # Ok::<(), bitnet_burn_engine::EngineError>(())
//! ```

mod config;
mod write;

use std::io;
use std::path::{Path, PathBuf};

use bitnet_burn::{AdapterValues, ModelConfig, Projection, names};
use bitnet_burn_formats::safetensors::{self, SafeTensor};
use bitnet_burn_formats::{FileError, WriteError, files};

use crate::checkpoint::{Content, LoadError};
use config::Config;
pub use write::{AdapterOptions, write};

/// The configuration's file.
pub const CONFIG: &str = "adapter_config.json";
/// The matrices' file.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT writes before the name of a module of a causal language model.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// Why an adapter can't be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file can't be read, or is not of its kind.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file can't be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A directory that holds no adapter.
    #[error("{}: {problem}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is missing.
        problem: String,
    },
    /// A key of the configuration.
    #[error("{}: `{key}` is {value}: {problem}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value, as JSON; `missing` without one.
        value: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A tensor.
    #[error("{}: tensor `{tensor}` {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A model into which it is to be merged.
    #[error(transparent)]
    Model(#[from] LoadError),
    /// Modules or models that can't be adapted.
    #[error("{0}")]
    Targets(String),
}

/// The matrices of an adapter for a projection.
#[derive(Clone, Debug, PartialEq)]
pub struct AdaptedProjection {
    /// The layer.
    pub layer: usize,
    /// The projection.
    pub which: Projection,
    /// Its A and B, and their factor.
    pub values: AdapterValues,
}

/// An adapter that was read.
#[derive(Clone, Debug)]
pub struct Adapter {
    path: PathBuf,
    projections: Vec<AdaptedProjection>,
    contents: Vec<Content>,
    sha256: String,
}

impl Adapter {
    /// Reads an adapter for a model: the directory that PEFT's `save_pretrained` wrote, or a checkpoint of `bitnet train --lora`.
    ///
    /// # Errors
    /// [`AdapterError`], for what the files ask for and this program does not compute, too.
    pub fn open(path: &Path, model: &ModelConfig) -> Result<Self, AdapterError> {
        let (config_path, weights_path) = (path.join(CONFIG), path.join(WEIGHTS));
        for (file, instead) in [
            (&config_path, String::new()),
            (&weights_path, format!("; a file `adapter_model.bin` is not read: let PEFT write {WEIGHTS}")),
        ] {
            if !file.exists() {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                let problem = format!(
                    "there is no {name}; an adapter is a directory with {CONFIG} and {WEIGHTS}{instead}"
                );
                return Err(AdapterError::Directory { path: path.to_owned(), problem });
            }
        }
        check_model(model)?;
        let identity = files::identity_of(&config_path)?;
        let config = Config::read(&config_path)?;
        let read = |error: io::Error| FileError::Io { path: weights_path.clone(), action: "read", error };
        let (_, sha256) = files::sha256_of_file(&weights_path).map_err(read)?;
        let mut shards = safetensors::open_file(&weights_path)?;
        let wrong = |tensor: &str, problem: String| AdapterError::Tensor {
            path: weights_path.clone(),
            tensor: tensor.to_owned(),
            problem,
        };
        let mut projections = Vec::new();
        for (layer, which) in targets(model) {
            let module = names::projection_module(layer, which);
            let stem = format!("{PREFIX}{module}");
            let (name_a, name_b) = (format!("{stem}{A}"), format!("{stem}{B}"));
            let (a, b) = match (shards.tensors.remove(&name_a), shards.tensors.remove(&name_b)) {
                (None, None) => continue,
                (Some(a), Some(b)) => (a, b),
                (Some(_), None) => return Err(wrong(&name_b, "is missing; its lora_A is there".into())),
                (None, Some(_)) => return Err(wrong(&name_a, "is missing; its lora_B is there".into())),
            };
            let (rank, scale) = config.of(&module)?;
            let (n, k) = which.shape(model);
            let values = AdapterValues {
                a: floats(&a, [rank, k]).map_err(|problem| wrong(&name_a, problem))?,
                b: floats(&b, [n, rank]).map_err(|problem| wrong(&name_b, problem))?,
                rank,
                scale,
            };
            projections.push(AdaptedProjection { layer, which, values });
        }
        if let Some(name) = shards.tensors.keys().next() {
            return Err(wrong(name, unknown(name, model)));
        }
        if projections.is_empty() {
            let problem = format!("{WEIGHTS} has no tensor");
            return Err(AdapterError::Directory { path: path.to_owned(), problem });
        }
        let files = std::iter::once((config_path, identity)).chain(shards.files);
        let contents = files.map(|(path, identity)| Content::File(path, identity)).collect();
        Ok(Self { path: path.to_owned(), projections, contents, sha256 })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of the matrices' file, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Its projections, in the order of the layers.
    pub fn projections(&self) -> &[AdaptedProjection] {
        &self.projections
    }

    /// Bytes that its matrices take where they compute.
    pub fn bytes(&self) -> u64 {
        self.projections.iter().map(|of| 4 * (of.values.a.len() + of.values.b.len()) as u64).sum()
    }

    /// The matrices for a projection, if it has some.
    pub fn get(&self, layer: usize, which: Projection) -> Option<&AdapterValues> {
        let found = self.projections.iter().find(|of| (of.layer, of.which) == (layer, which));
        found.map(|of| &of.values)
    }

    /// The files that it was read from.
    pub(crate) fn contents(&self) -> &[Content] {
        &self.contents
    }
}

/// The projections that an adapter can have, in the order of the layers.
pub fn targets(model: &ModelConfig) -> Vec<(usize, Projection)> {
    let of_layer = |layer: usize| {
        let all = Projection::of_layer(layer, model);
        all.into_iter().filter(|which| Projection::ALL.contains(which)).map(move |which| (layer, which))
    };
    (0..model.n_layers).flat_map(of_layer).collect()
}

fn check_model(model: &ModelConfig) -> Result<(), AdapterError> {
    if model.options.projection_norms {
        let problem = "the model has norms inside of its projections, before which an adapter would lie; that is not \
                       implemented";
        return Err(AdapterError::Targets(problem.into()));
    }
    Ok(())
}

/// The projections that a list of names stands for: those of modules (`q_proj`), or `all-linear`.
///
/// # Errors
/// [`AdapterError::Targets`], if a name stands for none.
pub fn targets_named(
    names: &[String],
    model: &ModelConfig,
) -> Result<Vec<(usize, Projection)>, AdapterError> {
    check_model(model)?;
    let all = targets(model);
    let is_named = |name: &str, which: Projection| name == "all-linear" || name == module_name(which);
    for name in names {
        if !all.iter().any(|&(_, which)| is_named(name, which)) {
            let known: Vec<_> = Projection::ALL.iter().map(|&which| module_name(which)).collect();
            return Err(AdapterError::Targets(format!(
                "this model has no projections `{name}` that can be adapted; names are {} and all-linear",
                known.join(", ")
            )));
        }
    }
    let named = |&(_, which): &(usize, Projection)| names.iter().any(|name| is_named(name, which));
    Ok(all.into_iter().filter(named).collect())
}

/// A projection's name in a list of modules: `q_proj`.
pub fn module_name(which: Projection) -> String {
    format!("{}_proj", which.name())
}

/// Why a tensor has no place.
fn unknown(name: &str, model: &ModelConfig) -> String {
    let module = name.strip_prefix(PREFIX).unwrap_or(name);
    if name.contains("lora_magnitude_vector") {
        return "belongs to DoRA, which is not implemented; train the adapter with use_dora = false".into();
    }
    if !(name.ends_with(A) || name.ends_with(B)) {
        return format!(
            "is no lora_A.weight and no lora_B.weight; modules_to_save, biases and adapters of embeddings are not \
             implemented (in module `{module}`)"
        );
    }
    let all: Vec<_> = Projection::ALL.iter().map(|&which| module_name(which)).collect();
    format!(
        "belongs to no projection of this model, which has {} layers of {}; names begin with {PREFIX}model.layers.N",
        model.n_layers,
        all.join(", ")
    )
}

/// The values of a tensor of a shape.
fn floats(tensor: &SafeTensor, expected: [usize; 2]) -> Result<Vec<f32>, String> {
    if tensor.shape != expected {
        return Err(format!(
            "is {:?}; the model and `r` (or rank_pattern) ask for {expected:?}",
            tensor.shape
        ));
    }
    let Some(format) = safetensors::dense_format(tensor.dtype) else {
        return Err(format!("is {:?}; F32, F16 and BF16 are read", tensor.dtype));
    };
    let mut values = vec![0f32; expected[0] * expected[1]];
    format.decode_row(&tensor.data, &mut values).map_err(|error| error.to_string())?;
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(at) => {
            let [_, columns] = expected;
            Err(format!("holds {} at row {}, column {}", values[at], at / columns, at % columns))
        }
    }
}
