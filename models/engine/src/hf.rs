//! Writing Hugging Face directories: `config.json`, `generation_config.json`, `model.safetensors`.
//!
//! The files go into a directory that exists. Whoever wants a directory that is complete or not there at
//! all writes into one with a temporary name and renames it.

use crate::checkpoint::{Checkpoint, EXTENSION, LoadError};
use bitnet_burn::names::{EMBEDDING, HEAD, norm_name, projection_name, scale_name};
use bitnet_burn::{ActivationRule, ConfigError, ModelConfig, Norm, Parameter, Projection};
use bitnet_burn_formats::hf::pack_from_canonical;
use bitnet_burn_formats::safetensors::{Dtype, SINGLE, SafetensorsWriter};
use bitnet_burn_formats::{DenseFormat, DenseTensor, Progress, WriteError};
use serde_json::{Map, Value, json};
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
///   names are those of [`projection_name`], [`norm_name`], [`EMBEDDING`] and, where the output head is not
///   tied, [`HEAD`].
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
    write_config(dir, config, Projections::Bitnet(Style::Online), Dtype::F32)
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
    write_config(dir, config, Projections::Values(activations), Dtype::F32)
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
/// - `dense`: the type of embedding, output head and norms: F32, F16 or BF16. They share one, because
///   transformers leaves them in the stored type where projections are packed, and multiplies none of two types
/// - `progress`: gets the bytes of each write
///
/// # Errors
/// [`HfWriteError`], also for [`Style::Online`] where the checkpoint has no masters, and where the style can't
/// hold a projection.
pub fn write_checkpoint(
    dir: &Path,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    style: Style,
    dense: DenseFormat,
    progress: &mut Progress<'_>,
) -> Result<(), HfWriteError> {
    let mut writer = SafetensorsWriter::new();
    let unreadable = |tensor: &str| {
        let tensor = tensor.to_owned();
        move |error: LoadError| HfWriteError::Tensor { tensor, problem: format!("can't be read: {error}") }
    };
    let dtype = dense.dtype().ok_or_else(|| HfWriteError::Tensor {
        tensor: EMBEDDING.into(),
        problem: format!("can't be {}: safetensors files hold F32, F16 and BF16", dense.name()),
    })?;
    let mut matrix = |name: &str, tensor: DenseTensor| {
        writer.tensor(name, dtype, &[tensor.n, tensor.k], move |out| {
            if tensor.format == dense { out.write_all(&tensor.data) } else { tensor.write_as(dense, out) }
        })
    };
    matrix(EMBEDDING, checkpoint.embedding().map_err(unreadable(EMBEDDING))?)?;
    if let Some(output) = checkpoint.output().map_err(unreadable(HEAD))? {
        matrix(HEAD, output)?;
    }
    for layer in 0..config.n_layers {
        for which in Norm::of_layer(layer, config) {
            norm(&mut writer, checkpoint, which, dense, dtype)?;
        }
        for which in Projection::ALL {
            projection(&mut writer, checkpoint, layer, which, style)?;
        }
    }
    norm(&mut writer, checkpoint, Norm::Output, dense, dtype)?;
    write_config(dir, config, Projections::Bitnet(style), dtype)?;
    Ok(writer.write(&dir.join(SINGLE), progress)?)
}

/// How many bytes [`write_checkpoint`] will write, but for headers.
pub fn checkpoint_size(config: &ModelConfig, style: Style, dense: DenseFormat) -> u64 {
    let matrices = config.dense_parameters().saturating_mul(dense.block_bytes() as u64);
    let projections = match style {
        Style::Online => config.ternary_parameters().saturating_mul(4),
        Style::PackedAuto | Style::PackedInverse => config.ternary_parameters() / 4,
    };
    matrices.saturating_add(projections)
}

fn norm<'a>(
    writer: &mut SafetensorsWriter<'a>,
    checkpoint: &'a Checkpoint,
    which: Norm,
    dense: DenseFormat,
    dtype: Dtype,
) -> Result<(), WriteError> {
    writer.tensor(norm_name(which), dtype, &[which.len(checkpoint.config())], move |out| {
        let weights = checkpoint.norm(which).map_err(io::Error::other)?;
        let mut bytes = vec![0; weights.len() * dense.block_bytes()];
        dense.encode_row(&weights, &mut bytes).map_err(io::Error::other)?;
        out.write_all(&bytes)
    })
}

