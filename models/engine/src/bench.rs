//! Measures how fast a model runs, and how fast the machine's memory allows.
//!
//! Decoding one sequence reads every weight once per token, so its bound is the memory's read bandwidth
//! divided by the bytes of the weights. [`run`] measures both in turn in the same process, because shared and
//! throttled machines change their speed from minute to minute, and figures of two runs can't be compared.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bitnet_burn_backends::manager::manager;
use bitnet_burn_backends::{devices, peak};
use bitnet_burn_manager::cpu;
use bitnet_burn_manager::pool::Pool;
use bitnet_burn_manager::{ManagerError, peak_memory};
use burn::tensor::Tensor;
use memmap2::MmapMut;
use serde::Serialize;

use crate::generate::{GenerateError, prefill};
use crate::load::DEFAULT_CHUNK;
use bitnet_burn::{BitLinear, Norm};
use bitnet_burn::{BitNet, ForwardError, Row};
use bitnet_burn::{CacheType, KvCache, SequenceId};
use bitnet_burn_formats::random::SplitMix64;

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
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
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
            chunk: DEFAULT_CHUNK,
            context: usize::MAX,
            kv_cache: CacheType::F32,
            preallocate: false,
            seed: 0,
        }
    }
}

/// Decode at one context length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
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

/// Bytes that a decode step reads, by part, without the KV cache, which grows with the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BytesPerToken {
    /// Projections of all layers with their scales, in the layout that the chosen kernels read; of experts, those that compute
    /// a token.
    pub projections: u64,
    /// The output head, likewise. In tied models this is the embedding.
    pub head: u64,
    /// The weights of all norms, of routers to experts, and of the decays and write strengths of gated DeltaNets.
    pub norms: u64,
    /// One row of the embedding, if it is not the head.
    pub embedding_row: u64,
}

impl BytesPerToken {
    /// The bytes of a loaded model.
    pub fn of(model: &BitNet) -> Self {
        let config = model.config();
        let projections = model.blocks.iter().flat_map(|block| block.projections());
        let projections = projections.filter(|(which, _)| which.is_read(config));
        let projections = projections.map(|(_, layer)| BitLinear::weight_bytes(layer)).sum();
        let matrices = model.blocks.iter().flat_map(|block| block.float_matrices());
        let matrices = matrices.filter_map(|(_, matrix)| matrix.args().bytes()).sum::<usize>() as u64;
        let embedding = model.embedding.args();
        let embedding_row = embedding.format.row_bytes(embedding.k).unwrap_or(0) as u64;
        let (head, embedding_row) = match &model.output {
            None => (embedding_row * embedding.n as u64, 0),
            Some(output) => (output.weight_bytes(), embedding_row),
        };
        let of_layer = |layer| Norm::of_layer(layer, config).map(|norm| norm.len(config)).sum::<usize>();
        let norms = (0..config.n_layers).map(of_layer).sum::<usize>() + Norm::Output.len(config);
        Self { projections, head, norms: norms as u64 * 4 + matrices, embedding_row }
    }

    /// The sum of all parts.
    pub fn total(&self) -> u64 {
        self.projections + self.head + self.norms + self.embedding_row
    }
}

/// The results of [`run`].
#[derive(Clone, Debug, PartialEq, Serialize)]
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_s: Option<Spread>,
    /// Generated tokens a second: forward pass and logits, without sampling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<Spread>,
    /// Decode at further context lengths.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub decode_by_context: Vec<DecodeAt>,
    /// Decode of several sequences at the same time.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub decode_by_batch: Vec<DecodeBatch>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_fraction_of_bandwidth: Option<f64>,
    /// Bytes of the KV cache of a repetition.
    pub kv_cache_bytes: usize,
    /// Peak of the process's resident memory, with mapped files and without the buffer of the bandwidth: it is
    /// read after the warm-up, all contexts and all batches, before that buffer is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
}

