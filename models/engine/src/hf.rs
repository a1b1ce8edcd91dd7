//! Writing Hugging Face directories: `config.json`, `generation_config.json`, `model.safetensors`.
//!
//! The files go into a directory that exists. Whoever wants a directory that is complete or not there at
//! all writes into one with a temporary name and renames it.

mod config;

use crate::checkpoint::{Checkpoint, LoadError, Weights};
use bitnet_burn::names::{
    EMBEDDING, HEAD, bias_name, float_part_name, norm_name, projection_name, scale_name,
};
use bitnet_burn::{ActivationRule, ConfigError, FloatPart, ModelConfig, Norm, Parameter, Projection};
use bitnet_burn_formats::hf::pack_from_canonical;
use bitnet_burn_formats::safetensors::{Dtype, SINGLE, SafetensorsWriter};
use bitnet_burn_formats::{DenseFormat, DenseTensor, WriteError};
use config::{config_json, end_tokens};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

pub use crate::checkpoint::Style;

/// Why a file of a Hugging Face directory was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HfWriteError {
    /// The file itself can't be written.
    #[error(transparent)]
    File(#[from] WriteError),
    /// A configuration that no model can have.
    #[error("the configuration is impossible: {0}")]
    Config(#[from] ConfigError),
    /// A tensor that is missing, has the wrong shape, or holds what no model can have.
    #[error("tensor `{tensor}` {problem}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// What no `config.json` says.
    #[error("a Hugging Face directory cannot hold this model: {problem}; a GGUF file can")]
    Inexpressible {
        /// What it has.
        problem: String,
    },
}

fn io_error(path: &Path, action: &str) -> impl FnOnce(io::Error) -> WriteError {
    move |error| WriteError::Io { path: path.to_owned(), action: action.to_owned(), error }
}

/// Writes the weights and the configuration of a model in training into `dir`, which exists: `config.json`
/// and `generation_config.json` for transformers' `BitNetForCausalLM` (`LlamaForCausalLM` for a model without
/// sub-norms), and the float masters in `model.safetensors`. Files are flushed to the disk; files of these
/// names are replaced.
///
/// # Arguments
/// - `tensors`: name, shape and values of each tensor that the configuration asks for, in any order. The
///   names are those of [`projection_name`], [`float_part_name`], [`norm_name`], [`EMBEDDING`] and, where the output
///   head is not tied, [`HEAD`].
///
/// # Errors
/// [`HfWriteError`]: a tensor is missing, is none of this model's, has another shape, or holds a value that
/// is not finite; or the files can't be written.
///
/// ```
/// use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
/// use bitnet_burn::{Norm, Projection};
/// use bitnet_burn_engine::hf;
/// use bitnet_burn::names::{self, EMBEDDING};
/// use bitnet_burn_engine::synth;
///
/// let config = synth::shape("tiny").expect("a known shape");
/// let matrix = |name: String, n: usize, k: usize| (name, vec![n, k], vec![0.1f32; n * k]);
/// let mut tensors = vec![matrix(EMBEDDING.into(), config.vocab_size, config.hidden_size)];
/// for layer in 0..config.n_layers {
///     tensors.extend(Projection::ALL.map(|which| {
///         let (n, k) = which.shape(&config);
///         matrix(names::projection_name(layer, which), n, k)
///     }));
/// }
/// let layers = (0..config.n_layers).flat_map(|layer| Norm::of_layer(layer, &config));
/// tensors.extend(layers.chain([Norm::Output]).map(|norm| {
///     let n = norm.len(&config);
///     (names::norm_name(norm), vec![n], vec![1.0; n])
/// }));
/// let dir = tempfile::tempdir()?;
/// hf::write_masters(dir.path(), &config, tensors)?;
///
/// let checkpoint = Checkpoint::open(dir.path(), &OpenOptions::default())?;
/// assert_eq!(checkpoint.projection(1, Projection::Down)?.stored_as, "F32 master (absmean)");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write_masters(
    dir: &Path,
    config: &ModelConfig,
    tensors: impl IntoIterator<Item = Parameter>,
) -> Result<(), HfWriteError> {
    write_tensors(&dir.join(SINGLE), config, tensors)?;
    write_config(dir, config, (Style::Online, None), Dtype::F32)
}