fn projection<'a>(
    writer: &mut SafetensorsWriter<'a>,
    checkpoint: &'a Checkpoint,
    layer: usize,
    which: Projection,
    style: Style,
) -> Result<(), HfWriteError> {
    let (n, k) = which.shape(checkpoint.config());
    let name = projection_name(layer, which);
    if style == Style::Online {
        writer.tensor(name, Dtype::F32, &[n, k], move |out| {
            let master = checkpoint.master(layer, which).map_err(io::Error::other)?;
            let missing = "the checkpoint has ternary weights, not the masters that they were made from";
            write_floats(out, &master.ok_or_else(|| io::Error::other(missing))?)
        })?;
        return Ok(());
    }
    if !n.is_multiple_of(4) {
        let problem = format!("has {n} rows; four of them go into a byte, so that N must be a multiple of 4");
        return Err(HfWriteError::Tensor { tensor: name, problem });
    }
    writer.tensor(name, Dtype::U8, &[n / 4, k], move |out| {
        let tensor = checkpoint.checked_projection(layer, which).map_err(io::Error::other)?;
        out.write_all(&pack_from_canonical(&tensor.codes, n, k).map_err(io::Error::other)?)
    })?;
    writer.tensor(scale_name(layer, which), Dtype::F32, &[1], move |out| {
        let scale = checkpoint.projection(layer, which).map_err(io::Error::other)?.scale;
        let stored = if style == Style::PackedInverse { inverse(scale)? } else { scale };
        write_floats(out, &[stored])
    })?;
    Ok(())
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
        shapes.extend(Projection::ALL.map(|which| {
            let (n, k) = which.shape(config);
            (projection_name(layer, which), vec![n, k])
        }));
    }
    shapes.extend([norm(Norm::Output)]);
    shapes
}

/// Writes `config.json` and `generation_config.json`.
fn write_config(
    dir: &Path,
    config: &ModelConfig,
    projections: Projections,
    dtype: Dtype,
) -> Result<(), HfWriteError> {
    config.validate()?;
    write_json(&dir.join("config.json"), &config_json(config, projections, dtype))?;
    let mut generation = Map::new();
    end_tokens(config, &mut generation);
    write_json(&dir.join("generation_config.json"), &Value::Object(generation))
}

/// What a directory's projections are.
#[derive(Clone, Copy)]
enum Projections {
    /// BitNet's, in one of its styles.
    Bitnet(Style),
    /// Values that are computed as they are, and how activations are quantised.
    Values(Option<ActivationRule>),
}

/// What transformers reads. The keys are those that all of its versions with BitNet know, and one that it ignores.
fn config_json(config: &ModelConfig, projections: Projections, dtype: Dtype) -> Value {
    // Whoever has sub-norms is BitNet to transformers, whatever the activation; else Llama, with BitNet's
    // linear layers.
    let (class, model_type) =
        if config.sub_norms { ("BitNetForCausalLM", "bitnet") } else { ("LlamaForCausalLM", "llama") };
    let bitnet = |class: &str, mode: &str| {
        let value = json!({ "quant_method": "bitnet", "linear_class": class, "quantization_mode": mode });
        Some(("quantization_config", value))
    };
    let stored = match projections {
        Projections::Bitnet(Style::Online) => bitnet("autobitlinear", "online"),
        Projections::Bitnet(Style::PackedAuto) => bitnet("autobitlinear", "offline"),
        Projections::Bitnet(Style::PackedInverse) => bitnet("bitlinear", "offline"),
        Projections::Values(rule) => rule.map(|rule| (EXTENSION, json!({ "activations": rule }))),
    };
    let dtype = match (projections, dtype) {
        // Masters are f32, and would be rounded before they are made ternary.
        (Projections::Bitnet(Style::Online), _) => "float32",
        (_, Dtype::F16) => "float16",
        (_, Dtype::BF16) => "bfloat16",
        _ => "float32",
    };
    let mut json = json!({
        "architectures": [class],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "hidden_act": config.activation.name(),
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context_length,
        "model_type": model_type,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": shortest(config.rms_norm_eps),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    if let Some(object) = json.as_object_mut() {
        end_tokens(config, object);
        object.extend(stored.map(|(key, value)| (key.into(), value)));
        if !config.sub_norms {
            object.insert("mlp_bias".into(), false.into());
        }
        if config.q_size() != config.hidden_size {
            object.insert("head_dim".into(), config.head_dim.into());
        }
        if let Some(name) = &config.name {
            object.insert("_name_or_path".into(), name.as_str().into());
        }
    }
    json
}

fn end_tokens(config: &ModelConfig, json: &mut Map<String, Value>) {
    json.insert("bos_token_id".into(), config.bos_token.into());
    let eos = match config.eos_tokens[..] {
        [] => Value::Null,
        [one] => one.into(),
        ref several => several.into(),
    };
    json.insert("eos_token_id".into(), eos);
}

/// The shortest decimal number that is this f32: 1e-5 and not 0.000009999999747378752.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
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