/// Receives the progress of [`run`]: the finished steps, and the number of all steps.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Measures a model. Every repetition is a new sequence of random tokens. A warm-up repetition is not counted.
///
/// # Errors
/// If the options ask for nothing, or for more than the context has, or if the model fails.
pub fn run(
    model: &BitNet,
    options: &BenchOptions,
    progress: Progress<'_>,
) -> Result<BenchResult, BenchError> {
    let BenchOptions { prompt_tokens, generated_tokens, .. } = *options;
    let repetitions = options.repetitions.max(1);
    let nothing_else = options.contexts.is_empty() && options.batches.is_empty();
    if prompt_tokens == 0 && generated_tokens == 0 && nothing_else {
        return Err(BenchError::Nothing);
    }
    let context = options.context.min(model.config().context_length);
    let fits = |what: String, needed: usize| {
        if needed <= context { Ok(()) } else { Err(BenchError::Context { what, needed, context }) }
    };
    let needed = prompt_tokens.saturating_add(generated_tokens);
    fits(format!("a prompt of {prompt_tokens} and {generated_tokens} generated tokens"), needed)?;
    for &at in &options.contexts {
        let what = format!("{generated_tokens} tokens generated at a context of {at}");
        fits(what, at.saturating_add(generated_tokens))?;
    }
    let steps = repetitions + 1 + options.contexts.len() + options.batches.len();
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

    let mut repetition = Repetition { model, random: &mut random, chunk: options.chunk };
    let warm_up = repetition.run(cache()?, 1, prompt_tokens, generated_tokens)?;
    let kv_cache_bytes = warm_up.kv_cache_bytes;
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
    let peak_rss_bytes = peak_memory();

    let pool = manager().pool();
    let stream = ReadStream::new(ReadStream::default_bytes(), pool)?;
    let (mut prefills, mut decodes, mut bandwidths) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..repetitions {
        bandwidths.push(stream.gb_per_s(pool));
        if needed > 0 {
            let timed = repetition.run(cache()?, 1, prompt_tokens, generated_tokens)?;
            prefills.extend(timed.prefill.map(|time| prompt_tokens as f64 / time.as_secs_f64()));
            decodes.extend(timed.decode_rate());
        }
        step();
    }
    bandwidths.push(stream.gb_per_s(pool));

    let parts = BytesPerToken::of(model);
    let decode_tokens_per_s = Spread::of(&decodes);
    let bandwidth = Spread::of(&bandwidths).expect("measured once at least");
    Ok(BenchResult {
        prompt_tokens,
        generated_tokens,
        repetitions,
        chunk: options.chunk,
        prefill_tokens_per_s: Spread::of(&prefills),
        decode_tokens_per_s,
        decode_by_context,
        decode_by_batch,
        read_bandwidth_gb_per_s: bandwidth,
        read_buffer_bytes: stream.map.len(),
        bytes_per_token: parts.total(),
        bytes_per_token_parts: parts,
        decode_fraction_of_bandwidth: decode_tokens_per_s
            .filter(|_| model.is_host())
            .map(|decode| decode.median * parts.total() as f64 / (bandwidth.median * 1e9)),
        kv_cache_bytes,
        peak_rss_bytes,
    })
}

/// State that repetitions share.
struct Repetition<'a> {
    model: &'a BitNet,
    random: &'a mut SplitMix64,
    chunk: usize,
}

/// The times of one repetition.
struct Timed {
    prefill: Option<Duration>,
    steps: Vec<Duration>,
    kv_cache_bytes: usize,
}

impl Timed {
    /// Steps a second.
    fn decode_rate(&self) -> Option<f64> {
        let time: Duration = self.steps.iter().sum();
        (!self.steps.is_empty()).then(|| self.steps.len() as f64 / time.as_secs_f64())
    }
}

impl Repetition<'_> {
    fn token(&mut self) -> u32 {
        self.random.below(self.model.config().vocab_size as u64) as u32
    }

    /// Computes the prompt of each sequence, and then decodes all sequences together.
    fn run(
        &mut self,
        mut cache: KvCache,
        sequences: usize,
        prompt: usize,
        generated: usize,
    ) -> Result<Timed, GenerateError> {
        let sequences: Vec<SequenceId> =
            (0..sequences).map(|_| cache.add_sequence(prompt + generated)).collect();
        let mut took = Duration::ZERO;
        for &sequence in sequences.iter().filter(|_| prompt > 0) {
            let tokens: Vec<u32> = (0..prompt).map(|_| self.token()).collect();
            let clock = Instant::now();
            wait(prefill(self.model, &tokens, sequence, &mut cache, self.chunk)?)?;
            took += clock.elapsed();
        }
        let wanted: Vec<usize> = (0..sequences.len()).collect();
        let mut steps = Vec::with_capacity(generated);
        for i in 0..generated {
            let position = prompt + i;
            let row = |&sequence| Row { token: self.token(), sequence, position };
            let rows: Vec<Row> = sequences.iter().map(row).collect();
            let clock = Instant::now();
            wait(self.model.forward(&rows, &wanted, &mut cache)?)?;
            steps.push(clock.elapsed());
        }
        let prefill = (prompt > 0).then_some(took);
        Ok(Timed { prefill, steps, kv_cache_bytes: cache.bytes() })
    }
}

/// Waits for a tensor's values, because devices compute asynchronously.
fn wait(tensor: Tensor<2>) -> Result<(), GenerateError> {
    devices::read(tensor).map_err(GenerateError::Device)?;
    Ok(())
}

