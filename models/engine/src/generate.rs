//! From a prompt to tokens.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use bitnet_burn_backends::devices;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::load::DEFAULT_CHUNK;
use crate::sampling::{Sampler, SamplingConfig, SamplingError, StopMatcher};
use crate::tokenizer::{Tokenizer, TokenizerError};
use bitnet_burn::{BitNet, ForwardError, Row};
use bitnet_burn::{KvCache, SequenceId};

/// Why generation failed.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The forward pass.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The sampler.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// There is nothing to continue.
    #[error("the prompt has no tokens, so there is nothing to continue; give a prompt, or a BOS token")]
    EmptyPrompt,
    /// The logits could not be read back from their device.
    #[error("the logits could not be read from the device: {0}")]
    Device(String),
}

/// How tokens are generated.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Rows of the prompt that are computed at once.
    pub chunk: usize,
    /// How a token is drawn.
    pub sampling: SamplingConfig,
    /// Tokens that end the generation (they are not part of it).
    pub stop_tokens: Vec<u32>,
    /// Texts that end the generation (they are not part of it).
    pub stop_strings: Vec<String>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            chunk: DEFAULT_CHUNK,
            sampling: SamplingConfig::greedy(),
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
        }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// It reached `max_new_tokens`.
    Length,
    /// The model's end, or another stop token.
    StopToken,
    /// A stop string.
    StopString,
    /// The context is full.
    Context,
    /// The caller had enough.
    Cancelled,
}

/// What was generated, and how long it took.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The new tokens.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Time until the last prompt token's logits were there.
    pub prefill: Duration,
    /// Time until the first new token was drawn, if one was.
    pub first_token: Option<Duration>,
    /// Time of each following forward pass, with sampling.
    pub steps: Vec<Duration>,
}

/// Computes a prompt in chunks and returns the logits of its last token [1, vocabulary].
///
/// # Errors
/// As [`BitNet::forward`].
pub fn prefill(
    model: &BitNet,
    tokens: &[u32],
    sequence: SequenceId,
    cache: &mut KvCache,
    chunk: usize,
) -> Result<Tensor<2>, GenerateError> {
    let mut logits = None;
    for chunk in tokens.chunks(rows_at_once(chunk, cache)) {
        let rows = rows(chunk, sequence, cache.length(sequence).map_err(ForwardError::from)?);
        logits = Some(model.forward(&rows, &[rows.len() - 1], cache)?);
    }
    logits.ok_or(GenerateError::EmptyPrompt)
}

/// The logits of every position of `tokens`, in chunks: `each` gets the first position of a chunk, and
/// its logits [rows, vocabulary], row by row.
///
/// # Errors
/// As [`BitNet::forward`].
pub fn logits(
    model: &BitNet,
    tokens: &[u32],
    sequence: SequenceId,
    cache: &mut KvCache,
    chunk: usize,
    each: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), GenerateError> {
    for chunk in tokens.chunks(rows_at_once(chunk, cache)) {
        let position = cache.length(sequence).map_err(ForwardError::from)?;
        let rows = rows(chunk, sequence, position);
        let wanted: Vec<usize> = (0..rows.len()).collect();
        each(position, &values(model.forward(&rows, &wanted, cache)?)?);
    }
    Ok(())
}

/// No more than a sliding window can hold; a context that is too short says so itself.
fn rows_at_once(chunk: usize, cache: &KvCache) -> usize {
    chunk.min(cache.capacity()).max(1)
}

fn rows(tokens: &[u32], sequence: SequenceId, position: usize) -> Vec<Row> {
    tokens.iter().enumerate().map(|(i, &token)| Row { token, sequence, position: position + i }).collect()
}

/// A tensor's values on the host.
fn values(tensor: Tensor<2>) -> Result<Vec<f32>, GenerateError> {
    let data = devices::read(tensor).map_err(GenerateError::Device)?;
    data.try_to_vec::<f32>().map_err(|error| GenerateError::Device(format!("{error:?}")))
}

/// Generates tokens behind a prompt. `on_token` sees each as it comes, with the logits that it was
/// drawn from, and may end the generation.
///
/// # Errors
/// If the prompt is empty or does not fit the context, or the model or the sampler fails.
pub fn generate(
    model: &BitNet,
    prompt: &[u32],
    sequence: SequenceId,
    cache: &mut KvCache,
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32, &[f32]) -> ControlFlow<()>,
) -> Result<Generation, GenerateError> {
    let mut sampler = Sampler::new(options.sampling.clone())?;
    let started = Instant::now();
    let mut logits = values(prefill(model, prompt, sequence, cache, options.chunk)?)?;
    let mut result = Generation {
        tokens: Vec::new(),
        finish: Finish::Length,
        prompt_tokens: prompt.len(),
        prefill: started.elapsed(),
        first_token: None,
        steps: Vec::new(),
    };
    let mut history = prompt.to_vec();
    let mut clock = Instant::now();
    while result.tokens.len() < options.max_new_tokens {
        let token = sampler.sample(&logits, &history)?;
        result.first_token.get_or_insert_with(|| started.elapsed());
        if options.stop_tokens.contains(&token) {
            result.finish = Finish::StopToken;
            break;
        }
        result.tokens.push(token);
        history.push(token);
        if on_token(token, &logits).is_break() {
            result.finish = Finish::Cancelled;
            break;
        }
        if result.tokens.len() == options.max_new_tokens {
            break;
        }
        let position = cache.length(sequence).map_err(ForwardError::from)?;
        if !cache.has_room(sequence).map_err(ForwardError::from)? {
            result.finish = Finish::Context;
            break;
        }
        logits = values(model.forward(&[Row { token, sequence, position }], &[0], cache)?)?;
        result.steps.push(clock.elapsed());
        clock = Instant::now();
    }
    Ok(result)
}

/// [`generate`], with the text as it becomes certain: never half a character, and never a part of what
/// turns out to be a stop string. Special tokens are not shown.
///
/// # Errors
/// As [`generate`], and if a token can't be decoded.
pub fn generate_text(
    model: &BitNet,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sequence: SequenceId,
    cache: &mut KvCache,
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation, GenerateError> {
    let mut decoder = tokenizer.decode_stream_after(prompt, true)?;
    let mut stops = StopMatcher::new(&options.stop_strings)?;
    let mut problem = None;
    let mut stopped = false;
    let mut emit = |text: String, stops: &mut StopMatcher| {
        let output = stops.push(&text);
        let flow = if output.text.is_empty() { ControlFlow::Continue(()) } else { on_text(&output.text) };
        (flow, output.stopped.is_some())
    };
    let mut generation =
        generate(model, prompt, sequence, cache, options, &mut |token, _| match decoder.push(token) {
            Ok(None) => ControlFlow::Continue(()),
            Ok(Some(text)) => {
                let (flow, stop) = emit(text, &mut stops);
                stopped |= stop;
                if stop { ControlFlow::Break(()) } else { flow }
            }
            Err(error) => {
                problem = Some(error);
                ControlFlow::Break(())
            }
        })?;
    if let Some(error) = problem {
        return Err(error.into());
    }
    if stopped {
        generation.finish = Finish::StopString;
        return Ok(generation);
    }
    if let Some(tail) = decoder.flush()?
        && emit(tail, &mut stops).1
    {
        generation.finish = Finish::StopString;
        return Ok(generation);
    }
    let rest = stops.flush();
    if !rest.is_empty() {
        // Nothing follows that could be cancelled.
        let _ = on_text(&rest);
    }
    Ok(generation)
}
