//! A copy against its source, tensor by tensor.

use super::{Converted, ExportError, ExportOptions, Progress, Requantised, RoundedScales, Summary, Target};
use bitnet_burn::{
    DecoderOptions, FloatPart, ModelConfig, Norm, Projection, RopeScaling, RotaryEncodingConfig,
};
use bitnet_burn_engine::checkpoint::{Checkpoint, Rotated, TokenizerSource, Weights};
use bitnet_burn_engine::gguf::{GgufTypes, TernaryType, encoded};
use bitnet_burn_engine::hf::Style;
use bitnet_burn_engine::tokenizer::Tokenizer;
use bitnet_burn_engine::tokenizer::translate::{self, TranslateError};
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_formats::ternary::exact_from_dense;
use bitnet_burn_formats::{DenseTensor, TernaryTensor};
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
    let mut loss = Loss::default();
    for layer in 0..config.n_layers {
        let norms = Norm::of_layer(layer, config);
        norms.into_iter().try_for_each(|which| norm(source, copy, which, options.target, summary))?;
        for which in FloatPart::of_layer(layer, config) {
            let [part, copied] = [source, copy].map(|checkpoint| checkpoint.float_part(layer, which));
            matrix(&part?, &copied?, summary, &mut advance)?;
        }
        for which in Projection::of_layer(layer, config) {
            if which.has_bias(config) {
                bias(source, copy, layer, which, options.target, summary)?;
            }
            // The source's codes have been looked at while they were written.
            let (weights, copied) = (source.weights(layer, which)?, copy.weights(layer, which)?);
            projection(&weights, &copied, options.target, summary, &mut loss)?;
            let masters = matches!(options.target, Target::Hf { style: Style::Online, .. });
            if masters && source.master(layer, which)? != copy.master(layer, which)? {
                return Err(differs(weights.name(), "the masters differ"));
            }
            if source.rotation(Rotated::Projection(layer, which))
                != copy.rotation(Rotated::Projection(layer, which))
            {
                return Err(differs(weights.name(), "the rotation differs"));
            }
            let (n, k) = which.shape(config);
            advance((n * k / 4) as u64)?;
        }
    }
    for which in [Rotated::Embedding, Rotated::Output] {
        if source.rotation(which) != copy.rotation(which) {
            return Err(differs(&format!("{which:?}"), "the rotation differs"));
        }
    }
    summary.requantised = loss.finish();
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
    let rope_theta = match copy.rope_theta == f64::from(source.rope_theta as f32) {
        true => copy.rope_theta,
        false => source.rope_theta,
    };
    let options = match scaling_difference(source, copy) {
        Some(difference) if difference <= 1e-6 => {
            if difference > 0.0 {
                notes.push(format!(
                    "the frequencies of RoPE differ by {difference:.1e} of their value at most: the format states \
                     their scaling in f32"
                ));
            }
            DecoderOptions { rope_scaling: copy.options.rope_scaling.clone(), ..source.options.clone() }
        }
        _ => source.options.clone(),
    };
    let mut options = options;
    if let (Some(ours), Some(theirs)) = (&mut options.delta_net, &copy.options.delta_net)
        && ours.key_heads == ours.value_heads
    {
        // One order of the heads, whatever it is called.
        ours.tiled = theirs.tiled;
    }
    let expected = ModelConfig {
        architecture: copy.architecture.clone(),
        name: copy.name.clone(),
        rope_theta,
        bos_token: copy.bos_token,
        eos_tokens: copy.eos_tokens.clone(),
        options,
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

/// The largest relative difference of RoPE's frequencies and factors; `None` if there are other numbers of them. (One
/// function has several descriptions.)
fn scaling_difference(source: &ModelConfig, copy: &ModelConfig) -> Option<f64> {
    let of = |config: &ModelConfig| {
        let scaling = config.options.rope_scaling.clone();
        RotaryEncodingConfig::new(config.rope_dim()).with_theta(copy.rope_theta).with_scaling(scaling).init()
    };
    if source.rope_dim() != copy.rope_dim() {
        return None;
    }
    let (ours, theirs) = (of(source), of(copy));
    let original = |config: &ModelConfig| match config.options.rope_scaling {
        Some(RopeScaling::LongRope { original, .. }) => original,
        _ => config.context_length,
    };
    let contexts = [original(source), original(copy)].into_iter().flat_map(|n| [1, n, n.saturating_add(1)]);
    let mut largest = 0.0f64;
    for context in contexts {
        let ((ours, our_factor), (theirs, their_factor)) =
            (ours.frequencies(context), theirs.frequencies(context));
        let pairs = ours.iter().zip(theirs).chain([(&our_factor, &their_factor)]);
        largest = pairs.fold(largest, |largest, (a, b)| largest.max((b / a - 1.0).abs()));
    }
    Some(largest)
}

fn bias(
    source: &Checkpoint,
    copy: &Checkpoint,
    layer: usize,
    which: Projection,
    target: Target,
    summary: &mut Summary,
) -> Result<(), ExportError> {
    let what = format!("the bias of layer {layer} {which:?}");
    vector(&what, "biases", &source.bias(layer, which)?, &copy.bias(layer, which)?, target, summary)
}

fn norm(
    source: &Checkpoint,
    copy: &Checkpoint,
    which: Norm,
    target: Target,
    summary: &mut Summary,
) -> Result<(), ExportError> {
    vector(&format!("{which:?}"), "norms", &source.norm(which)?, &copy.norm(which)?, target, summary)
}

/// Norms and biases: the same, or rounded as it was asked for.
fn vector(
    what: &str,
    kind: &str,
    weights: &[f32],
    copied: &[f32],
    target: Target,
    summary: &mut Summary,
) -> Result<(), ExportError> {
    summary.tensors += 1;
    if weights == copied {
        return Ok(());
    }
    let asked = match target {
        Target::Hf { dense, .. } => dense,
        Target::Gguf(_) => None,
    };
    let Some(dense) = asked.filter(|&dense| rounded(weights, dense).is_some_and(|r| r == copied)) else {
        return Err(differs(what, "the values differ"));
    };
    let place = summary.converted.iter().position(|c| c.tensor == kind).unwrap_or_else(|| {
        let (tensor, from, to) = (kind.into(), "F32", dense.name());
        summary.converted.push(Converted { tensor, from, to, max_error: 0.0, max_value: 0.0 });
        summary.converted.len() - 1
    });
    let all = &mut summary.converted[place];
    for (weight, copied) in weights.iter().zip(copied) {
        all.max_error = all.max_error.max((weight - copied).abs());
        all.max_value = all.max_value.max(weight.abs());
    }
    Ok(())
}

/// What is left of finite values in a format of floats; `None` where it can't hold one of them.
fn rounded(values: &[f32], format: DenseFormat) -> Option<Vec<f32>> {
    let mut bytes = vec![0; format.row_bytes(values.len())?];
    let mut rounded = vec![0.0; values.len()];
    format.encode_row(values, &mut bytes).ok()?;
    format.decode_row(&bytes, &mut rounded).ok()?;
    rounded.iter().all(|v| v.is_finite()).then_some(rounded)
}

fn projection(
    weights: &Weights,
    copy: &Weights,
    target: Target,
    summary: &mut Summary,
    loss: &mut Loss,
) -> Result<(), ExportError> {
    let (n, k) = weights.shape();
    if (n, k) != copy.shape() {
        return Err(differs(weights.name(), "the shape differs"));
    }
    summary.tensors += 1;
    summary.ternary_weights += n as u64 * k as u64;
    match (weights, copy) {
        (Weights::Ternary(tensor), Weights::Ternary(copied)) => {
            summary.projections = copied.stored_as.to_owned();
            let none = tensor.zeros() == n as u64 * k as u64;
            let same = none || tensor.scale.to_bits() == copied.scale.to_bits();
            if tensor.codes == copied.codes && (same || rounded_inverse(tensor, copied, target, summary)) {
                return Ok(());
            }
        }
        (Weights::Dense(tensor), Weights::Dense(copied)) => {
            summary.projections = copied.format.name().to_owned();
            if tensor.format == copied.format && tensor.data == copied.data {
                return Ok(());
            }
        }
        _ => {
            return Err(differs(
                weights.name(),
                "only one of both has one scale and int8 activations by row",
            ));
        }
    }
    let difference = Difference::of(weights, copy)?;
    let Some((row, column, value, copied)) = difference.first else { return Ok(()) };
    match target {
        Target::Gguf(GgufTypes { ternary, requantise: true, .. }) if is_nearest(weights, copy, ternary) => {
            loss.add(weights.name(), &difference);
            Ok(())
        }
        _ => Err(differs(
            weights.name(),
            format!("row {row}, column {column} is {copied:e} instead of {value:e}"),
        )),
    }
}

/// Whether a scale is the source's but for the last bit, which a style with reciprocals may lose.
fn rounded_inverse(
    tensor: &TernaryTensor,
    copy: &TernaryTensor,
    target: Target,
    summary: &mut Summary,
) -> bool {
    let error = (copy.scale / tensor.scale - 1.0).abs();
    let inverse = matches!(target, Target::Hf { style: Style::PackedInverse, .. });
    let near = error <= 2.0 * f32::EPSILON;
    if !inverse || !near {
        return false;
    }
    let scales = summary.scales.get_or_insert_with(|| RoundedScales {
        reason: "the style divides by the stored number, and 1 / (1 / s) is not s",
        tensors: 0,
        max_relative_error: 0.0,
        tensor: String::new(),
    });
    scales.tensors += 1;
    if error >= scales.max_relative_error {
        (scales.max_relative_error, scales.tensor) = (error, tensor.name.clone());
    }
    true
}

/// Whether a copy is what requantising makes of the weights, and nothing else.
fn is_nearest(weights: &Weights, copy: &Weights, ternary: TernaryType) -> bool {
    let Some(format) = ternary.blocks() else { return false };
    let Ok(expected) = encoded(weights, format, true) else { return false };
    let (n, k) = weights.shape();
    match copy {
        Weights::Dense(copy) => copy.format == format && copy.data == expected,
        Weights::Ternary(copy) => exact_from_dense(format, &expected, n, k)
            .is_ok_and(|(codes, scale)| copy.codes == codes && copy.scale == scale),
    }
}

/// How a copy differs from the weights.
#[derive(Default)]
struct Difference {
    /// Row, column, value and the copy's value.
    first: Option<(usize, usize, f32, f32)>,
    squares: f64,
    of_weights: f64,
    largest: f32,
}

impl Difference {
    fn of(weights: &Weights, copy: &Weights) -> Result<Self, ExportError> {
        let (n, k) = weights.shape();
        let mut this = Self::default();
        let [mut values, mut copied] = [0, 1].map(|_| vec![0.0; k]);
        for row in 0..n {
            let decode = |weights: &Weights, values: &mut [f32]| {
                weights.decode_row(row, values).map_err(|error| differs(weights.name(), error.to_string()))
            };
            decode(weights, &mut values)?;
            decode(copy, &mut copied)?;
            for (column, (&value, &copied)) in values.iter().zip(&copied).enumerate() {
                this.of_weights += f64::from(value).powi(2);
                // Also where one of them is no number.
                if value != copied {
                    this.first.get_or_insert((row, column, value, copied));
                    this.squares += (f64::from(value) - f64::from(copied)).powi(2);
                    this.largest = this.largest.max((value - copied).abs());
                }
            }
        }
        Ok(this)
    }
}

/// What was lost in the projections that were requantised.
#[derive(Default)]
struct Loss {
    squares: f64,
    of_weights: f64,
    found: Option<Requantised>,
}

impl Loss {
    fn add(&mut self, tensor: &str, difference: &Difference) {
        self.squares += difference.squares;
        self.of_weights += difference.of_weights;
        let rms = (difference.squares / difference.of_weights).sqrt();
        let found = self.found.get_or_insert_with(|| Requantised {
            tensors: 0,
            rms: 0.0,
            max_error: 0.0,
            tensor: String::new(),
            worst: (String::new(), 0.0),
        });
        found.tensors += 1;
        found.rms = (self.squares / self.of_weights).sqrt();
        if difference.largest > found.max_error {
            (found.max_error, found.tensor) = (difference.largest, tensor.to_owned());
        }
        if rms > found.worst.1 {
            found.worst = (tensor.to_owned(), rms);
        }
    }

    fn finish(self) -> Option<Requantised> {
        self.found
    }
}

/// The embedding, the head or a router: the same bytes, or in another type, with the largest difference.
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