/// [`write_masters`] for projections that are computed as they are: ternary ones with a scale for each row or group, which
/// readers know by their values, or those of a float twin. There is no `quantization_config` then; how the activations of a
/// ternary model are quantised is in a key that other programs ignore.
///
/// # Errors
/// As [`write_masters`].
pub fn write_values(
    dir: &Path,
    config: &ModelConfig,
    activations: Option<ActivationRule>,
    tensors: impl IntoIterator<Item = Parameter>,
) -> Result<(), HfWriteError> {
    write_tensors(&dir.join(SINGLE), config, tensors)?;
    write_config(dir, config, (Style::Values, activations), Dtype::F32)
}

/// The safetensors file alone of [`write_masters`].
///
/// # Errors
/// As [`write_masters`].
pub fn write_tensors(
    path: &Path,
    config: &ModelConfig,
    tensors: impl IntoIterator<Item = Parameter>,
) -> Result<(), HfWriteError> {
    let mut missing = tensor_shapes(config);
    let mut writer = SafetensorsWriter::new();
    for (name, shape, values) in tensors {
        let wrong = |problem: String| HfWriteError::Tensor { tensor: name.clone(), problem };
        match missing.remove(&name) {
            Some(expected) if expected == shape => {}
            Some(expected) => {
                return Err(wrong(format!("is {shape:?}; the configuration asks for {expected:?}")));
            }
            None => return Err(wrong("was given twice, or is none of this model's".into())),
        }
        if shape.iter().product::<usize>() != values.len() {
            return Err(wrong(format!("of shape {shape:?} has {} values", values.len())));
        }
        if let Some(place) = values.iter().position(|v| !v.is_finite()) {
            return Err(wrong(format!("holds {} at place {place}", values[place])));
        }
        writer.tensor(name, Dtype::F32, &shape, move |out| write_floats(out, &values))?;
    }
    if let Some(tensor) = missing.into_keys().next() {
        return Err(HfWriteError::Tensor { tensor, problem: "is missing".into() });
    }
    Ok(writer.write(path, &mut |_| Ok(()))?)
}

/// Writes the weights and the configuration of `checkpoint` into `dir`, which exists.
///
/// # Arguments
/// - `config`: the checkpoint's, with the name that the copy is to have
/// - `dense`: the type of embedding, output head and norms: F32, F16 or BF16. In packed styles they share one, because
///   transformers leaves them in the stored type then, and multiplies none of two types; `None` is F32. With
///   [`Style::Values`] it is that of embedding and head, and `None` and all others are the types that hold exactly what
///   they are: floats as they are, blocks of ternary weights as F16, and all others as F32
/// - `progress`: gets the bytes of each write, and those of all
///
/// # Errors
/// [`HfWriteError`], also for [`Style::Online`] where the checkpoint has no masters, where the style can't
/// hold a projection, and for [`Style::Values`] where projections have int8 activations by row.
pub fn write_checkpoint(
    dir: &Path,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    style: Style,
    dense: Option<DenseFormat>,
    progress: &mut dyn FnMut(u64, u64) -> io::Result<()>,
) -> Result<(), HfWriteError> {
    if checkpoint.is_rotated() {
        let problem = "its weights are rotated by a Hadamard transform (`prism.hadamard.*`)".into();
        return Err(HfWriteError::Inexpressible { problem });
    }
    let mut out =
        Directory { writer: SafetensorsWriter::new(), checkpoint, style, dense, dtypes: Vec::new() };
    out.matrix(EMBEDDING.to_owned(), readable(EMBEDDING, checkpoint.embedding())?, dense)?;
    if let Some(output) = readable(HEAD, checkpoint.output())? {
        out.matrix(HEAD.to_owned(), output, dense)?;
    }
    for layer in 0..config.n_layers {
        for which in Norm::of_layer(layer, config) {
            out.vector(norm_name(which), checkpoint.norm(which))?;
        }
        for which in FloatPart::of_layer(layer, config) {
            let name = float_part_name(layer, which);
            let matrix = readable(&name, checkpoint.float_part(layer, which))?;
            out.matrix(name, matrix, dense.filter(|_| style != Style::Values))?;
        }
        for which in Projection::of_layer(layer, config) {
            out.projection(layer, which)?;
            if which.has_bias(config) {
                out.vector(bias_name(layer, which), checkpoint.bias(layer, which))?;
            }
        }
    }
    out.vector(norm_name(Norm::Output), checkpoint.norm(Norm::Output))?;
    let Directory { writer, dtypes, .. } = out;
    // What transformers computes in: one type.
    let dtype = match dtypes[..] {
        [one] => one,
        _ => Dtype::F32,
    };
    write_config(dir, config, (style, checkpoint.declared_activations()), dtype)?;
    let total = writer.data_size();
    Ok(writer.write(&dir.join(SINGLE), &mut |bytes| progress(bytes, total))?)
}

