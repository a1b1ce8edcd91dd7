//! Measures how fast a model runs, and how fast the machine's memory allows.
//!
//! Decoding one sequence reads every weight once per token, so its bound is the memory's read bandwidth
//! divided by the bytes of the weights. [`run`] measures both in turn in the same process, because shared and
//! throttled machines change their speed from minute to minute, and figures of two runs can't be compared.

mod against;
mod bytes;
mod figures;
mod profile;
mod ratio;
mod record;
mod repetition;
mod report;
mod require;
mod soak;
mod stream;

use std::time::{Duration, Instant};

use bitnet_burn::{BitNet, CacheType, ForwardError, KvCache};
use bitnet_burn_backends::manager::manager;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_manager::{ManagerError, peak_memory};
use serde::{Deserialize, Serialize};

pub use self::against::{Against, Change, Figures, Normaliser, in_turns, is_worse};
pub use self::bytes::BytesPerToken;
pub use self::figures::{Figure, Unit};
use self::profile::Profiler;
pub use self::profile::{Phase, Profile, ProfileRow};
pub use self::ratio::{Ratio, Verdict};
pub use self::record::{Build, Record, RecordError, Settings};
pub use self::repetition::RequestLatency;
use self::repetition::{Repetition, Timed};
pub use self::report::BenchReport;
pub use self::require::{Requirement, Requirements};
pub use self::soak::{Quantity, Sample, Soak, Trend, soak};
pub use self::stream::{ReadStream, Roof};
use crate::generate::GenerateError;
use crate::load::DEFAULT_CHUNK;
use crate::tokenizer::Tokenizer;

/// Why a measurement failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The options ask for nothing.
    #[error("nothing to measure: the options have no prompt tokens, generated tokens, contexts or batches")]
    Nothing,
    /// More tokens than the model has positions for.
    #[error("{what}: this takes {needed} positions, and the context has {context}")]
    Context {
        /// The measurement.
        what: String,
        /// Positions that it needs.
        needed: usize,
        /// Positions of the context.
        context: usize,
    },
    /// The model failed.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] ManagerError),
    /// The buffer that measures the bandwidth can't be allocated.
    #[error("cannot allocate the buffer that measures the read bandwidth: {0}")]
    Memory(#[from] std::io::Error),
}

/// A figure that was measured several times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The median. For an even number of samples, the mean of the middle two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// The spread of the samples; `None` without samples.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted[sorted.len() / 2];
        let lower = sorted[(sorted.len() - 1) / 2];
        Some(Self { median: f64::midpoint(lower, upper), min, max })
    }
}

/// What [`run`] measures.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Tokens of the prompt; 0 measures no prefill.
    pub prompt_tokens: usize,
    /// Tokens generated after it; 0 measures no decode.
    pub generated_tokens: usize,
    /// Number of repetitions.
    pub repetitions: usize,
    /// Further context lengths at which decode is measured, once each.
    pub contexts: Vec<usize>,
    /// Numbers of sequences that are decoded at the same time, once each. Every sequence has a prompt of its own.
    pub batches: Vec<usize>,
    /// Further lengths of the prompt at which the latency of a request is measured, once each.
    pub prompts: Vec<usize>,
    /// Whether operations are profiled, in further repetitions.
    pub profile: bool,
    /// When the process started, to measure the time to its first token.
    pub process_start: Option<Instant>,
    /// Rows of the prompt that are computed at once.
    pub chunk: usize,
    /// Positions of the KV cache.
    pub context: usize,
    /// Type of the KV cache.
    pub kv_cache: CacheType,
    /// Whether every sequence takes the memory of the whole context at the start.
    pub preallocate: bool,
    /// Seed of the random tokens.
    pub seed: u64,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self {
            prompt_tokens: 128,
            generated_tokens: 64,
            repetitions: 5,
            contexts: Vec::new(),
            batches: Vec::new(),
            prompts: Vec::new(),
            profile: false,
            process_start: None,
            chunk: DEFAULT_CHUNK,
            context: usize::MAX,
            kv_cache: CacheType::F32,
            preallocate: false,
            seed: 0,
        }
    }
}

/// Decode at one context length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodeAt {
    /// Positions in the KV cache before the first token.
    pub context: usize,
    /// Tokens generated after them.
    pub generated_tokens: usize,
    /// Tokens a second.
    pub decode_tokens_per_s: f64,
    /// Seconds per token.
    pub token_seconds: Spread,
}

/// Decode of several sequences at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodeBatch {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens generated for each.
    pub generated_tokens: usize,
    /// Tokens a second of all sequences together.
    pub decode_tokens_per_s: f64,
    /// Seconds per step. A step makes one token for every sequence.
    pub step_seconds: Spread,
}

