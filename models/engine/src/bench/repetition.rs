//! One repetition of a measurement: a prompt, and the tokens behind it, each step with its time.

use std::time::{Duration, Instant};

use bitnet_burn::{BitNet, KvCache, Row, SequenceId};
use bitnet_burn_backends::devices;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_manager::profile::{self, Operation, Recording, Span};
use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::Spread;
use crate::generate::{GenerateError, prefill};
use crate::report::Latency;
use crate::sampling::{Sampler, SamplingConfig};
use crate::tokenizer::{DecodeStream, Tokenizer};

/// The latency of a request, by its parts, over all repetitions. Its tokens are random, and drawing one is greedy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestLatency {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated after the first one.
    pub generated_tokens: usize,
    /// Seconds to make tokens of the prompt's text. Absent without a tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenisation_seconds: Option<Spread>,
    /// Seconds to compute the prompt.
    pub prefill_seconds: Spread,
    /// Seconds from the request to the first token: tokenisation, prefill, and drawing it.
    pub first_token_seconds: Spread,
    /// Seconds between tokens: the forward pass, drawing the token, and its text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_seconds: Option<Latency>,
    /// Seconds to draw a token.
    pub sampling_seconds: Latency,
    /// Seconds to make text of a token. Absent without a tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detokenisation_seconds: Option<Latency>,
    /// Seconds from the request to the last token.
    pub end_to_end_seconds: Spread,
}

impl RequestLatency {
    /// The latency of repetitions; `None` without a prompt.
    pub(super) fn of(requests: &[Timed], prompt_tokens: usize, generated_tokens: usize) -> Option<Self> {
        let spread = |part: &dyn Fn(&Timed) -> Option<Duration>| {
            let seconds: Vec<f64> = requests.iter().filter_map(part).map(|time| time.as_secs_f64()).collect();
            Spread::of(&seconds)
        };
        let all = |part: fn(&Timed) -> &[Duration]| -> Vec<Duration> {
            requests.iter().flat_map(part).copied().collect()
        };
        let between: Vec<Duration> = requests.iter().flat_map(Timed::between_tokens).collect();
        Some(Self {
            prompt_tokens,
            generated_tokens,
            tokenisation_seconds: spread(&|timed| timed.tokenisation),
            prefill_seconds: spread(&|timed| timed.prefill)?,
            first_token_seconds: spread(&Timed::first_token)?,
            token_seconds: Latency::of(&between),
            sampling_seconds: Latency::of(&all(|timed| &timed.sampling))?,
            detokenisation_seconds: Latency::of(&all(|timed| &timed.detokenisation)),
            end_to_end_seconds: spread(&|timed| {
                Some(timed.first_token()? + timed.between_tokens().iter().sum::<Duration>())
            })?,
        })
    }
}

/// State that repetitions share.
pub(super) struct Repetition<'a> {
    pub model: &'a BitNet,
    pub tokenizer: Option<&'a Tokenizer>,
    pub random: &'a mut SplitMix64,
    pub chunk: usize,
}

/// The times of one repetition.
#[derive(Default)]
pub(super) struct Timed {
    /// Of the prompt's text. Absent without a tokenizer, without a prompt, and for several sequences.
    pub tokenisation: Option<Duration>,
    pub prefill: Option<Duration>,
    /// Each forward pass behind the prompt, with its logits.
    pub steps: Vec<Duration>,
    /// Each token that was drawn: that of the prompt, where there is one, and one a step.
    pub sampling: Vec<Duration>,
    /// The text of each.
    pub detokenisation: Vec<Duration>,
    pub kv_cache_bytes: usize,
}

impl Timed {
    /// Tokens of the prompt a second.
    pub fn prefill_rate(&self, prompt_tokens: usize) -> Option<f64> {
        self.prefill.map(|time| prompt_tokens as f64 / time.as_secs_f64())
    }

    /// Steps a second.
    pub fn decode_rate(&self) -> Option<f64> {
        let time: Duration = self.steps.iter().sum();
        (!self.steps.is_empty()).then(|| self.steps.len() as f64 / time.as_secs_f64())
    }

    /// From the request to the first token that was drawn, if there is a prompt.
    pub fn first_token(&self) -> Option<Duration> {
        let drawn = self.sampling.first().copied().unwrap_or_default();
        Some(self.tokenisation.unwrap_or_default() + self.prefill? + drawn)
    }