fn readable<T>(tensor: &str, read: Result<T, LoadError>) -> Result<T, HfWriteError> {
    read.map_err(|error| HfWriteError::Tensor {
        tensor: tensor.to_owned(),
        problem: format!("can't be read: {error}"),
    })
}

/// A directory's tensors as they are collected.
struct Directory<'a> {
    writer: SafetensorsWriter<'a>,
    checkpoint: &'a Checkpoint,
    style: Style,
    dense: Option<DenseFormat>,
    /// The types of floats that occur.
    dtypes: Vec<Dtype>,
}

impl Directory<'_> {
    /// The type of a tensor that has none of its own in safetensors files: one that holds it exactly.
    fn format(&self, stored: DenseFormat) -> DenseFormat {
        match self.style {
            Style::Values if stored.dtype().is_some() => stored,
            Style::Values if stored.is_ternary() => DenseFormat::F16,
            _ => DenseFormat::F32,
        }
    }

    fn dtype(&mut self, tensor: &str, format: DenseFormat) -> Result<Dtype, HfWriteError> {
        let dtype = format.dtype().ok_or_else(|| HfWriteError::Tensor {
            tensor: tensor.to_owned(),
            problem: format!("can't be {}: safetensors files hold F32, F16 and BF16", format.name()),
        })?;
        if !self.dtypes.contains(&dtype) {
            self.dtypes.push(dtype);
        }
        Ok(dtype)
    }

    fn matrix(
        &mut self,
        name: String,
        tensor: DenseTensor,
        asked: Option<DenseFormat>,
    ) -> Result<(), HfWriteError> {
        let format = asked.unwrap_or_else(|| self.format(tensor.format));
        let dtype = self.dtype(&name, format)?;
        self.writer.tensor(name, dtype, &[tensor.n, tensor.k], move |out| as_format(&tensor, format, out))?;
        Ok(())
    }

    /// A norm or a bias.
    fn vector(&mut self, name: String, values: Result<Vec<f32>, LoadError>) -> Result<(), HfWriteError> {
        let values = readable(&name, values)?;
        let format = match self.style {
            // Like the matrices, if that is exact.
            Style::Values => {
                let formats = [DenseFormat::BF16, DenseFormat::F16];
                let of =
                    |format: &DenseFormat| format.dtype().is_some_and(|dtype| self.dtypes.contains(&dtype));
                formats
                    .into_iter()
                    .filter(of)
                    .find(|format| format.holds(&values))
                    .unwrap_or(DenseFormat::F32)
            }
            _ => self.dense.unwrap_or(DenseFormat::F32),
        };
        let dtype = self.dtype(&name, format)?;
        self.writer.tensor(name, dtype, &[values.len()], move |out| {
            let mut bytes = vec![0; values.len() * format.block_bytes()];
            format.encode_row(&values, &mut bytes).map_err(io::Error::other)?;
            out.write_all(&bytes)
        })?;
        Ok(())
    }

    fn projection(&mut self, layer: usize, which: Projection) -> Result<(), HfWriteError> {
        let (checkpoint, style) = (self.checkpoint, self.style);
        let (n, k) = which.shape(checkpoint.config());
        let name = projection_name(layer, which);
        if style == Style::Values {
            let Weights::Dense(tensor) = readable(&name, checkpoint.weights(layer, which))? else {
                let problem =
                    "has int8 activations by row, which float values do not state: write the packed style";
                return Err(HfWriteError::Tensor { tensor: name, problem: problem.into() });
            };
            let format = self.format(tensor.format);
            let dtype = self.dtype(&name, format)?;
            self.writer.tensor(name, dtype, &[n, k], move |out| {
                match checkpoint.weights(layer, which).map_err(io::Error::other)? {
                    Weights::Dense(tensor) => as_format(&tensor, format, out),
                    Weights::Ternary(_) => Err(io::Error::other("it is not what it was")),
                }
            })?;
            return Ok(());
        }
        if style == Style::Online {
            self.writer.tensor(name, Dtype::F32, &[n, k], move |out| {
                let master = checkpoint.master(layer, which).map_err(io::Error::other)?;
                let missing = "the checkpoint has ternary weights, not the masters that they were made from";
                write_floats(out, &master.ok_or_else(|| io::Error::other(missing))?)
            })?;
            return Ok(());
        }
        if !n.is_multiple_of(4) {
            let problem =
                format!("has {n} rows; four of them go into a byte, so that N must be a multiple of 4");
            return Err(HfWriteError::Tensor { tensor: name, problem });
        }
        self.writer.tensor(name, Dtype::U8, &[n / 4, k], move |out| {
            let tensor = checkpoint.checked_projection(layer, which).map_err(io::Error::other)?;
            out.write_all(&pack_from_canonical(&tensor.codes, n, k).map_err(io::Error::other)?)
        })?;
        self.writer.tensor(scale_name(layer, which), Dtype::F32, &[1], move |out| {
            let scale = checkpoint.projection(layer, which).map_err(io::Error::other)?.scale;
            let stored = if style == Style::PackedInverse { inverse(scale)? } else { scale };
            write_floats(out, &[stored])
        })?;
        Ok(())
    }
}

