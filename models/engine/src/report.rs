//! Reports of runs: one type that prints as a table for people, serialises to JSON, and can be used from Rust.
//!
//! Every value was measured or counted. A value that was not measured is absent.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bitnet_burn_backends::devices::Usage;
use bitnet_burn_manager::{
    Doubt, Event, Fallback, KernelReport, ManagerReport, REFERENCE, Strict, peak_memory,
};
use serde::{Deserialize, Serialize};

use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::generate::{Finish, Generation};
use crate::plan::{DeviceMemory, Placement, PredictionOutcome};
use crate::speculate::{DraftCounts, Drafts};
use crate::text::{count, human_bytes, human_seconds, line};

/// The model that ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSummary {
    /// The file or directory.
    pub path: PathBuf,
    /// The architecture that the file names.
    pub architecture: String,
    /// The model's name, if the file has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl ModelSummary {
    /// The summary of an open checkpoint.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let config = checkpoint.config();
        Self {
            path: checkpoint.path().to_owned(),
            architecture: config.architecture.clone(),
            name: config.name.clone(),
        }
    }
}

/// Seconds per token, as percentiles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// The median.
    pub p50: f64,
    /// The 95th percentile.
    pub p95: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Latency {
    /// The percentiles by nearest rank; `None` without steps.
    pub fn of(steps: &[Duration]) -> Option<Self> {
        let mut sorted = steps.to_vec();
        sorted.sort_unstable();
        let rank = |percent: usize| {
            let index = (sorted.len() * percent).div_ceil(100).max(1) - 1;
            sorted.get(index).map(Duration::as_secs_f64)
        };
        Some(Self { p50: rank(50)?, p95: rank(95)?, p99: rank(99)?, max: rank(100)? })
    }
}

/// `median 12.1 ms, 95 % below 13.0 ms, 99 % below 15.2 ms, at most 20.1 ms`.
impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p95, p99, max] = [self.p50, self.p95, self.p99, self.max].map(human_seconds);
        write!(f, "median {p50}, 95 % below {p95}, 99 % below {p99}, at most {max}")
    }
}

/// Where the measurements of kernels come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuning {
    /// Number of signatures (shape, rows, threads) that were measured in this run.
    pub measured: u64,
    /// Number of signatures whose measurements came from the cache file.
    pub from_cache: u64,
    /// Seconds that looking up and measuring took while the model was loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The cache file, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_file: Option<PathBuf>,
    /// The problem with the cache file, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_problem: Option<String>,
}

/// Memory that a GPU's runtime took from the device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceUsage {
    /// `wgpu:0` ...
    pub device: String,
    /// The bytes.
    #[serde(flatten)]
    pub usage: Usage,
    /// Fraction of the taken memory that no tensor uses, 0 to 1.
    pub fragmentation: f64,
}

impl DeviceUsage {
    /// The usage of a device.
    pub fn new(device: &str, usage: Usage) -> Self {
        Self { device: device.to_owned(), usage, fragmentation: usage.fragmentation() }
    }
}

/// A LoRA adapter that was added to a model's projections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterSummary {
    /// Its directory.
    pub path: PathBuf,
    /// SHA-256 of its matrices' file.
    pub sha256: String,
    /// Projections that it adds to.
    pub projections: usize,
    /// Their ranks: one, or the least and the largest.
    pub ranks: Vec<usize>,
}

impl AdapterSummary {
    /// What there is to say of an adapter.
    pub fn of(adapter: &Adapter) -> Self {
        let mut ranks: Vec<usize> = adapter.projections().iter().map(|of| of.values.rank).collect();
        ranks.sort_unstable();
        let mut ranks = vec![ranks.first().copied(), ranks.last().copied()];
        ranks.dedup();
        Self {
            path: adapter.path().to_owned(),
            sha256: adapter.sha256().to_owned(),
            projections: adapter.projections().len(),
            ranks: ranks.into_iter().flatten().collect(),
        }
    }
}