    /// From each token to the next.
    fn between_tokens(&self) -> Vec<Duration> {
        let first = usize::from(self.prefill.is_some());
        let at = |times: &[Duration], i: usize| times.get(i).copied().unwrap_or_default();
        let token = |(i, step): (usize, &Duration)| {
            *step + at(&self.sampling, first + i) + at(&self.detokenisation, first + i)
        };
        self.steps.iter().enumerate().map(token).collect()
    }
}

impl Repetition<'_> {
    fn token(&mut self) -> u32 {
        self.random.below(self.model.config().vocab_size as u64) as u32
    }

    /// Computes the prompt of each sequence, and then decodes all sequences together.
    pub fn run(
        &mut self,
        mut cache: KvCache,
        sequences: usize,
        prompt: usize,
        generated: usize,
    ) -> Result<Timed, GenerateError> {
        let sequences: Vec<SequenceId> =
            (0..sequences).map(|_| cache.add_sequence(prompt + generated)).collect();
        let mut timed = Timed::default();
        let mut draw = (sequences.len() == 1).then(|| Draw::new(self.tokenizer)).transpose()?;
        let mut took = Duration::ZERO;
        for &sequence in sequences.iter().filter(|_| prompt > 0) {
            let tokens: Vec<u32> = (0..prompt).map(|_| self.token()).collect();
            if draw.is_some() {
                timed.tokenisation = self.tokenisation(&tokens);
            }
            let root = profile::span(Operation::Prefill);
            let clock = Instant::now();
            let logits = read(prefill(self.model, &tokens, sequence, &mut cache, self.chunk)?)?;
            took += clock.elapsed();
            draw.iter_mut().try_for_each(|draw| draw.token(&logits, &mut timed))?;
            drop(root);
        }
        let wanted: Vec<usize> = (0..sequences.len()).collect();
        timed.steps.reserve(generated);
        for i in 0..generated {
            let position = prompt + i;
            let row = |&sequence| Row { token: self.token(), sequence, position };
            let rows: Vec<Row> = sequences.iter().map(row).collect();
            let root = profile::span(Operation::Decode);
            let clock = Instant::now();
            let logits = read(self.model.forward(&rows, &wanted, &mut cache)?)?;
            timed.steps.push(clock.elapsed());
            draw.iter_mut().try_for_each(|draw| draw.token(&logits, &mut timed))?;
            drop(root);
        }
        timed.prefill = (prompt > 0).then_some(took);
        timed.kv_cache_bytes = cache.bytes();
        Ok(timed)
    }

    /// [`run`](Self::run) of one sequence, with the spans of its operations.
    pub fn profiled(
        &mut self,
        cache: KvCache,
        prompt: usize,
        generated: usize,
    ) -> Result<(Timed, Vec<Span>), GenerateError> {
        let recording = Recording::start();
        let timed = self.run(cache, 1, prompt, generated)?;
        Ok((timed, recording.finish()))
    }

    /// The time to make tokens of a text that the tokenizer makes of these tokens.
    fn tokenisation(&self, tokens: &[u32]) -> Option<Duration> {
        let tokenizer = self.tokenizer?;
        let text = tokenizer.decode(tokens, true).ok()?;
        let clock = Instant::now();
        std::hint::black_box(tokenizer.encode(&text, true).ok()?);
        Some(clock.elapsed())
    }
}

/// Draws tokens from logits, and makes text of them.
struct Draw<'t> {
    sampler: Sampler,
    text: Option<DecodeStream<'t>>,
}

impl<'t> Draw<'t> {
    fn new(tokenizer: Option<&'t Tokenizer>) -> Result<Self, GenerateError> {
        let text = tokenizer.map(|tokenizer| tokenizer.decode_stream(true));
        Ok(Self { sampler: Sampler::new(SamplingConfig::greedy())?, text })
    }

    fn token(&mut self, logits: &TensorData, timed: &mut Timed) -> Result<(), GenerateError> {
        let logits = logits.as_slice::<f32>();
        let logits = logits.map_err(|error| GenerateError::Device(format!("{error:?}")))?;
        let clock = Instant::now();
        let token = {
            let _span = profile::span(Operation::Sampling);
            self.sampler.sample(logits, &[], 0)?
        };
        timed.sampling.push(clock.elapsed());
        if let Some(text) = &mut self.text {
            let clock = Instant::now();
            // A model of random weights may draw what is no character.
            let _ = std::hint::black_box(text.push(token));
            timed.detokenisation.push(clock.elapsed());
        }
        Ok(())
    }
}

/// A tensor's values. Devices compute asynchronously, so this waits for them.
fn read(tensor: Tensor<2>) -> Result<TensorData, GenerateError> {
    let _span = profile::span(Operation::Logits);
    devices::read(tensor).map_err(GenerateError::Device)
}