/// A repetition, and the machine's speed around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Tokens of the prompt a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_s: Option<f64>,
    /// Generated tokens a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<f64>,
    /// Read bandwidth before and after it (their mean), in 10^9 bytes a second.
    pub read_gb_per_s: f64,
    /// int8 multiply-adds on registers before and after it (their mean), in 10^9 a second. Absent where the built-in
    /// kernels use no instruction for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multiply_adds_g_per_s: Option<f64>,
}

/// The results of [`run`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchResult {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated after it.
    pub generated_tokens: usize,
    /// Number of repetitions.
    pub repetitions: usize,
    /// Rows of the prompt that were computed at once.
    pub chunk: usize,
    /// Tokens of the prompt a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_s: Option<Spread>,
    /// Generated tokens a second: forward pass and logits, without sampling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<Spread>,
    /// Decode at further context lengths.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decode_by_context: Vec<DecodeAt>,
    /// Decode of several sequences at the same time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decode_by_batch: Vec<DecodeBatch>,
    /// The latency of a request with this prompt, by its parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<RequestLatency>,
    /// The latency of requests with prompts of other lengths.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latency_by_prompt: Vec<RequestLatency>,
    /// Seconds from the start of the process to the first token of the warm-up: with loading, and with cold caches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_to_first_token_seconds: Option<f64>,
    /// Each repetition, with what the machine reached around it.
    #[serde(default)]
    pub rounds: Vec<Round>,
    /// Where the time goes, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
    /// Bandwidth of a read-only stream on the same threads, between the repetitions, in 10^9 bytes a second.
    pub read_bandwidth_gb_per_s: Spread,
    /// Size of the stream's buffer in bytes.
    pub read_buffer_bytes: usize,
    /// Bytes that a decode step reads, without the KV cache.
    pub bytes_per_token: u64,
    /// These bytes by part.
    pub bytes_per_token_parts: BytesPerToken,
    /// Decode speed as a fraction of the bandwidth's limit: median tokens/s times bytes per token over the median
    /// bandwidth. Absent if other devices than the host compute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_fraction_of_bandwidth: Option<f64>,
    /// Bytes of the KV cache of a repetition.
    pub kv_cache_bytes: usize,
    /// Peak of the process's resident memory, with mapped files and without the buffer of the bandwidth: it is
    /// read after the warm-up, all contexts and all batches, before that buffer is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
}

