//! A copy against its source, tensor by tensor.

use super::{Converted, ExportError, ExportOptions, Progress, RoundedScales, Summary, Target};
use bitnet_burn::ModelConfig;
use bitnet_burn::{Norm, Projection};
use bitnet_burn_engine::checkpoint::{Checkpoint, TokenizerSource};
use bitnet_burn_engine::gguf::TernaryType;
use bitnet_burn_engine::hf::Style;
use bitnet_burn_engine::tokenizer::Tokenizer;
use bitnet_burn_engine::tokenizer::translate::{self, TranslateError};
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_formats::{DenseTensor, TernaryTensor};
use half::f16;
use std::ops::ControlFlow;

/// Compares everything that was written with the source, and fills in the summary.
pub(super) fn compare(
    source: &Checkpoint,
    copy: &Checkpoint,
    options: &ExportOptions,
    summary: &mut Summary,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<(), ExportError> {
    let config = source.config();
    configuration(config, copy.config(), &mut summary.notes)?;
    summary.architecture = copy.config().architecture.clone();
    (summary.format, summary.warnings) = match options.target {
        Target::Gguf(types) => ("GGUF", types.warnings(config)),
        Target::Hf { .. } => ("Hugging Face", Vec::new()),
    };
    summary.notes.extend(copy.warnings().iter().cloned());

    let total = config.ternary_parameters() / 4 + config.dense_parameters();
    let mut done = 0;
    let mut advance = |bytes: u64| {
        done += bytes;
        match progress(Progress::Comparing { done, total: total.max(done) }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ExportError::Interrupted),
        }
    };
    let (embedding, copied) = (source.embedding()?, copy.embedding()?);
    summary.embedding = copied.format.name();
    matrix(&embedding, &copied, summary, &mut advance)?;
    match (source.output()?, copy.output()?) {
        (Some(output), Some(copied)) => matrix(&output, &copied, summary, &mut advance)?,
        (None, None) => {}
        _ => return Err(differs("output head", "one of them is tied to the embedding")),
    }
    for layer in 0..config.n_layers {
        let norms = Norm::of_layer(layer, config);
        norms.into_iter().try_for_each(|which| norm(source, copy, which, options.target, summary))?;
        for which in Projection::ALL {
            // The source's codes have been looked at while they were written.
            let (tensor, copied) = (source.projection(layer, which)?, copy.projection(layer, which)?);
            projection(&tensor, &copied, options.target, summary)?;
            let masters = matches!(options.target, Target::Hf { style: Style::Online, .. });
            if masters && source.master(layer, which)? != copy.master(layer, which)? {
                return Err(differs(&tensor.name, "the masters differ"));
            }
            advance((tensor.n * tensor.k / 4) as u64)?;
        }
    }
    norm(source, copy, Norm::Output, options.target, summary)?;
    if options.tokenizer {
        tokenizer(source, copy, summary)?;
    }
    Ok(())
}

fn differs(tensor: &str, problem: impl Into<String>) -> ExportError {
    ExportError::Differs { tensor: tensor.to_owned(), problem: problem.into() }
}

/// Everything but names and what GGUF can't say exactly, which is noted.
fn configuration(
    source: &ModelConfig,
    copy: &ModelConfig,
    notes: &mut Vec<String>,
) -> Result<(), ExportError> {
    let expected = ModelConfig {
        architecture: copy.architecture.clone(),
        name: copy.name.clone(),
        rope_theta: if copy.rope_theta == f64::from(source.rope_theta as f32) {
            copy.rope_theta
        } else {
            source.rope_theta
        },
        bos_token: copy.bos_token,
        eos_tokens: copy.eos_tokens.clone(),
        ..source.clone()
    };
    if expected != *copy {
        return Err(differs("the configuration", format!("{copy:?} instead of {expected:?}")));
    }
    if copy.rope_theta != source.rope_theta {
        notes.push(format!(
            "the base of RoPE, {}, is {} as the f32 that GGUF holds",
            source.rope_theta, copy.rope_theta
        ));
    }
    if let Some(bos) = source.bos_token
        && copy.bos_token != source.bos_token
    {
        let tokens = copy.bos_token.map_or("none".to_owned(), |token| token.to_string());
        notes.push(format!(
            "text begins with the token {tokens}, as the tokenizer has it; the model names {bos}"
        ));
    }
    let lost: Vec<_> = source.eos_tokens.iter().filter(|t| !copy.eos_tokens.contains(t)).collect();
    if !lost.is_empty() {
        notes.push(format!("the tokens {lost:?}, which end a text, have no key in a GGUF file"));
    }
    Ok(())
}

fn norm(
    source: &Checkpoint,
    copy: &Checkpoint,
    which: Norm,
    target: Target,
    summary: &mut Summary,
) -> Result<(), ExportError> {
    let (weights, copied) = (source.norm(which)?, copy.norm(which)?);
    summary.tensors += 1;
    if weights == copied {
        return Ok(());
    }
    let asked = match target {
        Target::Hf { dense, .. } => dense,
        Target::Gguf(_) => None,
    };
    let Some(dense) = asked.filter(|&dense| rounded(&weights, dense).is_some_and(|r| r == copied)) else {
        return Err(differs(&format!("{which:?}"), "the weights of the norm differ"));
    };
    let place = summary.converted.iter().position(|c| c.tensor == "norms").unwrap_or_else(|| {
        let (tensor, from, to) = ("norms".into(), "F32", dense.name());
        summary.converted.push(Converted { tensor, from, to, max_error: 0.0, max_value: 0.0 });
        summary.converted.len() - 1
    });
    let norms = &mut summary.converted[place];
    for (weight, copied) in weights.iter().zip(&copied) {
        norms.max_error = norms.max_error.max((weight - copied).abs());
        norms.max_value = norms.max_value.max(weight.abs());
    }
    Ok(())
}