/// A buffer in huge pages, to measure the bandwidth of reading it.
#[derive(Debug)]
pub struct ReadStream {
    map: MmapMut,
}

/// Bytes per task: large enough for the prefetcher, small enough to spread over the threads.
const PIECE: usize = 2 << 20;

impl ReadStream {
    /// Eight times the last-level cache, between 256 MiB and 4 GiB; 512 MiB if the system does not report the
    /// cache's size.
    pub fn default_bytes() -> usize {
        match cpu::last_level_cache() {
            Some(cache) => cache.saturating_mul(8).clamp(256 << 20, 4 << 30),
            None => 512 << 20,
        }
    }

    /// Allocates a buffer of `bytes` and writes it once, so that the system allocates the pages now.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(bytes: usize, pool: &Pool) -> std::io::Result<Self> {
        let mut map = MmapMut::map_anon(bytes.max(PIECE).next_multiple_of(PIECE))?;
        // Only advice: without huge pages, this measures the bandwidth with 4 KiB pages.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let pieces = map.len() / PIECE;
        let parts = Mutex::new(map.chunks_mut(PIECE));
        pool.run(pieces, &|_| {
            let piece = parts.lock().unwrap_or_else(PoisonError::into_inner).next();
            if let Some(piece) = piece {
                piece.fill(0x5a);
            }
        });
        Ok(Self { map })
    }

    fn pieces(&self) -> usize {
        self.map.len() / PIECE
    }

    fn read(&self, piece: usize) {
        std::hint::black_box(peak::read(&self.map[piece * PIECE..(piece + 1) * PIECE]));
    }

    /// Reads the buffer once on the pool's threads. Returns 10^9 bytes a second.
    pub fn gb_per_s(&self, pool: &Pool) -> f64 {
        let clock = Instant::now();
        pool.run(self.pieces(), &|i| self.read(i));
        self.map.len() as f64 / clock.elapsed().as_secs_f64() / 1e9
    }
}

/// The limits of this machine, with the threads of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Roof {
    /// Bandwidth of a read-only stream, in 10^9 bytes a second.
    pub read_gb_per_s: f64,
    /// int8 multiply-adds on registers alone, with the instruction that the built-in kernels use, in 10^9 a
    /// second. Absent if they use none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multiply_adds_g_per_s: Option<f64>,
}

impl Roof {
    /// Measures both limits. The stream reads a buffer of `bytes`, which should be as large as the data of the
    /// computation that is compared with it.
    ///
    /// # Errors
    /// If there is not enough memory for the buffer.
    pub fn measure(pool: &Pool, bytes: usize) -> std::io::Result<Self> {
        let stream = ReadStream::new(bytes, pool)?;
        let read = undisturbed(pool, stream.pieces(), &|i| stream.read(i));
        let multiply = |_| peak::multiply_adds(ROUNDS);
        let multiply_adds = peak::multiply_adds(1).and_then(|_| multiply(0));
        Ok(Self {
            read_gb_per_s: PIECE as f64 * read,
            multiply_adds_g_per_s: multiply_adds.map(|products| {
                products as f64
                    * undisturbed(pool, pool.threads() * 32, &|i| {
                        std::hint::black_box(multiply(i));
                    })
            }),
        })
    }
}

/// Number of rounds of products, which take 20 to 200 microseconds together.
const ROUNDS: u32 = 10_000;

/// Tasks per nanosecond of the pool, computed from the fastest tenth of them. Tasks are much shorter than the
/// scheduler's time slices, so the fastest ones were not interrupted by other programs.
fn undisturbed(pool: &Pool, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> f64 {
    const PASSES: usize = 5;
    let times = Mutex::new(Vec::with_capacity(PASSES * tasks));
    for _ in 0..PASSES {
        pool.run(tasks, &|i| {
            let clock = Instant::now();
            task(i);
            times.lock().unwrap_or_else(PoisonError::into_inner).push(clock.elapsed());
        });
    }
    let mut times = times.into_inner().unwrap_or_else(PoisonError::into_inner);
    times.sort_unstable();
    let time = times.get(times.len() / 10).map_or(1, |time| time.as_nanos().max(1));
    pool.threads() as f64 / time as f64
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

    #[test]
    fn the_stream_reads_what_it_says() {
        let pool = Pool::new(2).unwrap();
        let stream = ReadStream::new(3 * PIECE - 5, &pool).unwrap();
        assert_eq!(stream.map.len(), 3 * PIECE);
        let word = u64::from_ne_bytes([0x5a; 8]);
        assert_eq!(peak::read(&stream.map), word.wrapping_mul((stream.map.len() / 8) as u64));
        assert!(stream.gb_per_s(&pool) > 0.0);
    }
}