/// Receives the progress of [`run`]: the finished steps, and the number of all steps.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Measures a model. Every repetition is a new sequence of random tokens. A warm-up repetition is not counted. With a
/// tokenizer, the latency of a request has the times of its text, too.
///
/// # Errors
/// If the options ask for nothing, or for more than the context has, or if the model fails.
pub fn run(
    model: &BitNet,
    tokenizer: Option<&Tokenizer>,
    options: &BenchOptions,
    progress: Progress<'_>,
) -> Result<BenchResult, BenchError> {
    let BenchOptions { prompt_tokens, generated_tokens, .. } = *options;
    let repetitions = options.repetitions.max(1);
    let context = options.context.min(model.config().context_length);
    options.check(context)?;
    let others = options.contexts.len() + options.batches.len() + options.prompts.len();
    let steps = repetitions + 1 + others;
    let mut random = SplitMix64::new(options.seed);
    let cache = || -> Result<KvCache, GenerateError> {
        let cache = model.cache(context, options.kv_cache).map_err(ForwardError::from)?;
        Ok(if options.preallocate { cache.preallocated() } else { cache })
    };
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, steps);
    };

    let mut repetition = Repetition { model, tokenizer, random: &mut random, chunk: options.chunk };
    let warm_up_began = Instant::now();
    let warm_up = repetition.run(cache()?, 1, prompt_tokens, generated_tokens)?;
    let kv_cache_bytes = warm_up.kv_cache_bytes;
    let start_to_first_token_seconds = (options.process_start.zip(warm_up.first_token()))
        .map(|(start, first)| (warm_up_began.saturating_duration_since(start) + first).as_secs_f64());
    step();
    let mut decode_by_context = Vec::new();
    for &at in &options.contexts {
        let timed = repetition.run(cache()?, 1, at, generated_tokens)?;
        let seconds: Vec<f64> = timed.steps.iter().map(Duration::as_secs_f64).collect();
        if let (Some(token_seconds), Some(rate)) = (Spread::of(&seconds), timed.decode_rate()) {
            decode_by_context.push(DecodeAt {
                context: at,
                generated_tokens,
                decode_tokens_per_s: rate,
                token_seconds,
            });
        }
        step();
    }
    let mut decode_by_batch = Vec::new();
    for &sequences in &options.batches {
        let timed = repetition.run(cache()?, sequences, prompt_tokens, generated_tokens)?;
        let seconds: Vec<f64> = timed.steps.iter().map(Duration::as_secs_f64).collect();
        if let (Some(step_seconds), Some(rate)) = (Spread::of(&seconds), timed.decode_rate()) {
            decode_by_batch.push(DecodeBatch {
                sequences,
                generated_tokens,
                decode_tokens_per_s: rate * sequences as f64,
                step_seconds,
            });
        }
        step();
    }
    let mut latency_by_prompt = Vec::new();
    for &prompt in &options.prompts {
        let timed = repetition.run(cache()?, 1, prompt, generated_tokens)?;
        latency_by_prompt.extend(RequestLatency::of(&[timed], prompt, generated_tokens));
        step();
    }
    let peak_rss_bytes = peak_memory();

    let pool = manager().pool();
    let stream = ReadStream::new(ReadStream::default_bytes(), pool)?;
    let machine = || (stream.quarter_gb_per_s(pool), stream::multiply_adds_g_per_s(pool));
    let (mut rounds, mut requests, mut bandwidths) = (Vec::new(), Vec::new(), Vec::new());
    let mut profiler = options.profile.then(Profiler::default);
    let mut before = machine();
    bandwidths.push(before.0);
    for _ in 0..repetitions {
        let timed = match prompt_tokens + generated_tokens {
            0 => Timed::default(),
            _ => repetition.run(cache()?, 1, prompt_tokens, generated_tokens)?,
        };
        if let Some(profiler) = &mut profiler {
            let (timed, spans) = repetition.profiled(cache()?, prompt_tokens, generated_tokens)?;
            profiler.push(&timed, spans);
        }
        let after = machine();
        rounds.push(Round {
            prefill_tokens_per_s: timed.prefill_rate(prompt_tokens),
            decode_tokens_per_s: timed.decode_rate(),
            read_gb_per_s: f64::midpoint(before.0, after.0),
            multiply_adds_g_per_s: before.1.zip(after.1).map(|(before, after)| f64::midpoint(before, after)),
        });
        requests.push(timed);
        bandwidths.push(after.0);
        before = after;
        step();
    }

    let parts = BytesPerToken::of(model);
    let of_rounds = |figure: fn(&Round) -> Option<f64>| {
        let samples: Vec<f64> = rounds.iter().filter_map(figure).collect();
        Spread::of(&samples)
    };
    let prefill_tokens_per_s = of_rounds(|round| round.prefill_tokens_per_s);
    let decode_tokens_per_s = of_rounds(|round| round.decode_tokens_per_s);
    let bandwidth = Spread::of(&bandwidths).expect("measured once at least");
    Ok(BenchResult {
        prompt_tokens,
        generated_tokens,
        repetitions,
        chunk: options.chunk,
        prefill_tokens_per_s,
        decode_tokens_per_s,
        decode_by_context,
        decode_by_batch,
        profile: profiler.map(|profiler| profiler.finish(&requests, prompt_tokens)),
        latency: RequestLatency::of(&requests, prompt_tokens, generated_tokens),
        latency_by_prompt,
        start_to_first_token_seconds,
        rounds,
        read_bandwidth_gb_per_s: bandwidth,
        read_buffer_bytes: stream.bytes(),
        bytes_per_token: parts.total(),
        bytes_per_token_parts: parts,
        decode_fraction_of_bandwidth: decode_tokens_per_s
            .filter(|_| model.is_host())
            .map(|decode| decode.median * parts.total() as f64 / (bandwidth.median * 1e9)),
        kv_cache_bytes,
        peak_rss_bytes,
    })
}

impl BenchOptions {
    /// That there is something to measure, and that it fits a context.
    fn check(&self, context: usize) -> Result<(), BenchError> {
        let Self { prompt_tokens, generated_tokens, .. } = *self;
        let others = self.contexts.len() + self.batches.len() + self.prompts.len();
        if prompt_tokens == 0 && generated_tokens == 0 && others == 0 {
            return Err(BenchError::Nothing);
        }
        let fits = |what: String, needed: usize| {
            if needed <= context { Ok(()) } else { Err(BenchError::Context { what, needed, context }) }
        };
        let prompt = |prompt: usize| {
            let what = format!("a prompt of {prompt} and {generated_tokens} generated tokens");
            fits(what, prompt.saturating_add(generated_tokens))
        };
        prompt(prompt_tokens)?;
        for &length in &self.prompts {
            prompt(length)?;
        }
        for &at in &self.contexts {
            let what = format!("{generated_tokens} tokens generated at a context of {at}");
            fits(what, at.saturating_add(generated_tokens))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0]), Some(Spread { median: 3.0, min: 3.0, max: 3.0 }));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 8.0]), Some(Spread { median: 3.0, min: 1.0, max: 8.0 }));
    }
}