/// What is left of finite values in a format of floats; `None` where it can't hold one of them.
pub(super) fn rounded(values: &[f32], format: DenseFormat) -> Option<Vec<f32>> {
    let mut bytes = vec![0; format.row_bytes(values.len())?];
    let mut rounded = vec![0.0; values.len()];
    format.encode_row(values, &mut bytes).ok()?;
    format.decode_row(&bytes, &mut rounded).ok()?;
    rounded.iter().all(|v| v.is_finite()).then_some(rounded)
}

fn projection(
    tensor: &TernaryTensor,
    copy: &TernaryTensor,
    target: Target,
    summary: &mut Summary,
) -> Result<(), ExportError> {
    if tensor.codes != copy.codes {
        return Err(differs(&tensor.name, "the ternary weights differ"));
    }
    summary.projections = copy.stored_as.to_owned();
    summary.tensors += 1;
    summary.ternary_weights += tensor.n as u64 * tensor.k as u64;
    if tensor.scale.to_bits() == copy.scale.to_bits() || tensor.zeros() == tensor.n as u64 * tensor.k as u64 {
        return Ok(());
    }
    // The scale that the format's own rounding makes, and no other.
    let (reason, expected) = match target {
        Target::Gguf(types) if types.ternary != TernaryType::I2_S => {
            ("the type holds its scale as f16", Some(f16::from_f32(tensor.scale).to_f32()))
        }
        Target::Hf { style: Style::PackedInverse, .. } => {
            let near = (copy.scale / tensor.scale - 1.0).abs() <= 2.0 * f32::EPSILON;
            ("the style divides by the stored number, and 1 / (1 / s) is not s", near.then_some(copy.scale))
        }
        _ => ("", None),
    };
    if expected != Some(copy.scale) {
        return Err(differs(
            &tensor.name,
            format!("the scale is {:e} instead of {:e}", copy.scale, tensor.scale),
        ));
    }
    let error = (copy.scale / tensor.scale - 1.0).abs();
    let scales = summary.scales.get_or_insert_with(|| RoundedScales {
        reason,
        tensors: 0,
        max_relative_error: 0.0,
        tensor: String::new(),
    });
    scales.tensors += 1;
    if error >= scales.max_relative_error {
        (scales.max_relative_error, scales.tensor) = (error, tensor.name.clone());
    }
    Ok(())
}

/// The embedding or the head: the same bytes, or in another type, with the largest difference.
fn matrix(
    tensor: &DenseTensor,
    copy: &DenseTensor,
    summary: &mut Summary,
    advance: &mut dyn FnMut(u64) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    if (tensor.n, tensor.k) != (copy.n, copy.k) {
        return Err(differs(&tensor.name, "the shape differs"));
    }
    summary.tensors += 1;
    if tensor.format == copy.format {
        if tensor.data != copy.data {
            return Err(differs(&tensor.name, "the bytes differ"));
        }
        return advance(tensor.n as u64 * tensor.k as u64);
    }
    let (mut max_error, mut max_value) = (0.0f32, 0.0f32);
    let [mut values, mut copied] = [0, 1].map(|_| vec![0.0; tensor.k]);
    for n in 0..tensor.n {
        let decode = |tensor: &DenseTensor, values: &mut [f32]| {
            let row = tensor.row(n).ok_or_else(|| differs(&tensor.name, format!("row {n} is missing")))?;
            tensor.format.decode_row(row, values).map_err(|e| differs(&tensor.name, e.to_string()))
        };
        decode(tensor, &mut values)?;
        decode(copy, &mut copied)?;
        for (column, (&value, &copied)) in values.iter().zip(&copied).enumerate() {
            if !copied.is_finite() {
                let format = copy.format.name();
                let problem = format!("row {n}, column {column} holds {value:e}, which {format} can't hold");
                return Err(differs(&tensor.name, problem));
            }
            max_error = max_error.max((value - copied).abs());
            max_value = max_value.max(value.abs());
        }
        advance(tensor.k as u64)?;
    }
    let (from, to) = (tensor.format.name(), copy.format.name());
    summary.converted.push(Converted { tensor: tensor.name.clone(), from, to, max_error, max_value });
    Ok(())
}

fn tokenizer(source: &Checkpoint, copy: &Checkpoint, summary: &mut Summary) -> Result<(), ExportError> {
    let sources = [source, copy].map(Checkpoint::tokenizer_source);
    if !translate::is_there(&sources[0]) {
        summary.notes.push("the source has no tokenizer, so that this takes and gives token ids only".into());
        return Ok(());
    }
    let size = source.config().vocab_size;
    let original = match Tokenizer::from_source(&sources[0], size) {
        Ok(tokenizer) => tokenizer,
        // Files that were copied as they are.
        Err(error) if sources.iter().all(|source| matches!(source, TokenizerSource::Hf { .. })) => {
            summary.notes.push(format!("the tokenizer's files were copied, but can't be read here: {error}"));
            return Ok(());
        }
        Err(error) => return Err(TranslateError::Read(error).into()),
    };
    let copied = Tokenizer::from_source(&sources[1], size).map_err(TranslateError::Read)?;
    if let Some(problem) = translate::disagreement(&original, &copied).map_err(TranslateError::Read)? {
        let path = source.path().to_owned();
        return Err(TranslateError::Inexact { path, problem }.into());
    }
    let (ends, copied_ends) = (original.end_of_generation(), copied.end_of_generation());
    if ends != copied_ends {
        summary.notes.push(format!("text ends at the tokens {copied_ends:?}, in the source at {ends:?}"));
    }
    if original.chat_template() != copied.chat_template() {
        return Err(differs("the chat template", "it is another"));
    }
    Ok(())
}