impl fmt::Display for AdapterSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks: Vec<_> = self.ranks.iter().map(usize::to_string).collect();
        write!(
            f,
            "{}, rank {} on {}, sha256 {}",
            self.path.display(),
            ranks.join(" to "),
            count(self.projections as u64, "projection"),
            self.sha256
        )
    }
}

/// Which devices and kernels computed, and what replaced them if they failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Execution {
    /// `flex`, `ndarray`, `wgpu` ...; several devices with their numbers of layers: `wgpu:0=12,flex=18`.
    pub device: String,
    /// Which layers ran on which device, if there were several devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// Why the devices differ from the requested ones, if they do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub placement_notes: Vec<String>,
    /// Memory of each device by purpose, computed from the shapes. Weights that kernels read directly from the mapped file
    /// are in the page cache.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub memory: Vec<DeviceMemory>,
    /// Memory that the runtimes of GPUs had taken at the end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_usage: Vec<DeviceUsage>,
    /// Measured speed compared with the prediction, if the machine was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<PredictionOutcome>,
    /// How the output projection was computed, if it was: `file (Q6_K, f32 activations)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lm_head: Option<String>,
    /// How the activations of ternary projections were quantised: `int8 by rows`, `int8 by groups of 32`, `f32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<String>,
    /// Projections that were computed with f32 activations: those that are not ternary. Their number
    /// by format, `196 x Q8_0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense_projections: Option<String>,
    /// The adapter that was added to the projections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterSummary>,
    /// Number of matrices that were mapped from the file of packed weights.
    pub prepacked: usize,
    /// Number of threads that ran the kernels.
    pub threads: usize,
    /// Whether each thread was pinned to a core of its own.
    pub pinned: bool,
    /// The checks of strict mode that were on.
    pub strict: Strict,
    /// Kernels that computed, with their numbers of calls.
    pub kernels: Vec<KernelReport>,
    /// Number of ternary matmuls that the reference computed.
    pub reference_calls: u64,
    /// Kernels that failed, and the kernels that took over.
    pub fallbacks: Vec<Fallback>,
    /// Other events of kernels: demotions, races, quarantine, short memory ...
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<Event>,
    /// Results of plugins that were found wrong later, and that nothing had compared: any of them may be wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub doubts: Vec<Doubt>,
    /// Seed of the places where results of plugins were compared, if plugins computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comparison_seed: Option<u64>,
    /// Where the measurements that chose the kernels come from.
    pub tuning: Tuning,
    /// Refused plugins and kernels of plugins, with the reasons.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused_plugins: Vec<String>,
}

impl Execution {
    /// Everything that happened between two reports of a manager.
    pub fn between(device: &str, before: &ManagerReport, after: &ManagerReport) -> Self {
        let since = |fallback: &Fallback| {
            let earlier = before.fallbacks.iter().find(|f| {
                (&f.kernel, &f.replacement, f.shape)
                    == (&fallback.kernel, &fallback.replacement, fallback.shape)
            });
            let count = fallback.count.saturating_sub(earlier.map_or(0, |f| f.count));
            (count > 0).then(|| Fallback { count, ..fallback.clone() })
        };
        let kernels = after.used_since(before);
        let plugins = kernels.iter().any(|kernel| kernel.sha256.is_some());
        Self {
            device: device.to_owned(),
            placement: None,
            placement_notes: Vec::new(),
            memory: Vec::new(),
            device_usage: Vec::new(),
            prediction: None,
            lm_head: None,
            activations: None,
            dense_projections: None,
            adapter: None,
            prepacked: 0,
            threads: after.threads,
            pinned: after.pinned,
            strict: after.strict,
            kernels,
            reference_calls: after.reference_calls - before.reference_calls,
            fallbacks: after.fallbacks.iter().filter_map(since).collect(),
            events: after.events_since(before),
            doubts: after.doubts_since(before),
            comparison_seed: plugins.then_some(after.seed),
            tuning: Tuning {
                measured: after.tuned - before.tuned,
                from_cache: after.cached - before.cached,
                seconds: None,
                cache_file: after.cache_file.clone(),
                cache_problem: after.cache_problem.clone(),
            },
            refused_plugins: Vec::new(),
        }
    }
}

