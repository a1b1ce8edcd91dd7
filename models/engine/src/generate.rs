//! From a prompt to tokens.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bitnet_burn_backends::devices;
use bitnet_burn_formats::FileError;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::constraint::{Constrained, Constraint, ConstraintError};
use crate::load::DEFAULT_CHUNK;
use crate::sampling::{Sampler, SamplingConfig, SamplingError, StopMatcher};
use crate::tokenizer::{DecodeStream, Tokenizer, TokenizerError};
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
    /// The form that the answer must have.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// A file of the model was truncated while it computed.
    #[error(transparent)]
    File(#[from] FileError),
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
    /// The form that the answer must have, if any. Stop strings may still end it before it is complete.
    pub constraint: Option<Constraint>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            chunk: DEFAULT_CHUNK,
            sampling: SamplingConfig::greedy(),
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            constraint: None,
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
    /// The constraint is fulfilled, and nothing can follow.
    Constraint,
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
    /// Tokens of the prompt that the cache had already.
    pub cached_tokens: usize,
    /// Time until the last prompt token's logits were there.
    pub prefill: Duration,
    /// Time until the first new token was drawn, if one was.
    pub first_token: Option<Duration>,
    /// Time of each following forward pass, with sampling.
    pub steps: Vec<Duration>,
    /// Time to draw each token, with what ended the generation.
    pub sampling: Vec<Duration>,
    /// Time to make text of all tokens, if that was made.
    pub detokenisation: Option<Duration>,
    /// Time until the last token was drawn.
    pub end_to_end: Duration,
}

impl Generation {
    /// A generation behind a prompt of `prompt_tokens` tokens that ended before it began.
    pub(crate) fn empty(prompt_tokens: usize) -> Self {
        Self {
            tokens: Vec::new(),
            finish: Finish::Cancelled,
            prompt_tokens,
            cached_tokens: 0,
            prefill: Duration::ZERO,
            first_token: None,
            steps: Vec::new(),
            sampling: Vec::new(),
            detokenisation: None,
            end_to_end: Duration::ZERO,
        }
    }
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

pub(crate) fn rows(tokens: &[u32], sequence: SequenceId, position: usize) -> Vec<Row> {
    tokens.iter().enumerate().map(|(i, &token)| Row { token, sequence, position: position + i }).collect()
}

/// A tensor's values on the host.
pub(crate) fn values(tensor: Tensor<2>) -> Result<Vec<f32>, GenerateError> {
    let data = devices::read(tensor).map_err(GenerateError::Device)?;
    data.try_to_vec::<f32>().map_err(|error| GenerateError::Device(format!("{error:?}")))
}

/// What a [`step`](Generator::step) did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A part of the prompt was computed: so many of its tokens are done.
    Prompt {
        /// Tokens in the cache.
        done: usize,
        /// Tokens of the prompt.
        all: usize,
    },
    /// A token was drawn.
    Token(u32),
    /// The generation is over. All further steps say the same.
    Finished(Finish),
}

/// Generates tokens step by step: each step is one forward pass, and the token that is drawn from its logits.
///
/// [`generate`] and [`generate_text`] call [`step`](Self::step) in a loop. An asynchronous caller awaits
/// [`step_async`](Self::step_async) instead. To cancel, stop stepping, or say so by [`cancel`](Self::cancel).
#[derive(Debug)]
pub struct Generator<'a> {
    model: &'a BitNet,
    /// What the model's weights are in, if its files are mapped.
    checkpoint: Option<&'a Checkpoint>,
    cache: &'a mut KvCache,
    sequence: SequenceId,
    options: &'a GenerateOptions,
    sampler: Sampler,
    /// By the options' constraint.
    constrained: Option<Box<Constrained>>,
    /// The prompt and the tokens behind it.
    history: Vec<u32>,
    /// The logits that the last token was drawn from.
    logits: Vec<f32>,
    finished: Option<Finish>,
    started: Instant,
    clock: Instant,
    generation: Generation,
}

/// What became of a forward pass.
#[allow(clippy::large_enum_variant, reason = "it lives for one call")]
enum Pass {
    /// No token is due yet.
    Done(Step),
    /// A token is drawn from these logits [1, vocabulary].
    Logits(Tensor<2>),
}

impl<'a> Generator<'a> {
    /// A generation behind `prompt`, of which the sequence's cache has the first tokens already (none, if it is new).
    ///
    /// # Errors
    /// If nothing of the prompt is left to compute, or the sampling options are impossible.
    pub fn new(
        model: &'a BitNet,
        prompt: &[u32],
        sequence: SequenceId,
        cache: &'a mut KvCache,
        options: &'a GenerateOptions,
    ) -> Result<Self, GenerateError> {
        let cached = cache.length(sequence).map_err(ForwardError::from)?;
        if cached >= prompt.len() {
            return Err(GenerateError::EmptyPrompt);
        }
        let sampler = Sampler::new(options.sampling.clone())?;
        let now = Instant::now();
        Ok(Self {
            model,
            checkpoint: None,
            cache,
            sequence,
            options,
            sampler,
            constrained: None,
            history: prompt.to_vec(),
            logits: Vec::new(),
            finished: None,
            started: now,
            clock: now,
            generation: Generation { cached_tokens: cached, ..Generation::empty(prompt.len()) },
        })
    }

