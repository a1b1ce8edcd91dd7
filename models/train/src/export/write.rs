//! The files of a model in the format that was asked for.

use super::place::io_error;
use super::{ExportError, ExportOptions, TOKENIZER_FILES};
use bitnet_burn::{FloatPart, ModelConfig, Norm, Projection};
use bitnet_burn_engine::checkpoint::{Checkpoint, EmbedDefaults, GgufTokenizer, LoadError, TokenizerSource};
use bitnet_burn_engine::gguf::{GgufTypes, MatrixError, TernaryType, write_checkpoint};
use bitnet_burn_engine::hf::{Style, write_bytes, write_checkpoint as write_directory, write_json};
use bitnet_burn_engine::tokenizer::translate;
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_formats::gguf::{Array, GgufFile, GgufWriter, Value};
use bitnet_burn_formats::{FormatError, WriteError};
use std::io;
use std::path::Path;

/// Gets the bytes of a write and the size of the whole.
type Advance<'p> = dyn FnMut(u64, u64) -> io::Result<()> + 'p;

/// Writes a GGUF file.
pub(super) fn gguf(
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
    write_checkpoint(&mut writer, &config, checkpoint, types)?;
    notes.extend(embedding_notes(checkpoint, true));
    writer.set("general.type", "model")?;
    // The numbers of llama.cpp (`llama_ftype`), of bitnet.cpp for I2_S, and of Prism ML for its types.
    let file_type = match types.ternary {
        TernaryType::TQ1_0 => 36u32,
        TernaryType::TQ2_0 => 37,
        TernaryType::I2_S => 40,
        TernaryType::Q2_0 => 41,
        TernaryType::PQ2_0 => 141,
        TernaryType::PTQ1_0 => 143,
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
    writer.write_with(path, &mut |bytes| advance(bytes, total)).map_err(|error| failed(error, types.ternary))
}

/// The error of a matrix, where that was it.
fn failed(error: WriteError, ternary: TernaryType) -> ExportError {
    let WriteError::Io { path, action, error } = error else { return error.into() };
    match error.downcast::<MatrixError>() {
        Ok(error) => ExportError::Matrix { instead: instead_of(&error, ternary), error },
        Err(error) => WriteError::Io { path, action, error }.into(),
    }
}

/// What would hold a matrix that a type can't hold.
fn instead_of(error: &MatrixError, ternary: TernaryType) -> &'static str {
    match error {
        MatrixError::Inexact { error: FormatError::SmallerGroups { .. }, .. }
            if ternary != TernaryType::Q2_0 =>
        {
            "q2_0 has blocks of 64 weights, and a Hugging Face directory holds any groups; --requantise writes the \
             nearest weights and says what is lost"
        }
        MatrixError::Inexact { error: FormatError::SmallerGroups { .. }, .. } => {
            "a Hugging Face directory holds any groups; --requantise writes the nearest weights and says what is lost"
        }
        MatrixError::Inexact {
            error: FormatError::NotTernary { .. } | FormatError::NotFinite { .. },
            ..
        } => "--requantise writes the nearest ternary weights and says what is lost",
        MatrixError::Activations { .. } => "write q2_0, or another type with a scale for each block",
        _ => {
            "a Hugging Face directory holds any scale, and i2_s one for a tensor; --requantise writes the nearest \
             weights and says what is lost"
        }
    }
}

/// The keys of a tokenizer but for the ids that the configuration has.
fn tokenizer_keys(keys: GgufTokenizer) -> Vec<(String, Value)> {
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

/// What the source says about embeddings of texts and the copy does not: of a GGUF file all but how they are pooled.
fn embedding_notes(checkpoint: &Checkpoint, gguf: bool) -> Vec<String> {
    let lost = match checkpoint.embed_defaults(None) {
        Ok(defaults) if gguf => {
            !defaults.prompts.is_empty() || defaults.normalise == Some(false) || defaults.mean_without_prompt
        }
        Ok(defaults) => defaults != EmbedDefaults::default(),
        Err(_) => true,
    };
    let what = match gguf {
        true => {
            "a GGUF file says how embeddings are pooled, and no more: no prompts, and nothing about their length"
        }
        false => {
            "what the source says about embeddings is not written; a directory's is in modules.json, 1_Pooling and \
             config_sentence_transformers.json"
        }
    };
    lost.then(|| what.to_owned()).into_iter().collect()
}

/// Writes a Hugging Face directory: in which style, and in which type what is dense (`None`: in one that holds it exactly).
pub(super) fn hf(
    checkpoint: &Checkpoint,
    config: ModelConfig,
    (style, dense): (Style, Option<DenseFormat>),
    options: &ExportOptions,
    path: &Path,
    notes: &mut Vec<String>,
    advance: &mut Advance<'_>,
) -> Result<(), ExportError> {
    let dense = match dense {
        None if style != Style::Values => Some(exact_dense(checkpoint, style)?),
        asked => asked,
    };
    if config.sub_norms && config.q_size() != config.hidden_size {
        notes.push(format!(
            "transformers' BitNetForCausalLM can't compute this model: its heads are {} wide together, the residual \
             stream {}",
            config.q_size(),
            config.hidden_size
        ));
    }
    notes.extend(embedding_notes(checkpoint, false));
    write_directory(path, checkpoint, &config, style, dense, advance)?;
    let copy = |from: &Path, name: &str| match std::fs::read(from.join(name)) {
        Ok(bytes) => Ok(write_bytes(&path.join(name), &bytes)?),
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
            write_bytes(&path.join("tokenizer.json"), files.tokenizer.as_bytes())?;
            write_json(&path.join("tokenizer_config.json"), &files.config)?;
        }
        TokenizerSource::Gguf(_) => {}
    }
    Ok(())
}

/// The type in which a packed Hugging Face directory holds embedding, head, norms, biases and routers exactly.
fn exact_dense(checkpoint: &Checkpoint, style: Style) -> Result<DenseFormat, LoadError> {
    let (config, stored) = (checkpoint.config(), checkpoint.embedding()?.format);
    let head = checkpoint.output()?.map_or(stored, |output| output.format);
    if style == Style::Online || stored.dtype().is_none() || head != stored {
        return Ok(DenseFormat::F32);
    }
    let holds = |values: Result<Vec<f32>, LoadError>| Ok::<_, LoadError>(stored.holds(&values?));
    for layer in 0..config.n_layers {
        for which in Norm::of_layer(layer, config) {
            if !holds(checkpoint.norm(which))? {
                return Ok(DenseFormat::F32);
            }
        }
        for which in Projection::of_layer(layer, config).into_iter().filter(|which| which.has_bias(config)) {
            if !holds(checkpoint.bias(layer, which))? {
                return Ok(DenseFormat::F32);
            }
        }
        for which in FloatPart::of_layer(layer, config) {
            if checkpoint.float_part(layer, which)?.format != stored {
                return Ok(DenseFormat::F32);
            }
        }
    }
    Ok(if holds(checkpoint.norm(Norm::Output))? { stored } else { DenseFormat::F32 })
}