/// The version of the reports of `run` and `bench`. It changes when a field that was there gets another meaning or goes away;
/// fields may be added.
pub const SCHEMA: u32 = 1;

/// The report of a generation. It reads back from its JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunReport {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The model.
    pub model: ModelSummary,
    /// Number of tokens of the prompt.
    pub prompt_tokens: usize,
    /// Number of generated tokens.
    pub generated_tokens: usize,
    /// Why it ended.
    pub finish: Finish,
    /// The seed of the sampler, if sampling was random.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Seconds from opening the files until the model was ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_seconds: Option<f64>,
    /// Seconds for the prompt.
    pub prefill_seconds: f64,
    /// Tokens of the prompt a second.
    pub prefill_tokens_per_s: f64,
    /// Seconds from the start of the prompt to the first new token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_seconds: Option<f64>,
    /// Seconds from the start of the process to the first new token, with loading. Absent for a process that does more than
    /// that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_to_first_token_seconds: Option<f64>,
    /// Seconds to make tokens of the prompt's text, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenisation_seconds: Option<f64>,
    /// Tokens a second after the first one, which belongs to the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<f64>,
    /// Seconds per token after the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_seconds: Option<Latency>,
    /// Tokens that were guessed ahead, if any were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drafts: Option<Drafts>,
    /// Seconds to draw each token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_seconds: Option<Latency>,
    /// Seconds to make text of all tokens, if text was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detokenisation_seconds: Option<f64>,
    /// Seconds from the start of the prompt to the end of the last token, with the caller's time between tokens, and with
    /// tokenisation where the report has it.
    pub end_to_end_seconds: f64,
    /// Bytes of the KV cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache_bytes: Option<usize>,
    /// Peak of the process's resident memory, with mapped files; absent if the system does not report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// Devices and kernels.
    #[serde(flatten)]
    pub execution: Execution,
}

impl RunReport {
    /// The report of a generation that has just ended.
    pub fn new(model: ModelSummary, generation: &Generation, execution: Execution) -> Self {
        let decode: Duration = generation.steps.iter().sum();
        let prefill_seconds = generation.prefill.as_secs_f64();
        Self {
            schema: SCHEMA,
            model,
            prompt_tokens: generation.prompt_tokens,
            generated_tokens: generation.tokens.len(),
            finish: generation.finish,
            seed: None,
            load_seconds: None,
            prefill_seconds,
            prefill_tokens_per_s: generation.prompt_tokens as f64 / prefill_seconds,
            first_token_seconds: generation.first_token.map(|d| d.as_secs_f64()),
            start_to_first_token_seconds: None,
            tokenisation_seconds: None,
            decode_tokens_per_s: (!generation.steps.is_empty())
                .then(|| generation.steps.len() as f64 / decode.as_secs_f64()),
            token_seconds: Latency::of(&generation.steps),
            drafts: Some(generation.drafts).filter(|drafts| drafts.total().drafted > 0),
            sampling_seconds: Latency::of(&generation.sampling),
            detokenisation_seconds: generation.detokenisation.map(|d| d.as_secs_f64()),
            end_to_end_seconds: generation.end_to_end.as_secs_f64(),
            kv_cache_bytes: None,
            peak_rss_bytes: peak_memory(),
            execution,
        }
    }
}

fn file(path: &Path) -> String {
    path.display().to_string()
}

