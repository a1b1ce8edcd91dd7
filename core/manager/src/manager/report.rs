//! What a manager tells: its kernels, what they did, and what happened meanwhile.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::config::FallbackPolicy;
use crate::strict::Strict;

/// Name under which reports count the scalar reference.
pub const REFERENCE: &str = "reference";

/// Whether a kernel may compute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "reason", rename_all = "snake_case")]
pub enum Status {
    /// Checked, and a candidate.
    Ready,
    /// It needs CPU features that the machine lacks.
    Unavailable(String),
    /// Its results were wrong, or it failed the check.
    Rejected(String),
    /// Its plugin passed the gate, and a kernel of it was wrong in use: none of them computes any more.
    Quarantined(String),
}

/// Failures of a kernel by kind. With [`KernelReport::calls`], which counts the others, that is a rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failures {
    /// A status other than OK.
    pub status: u64,
    /// A wrong result, which was not returned.
    pub wrong: u64,
    /// Demoted because it was slow.
    pub slow: u64,
}

/// A kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    Status,
    Wrong,
    Slow,
}

impl Failures {
    /// Of all kinds.
    pub fn total(&self) -> u64 {
        self.status + self.wrong + self.slow
    }
}

/// What can happen to kernels in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The kernel failed or was too slow for a shape: others compute it for a while.
    Demoted,
    /// It is tried again.
    Probation,
    /// It went well: the kernel is back.
    Promoted,
    /// Kernels were compared again over live calls; this one computes from now on.
    Retuned,
    /// The kernel in use became slower, and none is faster now: it is the machine, as far as can be told.
    Throttled,
    /// It computed wrongly, and is not used any more.
    Quarantined,
    /// Memory is short: new weights stay in the canonical layout.
    LowMemory,
    /// There is memory again.
    MemoryBack,
}

/// Something that happened in use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// `plugin/kernel`; `None` where it concerns none in particular.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Shape: rows (of the last time), output and input features; events of a shape and
    /// [bucket](super::BUCKETS) of rows are one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<(usize, usize, usize)>,
    /// Why, the last time.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// A kernel that failed in use, and what took over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fallback {
    /// The kernel that failed.
    pub kernel: String,
    /// The kernel that took its place.
    pub replacement: String,
    /// Shape: rows (of the first failure), output and input features.
    pub shape: (usize, usize, usize),
    /// Status and message.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// Results of a plugin that was quarantined in use, which callers had got before and which nothing had compared: any of
/// them may be wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doubt {
    /// `plugin/kernel`.
    pub kernel: String,
    /// How many matmuls.
    pub unchecked: u64,
    /// The first of them, by the kernel's count of its calls, from 1.
    pub since_call: u64,
}

/// A kernel as reports show it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelReport {
    /// `plugin/kernel`.
    pub kernel: String,
    /// Version of its plugin.
    pub version: String,
    /// "built in", or the file.
    pub origin: String,
    /// SHA-256 of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Where it runs: `cpu`, `wgsl` or `cuda`.
    pub target: String,
    /// Layout of its weights.
    pub layout: String,
    /// Whether it is for weights with many scales; others are for one scale.
    pub many_scales: bool,
    /// Features of the CPU, or of the GPU, that it needs.
    pub features: Vec<String>,
    /// Whether it may compute.
    pub status: Status,
    /// Matmuls that it computed.
    pub calls: u64,
    /// Matmuls that it failed.
    pub failures: Failures,
}

/// What the manager did so far.
#[derive(Clone, Debug, Serialize)]
pub struct ManagerReport {
    /// Threads of the pool.
    pub threads: usize,
    /// Whether each stays on a core of its own.
    pub pinned: bool,
    /// What was strict.
    pub strict: Strict,
    /// Signatures measured in this process.
    pub tuned: u64,
    /// Signatures whose measurements came from the cache.
    pub cached: u64,
    /// The cache file, if one is kept.
    pub cache_file: Option<PathBuf>,
    /// What is wrong with the cache file, if something is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_problem: Option<String>,
    /// All kernels.
    pub kernels: Vec<KernelReport>,
    /// Matmuls that the reference computed.
    pub reference_calls: u64,
    /// Kernels that failed in use.
    pub fallbacks: Vec<Fallback>,
    /// What happens when a kernel fails or becomes slow, strict mode considered.
    pub fallback_policy: FallbackPolicy,
    /// Seed of the places where results of plugins from files are compared.
    pub seed: u64,
    /// Results that are in doubt.
    pub doubts: Vec<Doubt>,
    /// What changed while kernels computed, in the order in which each thing happened first.
    pub events: Vec<Event>,
}

/// In a word or two.
impl std::fmt::Display for EventKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Demoted => "demoted",
            Self::Probation => "on probation",
            Self::Promoted => "promoted",
            Self::Retuned => "retuned",
            Self::Throttled => "throttled",
            Self::Quarantined => "quarantined",
            Self::LowMemory => "memory is short",
            Self::MemoryBack => "memory is back",
        })
    }
}

impl Event {
    /// Whether reports count both as one: the same for the same kernel, shape and bucket of rows.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let place = |event: &Self| event.shape.map(|(m, n, k)| (super::bucket(m), n, k));
        (self.kind, &self.kernel, place(self)) == (other.kind, &other.kernel, place(other))
    }
}

impl ManagerReport {
    /// What happened since `earlier`, and how often.
    pub fn events_since(&self, earlier: &Self) -> Vec<Event> {
        let since = |event: &Event| {
            let before = earlier.events.iter().find(|known| known.is_like(event)).map_or(0, |e| e.count);
            let count = event.count - before;
            (count > 0).then(|| Event { count, ..event.clone() })
        };
        self.events.iter().filter_map(since).collect()
    }

    /// The results that came into doubt since `earlier`.
    pub fn doubts_since(&self, earlier: &Self) -> Vec<Doubt> {
        // Nothing is taken back.
        self.doubts.get(earlier.doubts.len()..).unwrap_or_default().to_vec()
    }

    /// The kernels that computed something since `earlier`, with their calls since then.
    pub fn used_since(&self, earlier: &Self) -> Vec<KernelReport> {
        let before = |id: &str| earlier.kernels.iter().find(|k| k.kernel == id).map_or(0, |k| k.calls);
        let mut used: Vec<KernelReport> = self
            .kernels
            .iter()
            .map(|kernel| KernelReport { calls: kernel.calls - before(&kernel.kernel), ..kernel.clone() })
            .filter(|kernel| kernel.calls > 0)
            .collect();
        let reference = self.reference_calls - earlier.reference_calls;
        if reference > 0 {
            used.push(KernelReport {
                kernel: REFERENCE.into(),
                version: env!("CARGO_PKG_VERSION").into(),
                origin: "built in".into(),
                sha256: None,
                target: crate::plugin::Target::Cpu.to_string(),
                layout: "canonical".into(),
                many_scales: false,
                features: Vec::new(),
                status: Status::Ready,
                calls: reference,
                failures: Failures::default(),
            });
        }
        used.sort_by_key(|kernel| std::cmp::Reverse(kernel.calls));
        used
    }
}