    /// Ends with an error if one of these files turns out to be truncated.
    pub fn reading(mut self, checkpoint: &'a Checkpoint) -> Self {
        self.checkpoint = Some(checkpoint);
        self
    }

    /// Draws tokens that the options' constraint allows.
    pub(crate) fn constrained(mut self, constrained: Option<Box<Constrained>>) -> Self {
        self.constrained = constrained;
        self
    }

    /// Computes one chunk of the prompt, or one token.
    ///
    /// # Errors
    /// If the model or the sampler fails.
    pub fn step(&mut self) -> Result<Step, GenerateError> {
        match self.forward()? {
            Pass::Done(step) => Ok(step),
            Pass::Logits(logits) => self.draw(values(logits)?),
        }
    }

    /// [`step`](Self::step), which awaits the logits instead of blocking the thread until the device has them.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub async fn step_async(&mut self) -> Result<Step, GenerateError> {
        match self.forward()? {
            Pass::Done(step) => Ok(step),
            Pass::Logits(logits) => {
                let device = |error: &dyn std::fmt::Debug| GenerateError::Device(format!("{error:?}"));
                let data = logits.into_data_async().await.map_err(|error| device(&error))?;
                self.draw(data.try_to_vec::<f32>().map_err(|error| device(&error))?)
            }
        }
    }

    fn forward(&mut self) -> Result<Pass, GenerateError> {
        if let Some(finish) = self.finished {
            return Ok(Pass::Done(Step::Finished(finish)));
        }
        if self.constrained.as_ref().is_some_and(|constrained| constrained.is_complete()) {
            return Ok(Pass::Done(self.finish(Finish::Constraint)));
        }
        if self.options.constraint.is_some() && self.constrained.is_none() {
            return Err(ConstraintError::NoEngine.into());
        }
        let done = self.cache.length(self.sequence).map_err(ForwardError::from)?;
        let prompt = self.generation.prompt_tokens;
        let first = self.generation.tokens.is_empty();
        if !first {
            if self.generation.tokens.len() >= self.options.max_new_tokens {
                return Ok(Pass::Done(self.finish(Finish::Length)));
            }
            if !self.cache.has_room(self.sequence).map_err(ForwardError::from)? {
                return Ok(Pass::Done(self.finish(Finish::Context)));
            }
        }
        let chunk = if first { rows_at_once(self.options.chunk, self.cache) } else { 1 };
        let mut end = (done + chunk).min(self.history.len());
        if first && self.cache.needs_snapshots() {
            // Before the last token of the prompt, so that the same prompt goes on from there.
            if done + 1 == prompt {
                self.cache.snapshot(self.sequence).map_err(ForwardError::from)?;
            } else {
                end = end.min(prompt - 1);
            }
        }
        let chunk = &self.history[done..end];
        let rows = rows(chunk, self.sequence, done);
        let logits = self.model.forward(&rows, &[rows.len() - 1], self.cache)?;
        if done + rows.len() < self.history.len() {
            return Ok(Pass::Done(Step::Prompt { done: done + rows.len(), all: prompt }));
        }
        Ok(Pass::Logits(logits))
    }

    fn draw(&mut self, logits: Vec<f32>) -> Result<Step, GenerateError> {
        if let Some(checkpoint) = self.checkpoint {
            checkpoint.intact()?;
        }
        self.logits = logits;
        let generation = &mut self.generation;
        if generation.tokens.is_empty() {
            generation.prefill = self.started.elapsed();
            // Until something is drawn.
            generation.end_to_end = generation.prefill;
        } else {
            generation.steps.push(self.clock.elapsed());
        }
        self.clock = Instant::now();
        if self.options.max_new_tokens == 0 {
            return Ok(self.finish(Finish::Length));
        }
        let logits = match &mut self.constrained {
            None => Some(&self.logits[..]),
            Some(constrained) => constrained.mask(&self.logits, &self.options.stop_tokens)?,
        };
        let Some(logits) = logits else { return Ok(self.finish(Finish::Constraint)) };
        let token = self.sampler.sample(logits, &self.history, generation.tokens.len())?;
        generation.sampling.push(self.clock.elapsed());
        generation.end_to_end = self.started.elapsed();
        generation.first_token.get_or_insert_with(|| self.started.elapsed());
        if self.options.stop_tokens.contains(&token) {
            return Ok(self.finish(Finish::StopToken));
        }
        if let Some(constrained) = &mut self.constrained {
            constrained.take(token)?;
        }
        generation.tokens.push(token);
        self.history.push(token);
        Ok(Step::Token(token))
    }

    fn finish(&mut self, finish: Finish) -> Step {
        self.generation.finish = finish;
        self.finished = Some(finish);
        Step::Finished(finish)
    }

    /// The logits that the last token was drawn from.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Ends the generation. What was generated stays.
    pub fn cancel(&mut self) {
        if self.finished.is_none() {
            self.finish(Finish::Cancelled);
        }
    }

    /// What was generated so far.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// What was generated.
    pub fn into_generation(self) -> Generation {
        self.generation
    }
}