impl fmt::Display for Tuning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = |count_of: u64| count(count_of, "signature");
        match (self.measured, self.from_cache) {
            (0, 0) => write!(f, "nothing to measure")?,
            (0, cached) => write!(f, "measured nothing; {} from the cache", n(cached))?,
            (measured, 0) => write!(f, "{} measured", n(measured))?,
            (measured, cached) => write!(f, "{} measured, {cached} from the cache", n(measured))?,
        }
        if let Some(seconds) = self.seconds.filter(|_| self.measured > 0) {
            write!(f, " in {}", human_seconds(seconds))?;
        }
        if let Some(path) = &self.cache_file {
            write!(f, " ({})", file(path))?;
        }
        match &self.cache_problem {
            Some(problem) => write!(f, "; the cache file {problem}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let strict = match self.strict.any() {
            true => format!(", strict mode ({})", self.strict),
            false => String::new(),
        };
        let threads = count(self.threads as u64, "thread");
        let pinned = if self.pinned { ", pinned" } else { "" };
        line(f, "device", format_args!("{}, {threads}{pinned}{strict}", self.device))?;
        if let Some(placement) = &self.placement {
            line(f, "placement", placement)?;
        }
        for note in &self.placement_notes {
            line(f, "", note)?;
        }
        let mut label = "memory";
        for memory in &self.memory {
            line(f, label, memory)?;
            label = "";
        }
        for DeviceUsage { device, usage, fragmentation } in &self.device_usage {
            let [used, reserved] = [usage.in_use_bytes, usage.reserved_bytes].map(human_bytes);
            let free = fragmentation * 100.0;
            let usage = format_args!("{device}: {reserved} taken, {used} in use ({free:.0} % free in pools)");
            line(f, label, usage)?;
            label = "";
        }
        if let Some(prediction) = self.prediction.filter(|p| p.decode.is_some() || p.prefill.is_some()) {
            line(f, "predicted", prediction)?;
        }
        let mut label = "kernels";
        if self.kernels.is_empty() {
            line(f, label, "none: the device's own operations computed")?;
        }
        for kernel in &self.kernels {
            let calls = count(kernel.calls, "call");
            if kernel.kernel == REFERENCE {
                line(f, label, format_args!("{REFERENCE} (slow, because no kernel could compute), {calls}"))?;
            } else {
                let KernelReport { kernel: name, version, origin, layout, .. } = kernel;
                line(f, label, format_args!("{name} {version} ({origin}; layout {layout}), {calls}"))?;
            }
            label = "";
        }
        if let Some(lm_head) = &self.lm_head {
            line(f, "lm_head", lm_head)?;
        }
        if let Some(activations) = &self.activations {
            line(f, "activations", activations)?;
        }
        if let Some(dense) = &self.dense_projections {
            line(f, "f32 activations", format_args!("projections: {dense}"))?;
        }
        if let Some(adapter) = &self.adapter {
            line(f, "adapter", adapter)?;
        }
        if self.prepacked > 0 {
            line(f, "prepacked", format_args!("{} matrices, mapped", self.prepacked))?;
        }
        line(f, "tuning", &self.tuning)?;
        let mut label = "fallbacks";
        for fallback in &self.fallbacks {
            let Fallback { kernel, replacement, shape: (m, n, k), reason, count } = fallback;
            line(
                f,
                label,
                format_args!("{kernel} -> {replacement}, {count} x, [{m}, {k}] x [{n}, {k}]ᵀ: {reason}"),
            )?;
            label = "";
        }
        let mut label = "events";
        for Event { kind, kernel, shape, reason, count } in &self.events {
            let kernel = kernel.as_ref().map_or(String::new(), |kernel| format!("{kernel} "));
            let shape = shape.map_or(String::new(), |(m, n, k)| format!(", [{m}, {k}] x [{n}, {k}]ᵀ"));
            line(f, label, format_args!("{kernel}{kind}, {count} x{shape}: {reason}"))?;
            label = "";
        }
        let mut label = "in doubt";
        for Doubt { kernel, unchecked, since_call } in &self.doubts {
            let results = count(*unchecked, "result");
            line(f, label, format_args!("{results} of {kernel}, from its call {since_call} on"))?;
            label = "";
        }
        if let Some(seed) = self.comparison_seed {
            line(f, "comparisons", format_args!("seed {seed}"))?;
        }
        let mut label = "refused";
        for refused in &self.refused_plugins {
            line(f, label, refused)?;
            label = "";
        }
        Ok(())
    }
}

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.model.name.as_ref().map(|name| format!(", {name}")).unwrap_or_default();
        line(f, "model", format_args!("{} ({}{name})", file(&self.model.path), self.model.architecture))?;
        let ended = match self.finish {
            Finish::Length => "reached the requested number",
            Finish::StopToken => "ended by the model",
            Finish::StopString => "ended by a stop string",
            Finish::Constraint => "complete by the constraint",
            Finish::Context => "ended because the context is full",
            Finish::Cancelled => "cancelled",
        };
        let (prompt, generated) = (self.prompt_tokens, self.generated_tokens);
        line(f, "tokens", format_args!("{prompt} of the prompt, {generated} generated; {ended}"))?;
        if let Some(seed) = self.seed {
            line(f, "seed", seed)?;
        }
        if let Some(seconds) = self.load_seconds {
            line(f, "load", human_seconds(seconds))?;
        }
        let (rate, time) = (self.prefill_tokens_per_s, human_seconds(self.prefill_seconds));
        line(f, "prefill", format_args!("{rate:.1} tokens/s ({prompt} in {time})"))?;
        if let Some(seconds) = self.first_token_seconds {
            let start = self.start_to_first_token_seconds.map(human_seconds);
            let start =
                start.map(|start| format!(" ({start} from the start of the program)")).unwrap_or_default();
            line(f, "first token", format_args!("{}{start}", human_seconds(seconds)))?;
        }
        if let (Some(rate), Some(latency)) = (self.decode_tokens_per_s, self.token_seconds) {
            line(f, "decode", format_args!("{rate:.1} tokens/s (a token: {latency})"))?;
        }
        if let Some(Drafts { look_up, model }) = self.drafts {
            let kinds = [("look-up", look_up), ("draft model", model)];
            let of = |(kind, counts): (&str, DraftCounts)| {
                let DraftCounts { drafted, accepted } = counts;
                (drafted > 0).then(|| format!("{accepted} of {drafted} by {kind}"))
            };
            line(f, "guessed", kinds.into_iter().filter_map(of).collect::<Vec<_>>().join(", "))?;
        }
        if let Some(latency) = self.sampling_seconds {
            line(f, "sampling", format_args!("a token: {latency}"))?;
        }
        let text = [("to tokens", self.tokenisation_seconds), ("from tokens", self.detokenisation_seconds)];
        let text = text.map(|(what, seconds)| seconds.map(|s| format!("{what} {}", human_seconds(s))));
        let text: Vec<String> = text.into_iter().flatten().collect();
        if !text.is_empty() {
            line(f, "text", text.join(", "))?;
        }
        line(f, "end to end", human_seconds(self.end_to_end_seconds))?;
        if let Some(bytes) = self.kv_cache_bytes {
            line(f, "KV cache", human_bytes(bytes as u64))?;
        }
        if let Some(bytes) = self.peak_rss_bytes {
            line(f, "peak memory", human_bytes(bytes))?;
        }
        write!(f, "{}", self.execution)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let steps = |n: u64| (1..=n).rev().map(Duration::from_secs).collect::<Vec<_>>();
        assert_eq!(Latency::of(&[]), None);
        let latency = |[p50, p95, p99, max]: [f64; 4]| Some(Latency { p50, p95, p99, max });
        assert_eq!(Latency::of(&steps(1)), latency([1.0; 4]));
        assert_eq!(Latency::of(&steps(20)), latency([10.0, 19.0, 20.0, 20.0]));
        assert_eq!(Latency::of(&steps(200)), latency([100.0, 190.0, 198.0, 200.0]));
    }
}