/// Writes a tensor as it is, or in another format.
fn as_format(tensor: &DenseTensor, format: DenseFormat, out: &mut dyn Write) -> io::Result<()> {
    if tensor.format == format { out.write_all(&tensor.data) } else { tensor.write_as(format, out) }
}

/// The f32 whose reciprocal is `scale`, or next to it where there is none.
fn inverse(scale: f32) -> io::Result<f32> {
    let stored = 1.0 / scale;
    if !stored.is_normal() {
        let problem = format!("the style `bitlinear` divides by the scale, and 1 / {scale} can't be stored");
        return Err(io::Error::other(problem));
    }
    let near = [stored, stored.next_up(), stored.next_down()];
    Ok(near.into_iter().find(|&near| 1.0 / near == scale).unwrap_or(stored))
}

fn write_floats(out: &mut dyn Write, values: &[f32]) -> io::Result<()> {
    values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()))
}

/// The tensors of a model but the scales of packed projections, with their shapes, rows first.
fn tensor_shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let matrix = vec![config.vocab_size, config.hidden_size];
    let mut shapes = BTreeMap::from([(EMBEDDING.to_owned(), matrix.clone())]);
    if !config.tied_embeddings {
        shapes.insert(HEAD.to_owned(), matrix);
    }
    let norm = |which: Norm| (norm_name(which), vec![which.len(config)]);
    for layer in 0..config.n_layers {
        shapes.extend(Norm::of_layer(layer, config).map(norm));
        shapes.extend(Projection::of_layer(layer, config).into_iter().map(|which| {
            let (n, k) = which.shape(config);
            (projection_name(layer, which), vec![n, k])
        }));
        let floats = FloatPart::of_layer(layer, config).into_iter();
        shapes.extend(floats.map(|which| (float_part_name(layer, which), which.checkpoint_shape(config))));
    }
    shapes.extend([norm(Norm::Output)]);
    shapes
}

/// Writes `config.json` and `generation_config.json`.
fn write_config(
    dir: &Path,
    config: &ModelConfig,
    (style, activations): (Style, Option<ActivationRule>),
    dtype: Dtype,
) -> Result<(), HfWriteError> {
    config.validate()?;
    write_json(&dir.join("config.json"), &config_json(config, (style, activations), dtype)?)?;
    let mut generation = Map::new();
    end_tokens(config, &mut generation);
    write_json(&dir.join("generation_config.json"), &Value::Object(generation))
}

/// Writes a JSON file, indented as transformers does, and flushes it to the disk.
pub fn write_json(path: &Path, json: &Value) -> Result<(), HfWriteError> {
    let text = format!("{json:#}\n");
    write_bytes(path, text.as_bytes())
}

