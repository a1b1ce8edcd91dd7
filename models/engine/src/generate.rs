//! From a prompt to tokens.

mod text;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use bitnet_burn_backends::devices;
use bitnet_burn_formats::FileError;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

pub use self::text::TextGenerator;
use crate::checkpoint::Checkpoint;
use crate::constraint::{Constrained, Constraint, ConstraintError};
use crate::load::DEFAULT_CHUNK;
use crate::sampling::{Sampler, SamplingConfig, SamplingError};
use crate::speculate::{self, Drafts, Guesses, Speculation};
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
    /// Tokens that were guessed ahead.
    pub drafts: Drafts,
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
            drafts: Drafts::default(),
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

/// Generates tokens step by step: each step is one forward pass, and the token that is drawn from its logits. (A token that
/// was [guessed](crate::speculate) right needs no pass of its own.)
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
    speculation: Option<(&'a mut Speculation, &'a mut Guesses)>,
    /// The prompt and the tokens behind it.
    history: Vec<u32>,
    /// The logits of the last forward pass: of the last token, and of each that was guessed behind it.
    logits: Vec<f32>,
    /// The rows that these logits are of.
    rows: usize,
    /// The one that the last token was drawn from.
    row: usize,
    finished: Option<Finish>,
    started: Instant,
    clock: Instant,
    /// The beginning of the last forward pass.
    pass: Instant,
    generation: Generation,
}

/// What became of a forward pass.
#[allow(clippy::large_enum_variant, reason = "it lives for one call")]
enum Pass {
    /// No token is due yet.
    Done(Step),
    /// A token is drawn from the first of these logits [rows, vocabulary].
    Logits(Tensor<2>),
    /// The last token was guessed right: the next one is drawn from the next row's logits.
    Guessed,
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
            speculation: None,
            history: prompt.to_vec(),
            logits: Vec::new(),
            rows: 1,
            row: 0,
            finished: None,
            started: now,
            clock: now,
            pass: now,
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

    /// Guesses tokens ahead. The cache must not be a sliding window, and must be able to go back.
    pub(crate) fn guessing(mut self, speculation: Option<(&'a mut Speculation, &'a mut Guesses)>) -> Self {
        self.speculation = speculation;
        if let Some((_, guesses)) = &mut self.speculation {
            guesses.forget();
        }
        self
    }

    /// Computes one chunk of the prompt, or one token.
    ///
    /// # Errors
    /// If the model or the sampler fails.
    pub fn step(&mut self) -> Result<Step, GenerateError> {
        match self.forward()? {
            Pass::Done(step) => Ok(step),
            Pass::Logits(logits) => {
                let logits = values(logits)?;
                self.take(logits)?;
                self.draw()
            }
            Pass::Guessed => self.draw(),
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
                self.take(data.try_to_vec::<f32>().map_err(|error| device(&error))?)?;
                self.draw()
            }
            Pass::Guessed => self.draw(),
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
        let prompt = self.generation.prompt_tokens;
        let first = self.generation.tokens.is_empty();
        if !first && self.generation.tokens.len() >= self.options.max_new_tokens {
            return Ok(Pass::Done(self.finish(Finish::Length)));
        }
        if self.is_guessed() {
            self.row += 1;
            return Ok(Pass::Guessed);
        }
        let done = self.cache.length(self.sequence).map_err(ForwardError::from)?;
        if !first && !self.cache.has_room(self.sequence).map_err(ForwardError::from)? {
            return Ok(Pass::Done(self.finish(Finish::Context)));
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
        if !first {
            self.guess(done)?;
        }
        let chunk = &self.history[done..end];
        let guesses = self.speculation.as_ref().map_or(&[][..], |(_, guesses)| guesses.tokens());
        let guessed = rows(guesses, self.sequence, end);
        let mut rows = rows(chunk, self.sequence, done);
        let last = rows.len() - 1;
        rows.extend(guessed);
        let wanted: Vec<usize> = (last..rows.len()).collect();
        self.pass = Instant::now();
        let logits = self.model.forward(&rows, &wanted, self.cache)?;
        if end < self.history.len() {
            return Ok(Pass::Done(Step::Prompt { done: end, all: prompt }));
        }
        self.rows = wanted.len();
        Ok(Pass::Logits(logits))
    }

    /// Guesses what follows the last token, of which `done` positions are computed.
    fn guess(&mut self, done: usize) -> Result<(), GenerateError> {
        let Some((speculation, guesses)) = &mut self.speculation else { return Ok(()) };
        let generated = self.generation.tokens.len();
        // The last token of the answer is drawn, but not computed.
        let left = self.options.max_new_tokens.saturating_sub(generated + 1);
        let answer = speculate::Answer {
            guesses,
            history: &self.history,
            generated,
            most: left.min(self.cache.capacity().saturating_sub(done + 1)),
            sampler: &self.sampler,
            stop_tokens: &self.options.stop_tokens,
        };
        speculation.guess(1, vec![answer])
    }

    /// Whether the last token was guessed, so that the next row's logits follow it.
    fn is_guessed(&self) -> bool {
        let guessed = self.speculation.as_ref().and_then(|(_, guesses)| guesses.tokens().get(self.row));
        guessed.is_some() && guessed == self.history.last()
    }

    /// Takes the logits of a pass.
    fn take(&mut self, logits: Vec<f32>) -> Result<(), GenerateError> {
        if let Some(checkpoint) = self.checkpoint {
            checkpoint.intact()?;
        }
        (self.logits, self.row) = (logits, 0);
        if let Some((speculation, _)) = &mut self.speculation
            && !self.generation.tokens.is_empty()
        {
            speculation.costs.learn(self.rows, self.pass.elapsed().as_secs_f64());
        }
        Ok(())
    }

    /// Draws a token from the logits of the present row. Guesses that it shows to be wrong are forgotten.
    fn draw(&mut self) -> Result<Step, GenerateError> {
        let step = self.draw_token()?;
        if let Some((_, guesses)) = &mut self.speculation
            && !guesses.tokens().is_empty()
        {
            let right = match step {
                Step::Token(token) => guesses.tokens().get(self.row) == Some(&token),
                _ => false,
            };
            if !right {
                let drafted = guesses.tokens().len();
                let kind = guesses.learn(self.row);
                self.generation.drafts.add(kind, drafted, self.row);
                let computed = self.history.len() - usize::from(matches!(step, Step::Token(_)));
                self.cache.truncate(self.sequence, computed).map_err(ForwardError::from)?;
            }
        }
        Ok(step)
    }

    fn draw_token(&mut self) -> Result<Step, GenerateError> {
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
        let logits = of_row(&self.logits, self.row, self.rows);
        let logits = match &mut self.constrained {
            None => Some(logits),
            Some(constrained) => constrained.mask(logits, &self.options.stop_tokens)?,
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
        of_row(&self.logits, self.row, self.rows)
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

/// One row of logits [rows, vocabulary].
fn of_row(logits: &[f32], row: usize, rows: usize) -> &[f32] {
    let vocabulary = logits.len() / rows;
    &logits[row * vocabulary..(row + 1) * vocabulary]
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