/// The text of a generation, as it becomes certain: never half a character, and never a part of what turns out to be a
/// stop string. Special tokens are not shown.
///
/// It is an iterator over pieces of text. [`next_async`](Self::next_async) is for asynchronous callers.
#[derive(Debug)]
pub struct TextGenerator<'a> {
    tokens: Generator<'a>,
    decoder: DecodeStream<'a>,
    stops: StopMatcher,
    /// The end of the text was given, or an error.
    over: bool,
    /// Ends the generation when it is set.
    cancelled: Option<Arc<AtomicBool>>,
}

impl<'a> TextGenerator<'a> {
    /// The text of a generation; `prompt` is what that continues.
    ///
    /// # Errors
    /// If a stop string is empty, or the prompt has a token that the tokenizer lacks.
    pub fn new(
        tokens: Generator<'a>,
        tokenizer: &'a Tokenizer,
        prompt: &[u32],
    ) -> Result<Self, GenerateError> {
        let decoder = tokenizer.decode_stream_after(prompt, true)?;
        let stops = StopMatcher::new(&tokens.options.stop_strings)?;
        Ok(Self { tokens, decoder, stops, over: false, cancelled: None })
    }

    /// The text that a step makes certain, which may be none.
    fn text_of(&mut self, step: &Step) -> Result<Option<String>, GenerateError> {
        let (text, last) = match step {
            Step::Prompt { .. } => return Ok(None),
            Step::Token(token) => (self.decoder.push(*token)?, false),
            Step::Finished(Finish::Cancelled | Finish::StopString) => {
                self.over = true;
                return Ok(None);
            }
            Step::Finished(_) => (self.decoder.flush()?, true),
        };
        self.over = last;
        let mut shown = String::new();
        if let Some(text) = text {
            let output = self.stops.push(&text);
            shown = output.text;
            if output.stopped.is_some() {
                self.tokens.finish(Finish::StopString);
                self.over = true;
            }
        }
        if last && self.stops.stopped().is_none() {
            shown.push_str(&self.stops.flush());
        }
        Ok(Some(shown).filter(|text| !text.is_empty()))
    }

    /// The next piece of text; `None` at the end.
    ///
    /// # Errors
    /// If the model or the sampler fails, or a token can't be decoded. Nothing follows then.
    pub async fn next_async(&mut self) -> Option<Result<String, GenerateError>> {
        while !self.over {
            self.heed_flag();
            let step = self.tokens.step_async().await;
            if let Some(text) = self.take(step) {
                return Some(text);
            }
        }
        None
    }

    fn take(&mut self, step: Result<Step, GenerateError>) -> Option<Result<String, GenerateError>> {
        let clock = Instant::now();
        let text = step.and_then(|step| self.text_of(&step)).transpose();
        *self.tokens.generation.detokenisation.get_or_insert_default() += clock.elapsed();
        self.over |= matches!(text, Some(Err(_)));
        text
    }

    /// Ends the generation. What was generated stays.
    pub fn cancel(&mut self) {
        self.tokens.cancel();
    }

    /// Ends the generation before the next step once this is set.
    pub(crate) fn cancel_when(&mut self, flag: Arc<AtomicBool>) {
        self.cancelled = Some(flag);
    }

    fn heed_flag(&mut self) {
        if self.cancelled.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            self.tokens.cancel();
        }
    }

    /// What was generated so far.
    pub fn generation(&self) -> &Generation {
        self.tokens.generation()
    }

    /// What was generated.
    pub fn into_generation(self) -> Generation {
        self.tokens.into_generation()
    }
}

impl Iterator for TextGenerator<'_> {
    type Item = Result<String, GenerateError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            self.heed_flag();
            let step = self.tokens.step();
            if let Some(text) = self.take(step) {
                return Some(text);
            }
        }
        None
    }
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
    let mut generator = Generator::new(model, prompt, sequence, cache, options)?;
    loop {
        match generator.step()? {
            Step::Prompt { .. } => {}
            Step::Token(token) => {
                if on_token(token, generator.logits()).is_break() {
                    generator.cancel();
                }
            }
            Step::Finished(_) => return Ok(generator.into_generation()),
        }
    }
}

/// [`generate`], with the text as a [`TextGenerator`] gives it.
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
    let generator = Generator::new(model, prompt, sequence, cache, options)?;
    let mut text = TextGenerator::new(generator, tokenizer, prompt)?;
    while let Some(piece) = text.next() {
        if on_text(&piece?).is_break() {
            text.cancel();
        }
    }
    Ok(text.into_generation())
}