/// Writes a small file and flushes it to the disk.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), HfWriteError> {
    let mut file = File::create(path).map_err(io_error(path, "create it"))?;
    file.write_all(bytes).map_err(io_error(path, "write"))?;
    Ok(file.sync_all().map_err(io_error(path, "flush to the disk"))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::OpenOptions;
    use crate::synth::shape;
    use bitnet_burn::GatedActivation;
    use bitnet_burn_formats::quant::absmean_to_canonical;
    use bitnet_burn_formats::random::SplitMix64;
    use serde_json::json;

    type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

    fn tensors(config: &ModelConfig) -> Tensors {
        let mut random = SplitMix64::new(5);
        let mut value = || (random.below(2001) as f32 - 1000.0) / 997.0;
        let tensor = |(name, shape): (String, Vec<usize>)| {
            let n = shape.iter().product();
            (name, shape, (0..n).map(|_| value()).collect())
        };
        tensor_shapes(config).into_iter().map(tensor).collect()
    }

    #[test]
    fn what_training_writes_is_a_model() {
        let tiny = || shape("tiny").unwrap();
        let dir = tempfile::tempdir().unwrap();
        for config in [
            tiny(),
            ModelConfig { tied_embeddings: false, eos_tokens: vec![7], bos_token: None, ..tiny() },
            ModelConfig { activation: GatedActivation::Silu, name: None, rms_norm_eps: 1e-6, ..tiny() },
            ModelConfig { sub_norms: false, activation: GatedActivation::Silu, eos_tokens: vec![], ..tiny() },
            ModelConfig { head_dim: 32, rope_theta: 12_345.5, ..tiny() },
        ] {
            let tensors = tensors(&config);
            write_masters(dir.path(), &config, tensors.clone()).unwrap();
            let checkpoint = Checkpoint::open(dir.path(), &OpenOptions::default()).unwrap();
            assert_eq!(checkpoint.warnings(), [""; 0]);
            let architecture = if config.sub_norms { "bitnet" } else { "llama" };
            let expected = ModelConfig { architecture: architecture.into(), ..config.clone() };
            assert_eq!(*checkpoint.config(), expected);
            checkpoint.check().unwrap();
            let name = projection_name(1, Projection::Down);
            let (_, shape, values) = tensors.iter().find(|t| t.0 == name).unwrap();
            let (codes, scale) = absmean_to_canonical(values, shape[0], shape[1]).unwrap();
            let tensor = checkpoint.projection(1, Projection::Down).unwrap();
            assert_eq!((&tensor.codes[..], tensor.scale), (&codes[..], scale));
        }
        let config: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(config["rms_norm_eps"], json!(1e-5), "and not the f32's 9.999999747378752e-6");
    }

    #[test]
    fn masters_of_experts_are_a_model() {
        let dir = tempfile::tempdir().unwrap();
        let config = shape("tiny-experts").unwrap();
        let tensors = tensors(&config);
        write_masters(dir.path(), &config, tensors.clone()).unwrap();
        let checkpoint = Checkpoint::open(dir.path(), &OpenOptions::default()).unwrap();
        assert_eq!(checkpoint.config().options.experts, config.options.experts);
        checkpoint.check().unwrap();
        let master = checkpoint.master(1, Projection::ExpertDown(3)).unwrap().unwrap();
        let name = projection_name(1, Projection::ExpertDown(3));
        let (_, _, values) = tensors.iter().find(|t| t.0 == name).unwrap();
        assert_eq!(&master, values);
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let config = shape("tiny").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let error = |change: fn(&mut Tensors)| {
            let mut tensors = tensors(&config);
            change(&mut tensors);
            let error = write_masters(dir.path(), &config, tensors).unwrap_err().to_string();
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{error}");
            error
        };
        assert!(error(|t| drop(t.pop())).contains("is missing"));
        assert!(error(|t| t.push(t[0].clone())).contains("twice"));
        assert!(error(|t| t[0].0 = "x".into()).contains("`x`"));
        assert!(error(|t| t[0].1.reverse()).contains("asks for"));
        assert!(error(|t| t[0].2.truncate(3)).contains("has 3 values"));
        assert!(error(|t| t[1].2[4] = f32::NAN).contains("holds NaN at place 4"));
        let impossible = ModelConfig { n_heads: 3, ..config.clone() };
        let error = write_masters(dir.path(), &impossible, tensors(&impossible)).unwrap_err();
        assert!(matches!(error, HfWriteError::Config(_)), "{error}");
        let nowhere = dir.path().join("missing");
        let error = write_masters(&nowhere, &config, tensors(&config)).unwrap_err();
        assert!(matches!(error, HfWriteError::File(WriteError::Io { .. })), "{error}");
    }
}
