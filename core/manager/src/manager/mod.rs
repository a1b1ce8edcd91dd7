//! The kernel manager: registers kernels, checks them against the reference, measures them on the
//! caller's shapes, remembers the result, selects, falls back, and can say why.
//!
//! ```text
//! register ▸ check ▸ tune ▸ select ▸ run ▸ watch ▸ fall back
//! ```
//!
//! Plugins from files pass the [gate] before their kernels are candidates, and are watched
//! while they compute: the first result for each exact shape, and one in many after that, is compared with
//! what it should be. A mismatch quarantines the plugin.

mod adapt;
mod cache;
mod choice;
mod config;
mod execute;
mod gpu;
mod probe;
mod report;
mod slot;
mod tune;
mod watch;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};

use bitnet_burn_plugin::abi::{self, Signature};
use bitnet_burn_plugin::canonical;

pub use self::adapt::{Feedback, LOW_MEMORY};
pub use self::choice::Choice;
pub use self::config::{FallbackPolicy, ManagerConfig, Strict};
pub use self::gpu::{DEFAULT_BODY, GpuKernel};
pub use self::probe::{Machine, Memory, Probe};
pub use self::report::{
    Event, EventKind, Failures, Fallback, KernelReport, ManagerReport, REFERENCE, Status,
};
pub use self::slot::{DRIFT, PROBATION_AFTER, RACE_TURNS, SAMPLE_EVERY, TRIAL_CALLS, WINDOW};
pub use self::tune::{Candidate, Measurement, Ranking, Source, rotation_bytes};
use crate::cpu;
use crate::gate;
use crate::memory::{WeightArena, WeightBuffer};
use crate::plugin::{Kernel, Origin, Plugin, PluginError, Target};
use crate::pool::Pool;
use crate::store::{self, PluginStore};

/// What the manager can't do.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// An environment variable is wrong.
    #[error("{name}={value}: expected {expected}")]
    Config {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// The forced kernel does not exist.
    #[error("no kernel is named `{name}`; there are: {known}")]
    UnknownKernel {
        /// The name.
        name: String,
        /// All kernels.
        known: String,
    },
    /// Strict mode, and no kernel for this.
    #[error(
        "strict mode ({strict}): no kernel can compute the ternary matmul [{m}, {k}] x [{n}, {k}]ᵀ here, and \
         the reference is not allowed. {missing}"
    )]
    NoKernel {
        /// What is strict.
        strict: Strict,
        /// Rows of activations.
        m: usize,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Each kernel, why not, and what would help.
        missing: String,
    },
    /// A kernel failed, and nobody may take over.
    #[error(
        "kernel {kernel} failed at the ternary matmul [{m}, {k}] x [{n}, {k}]ᵀ: {reason}. {forbids} forbids \
         another one to take over: without the kernel's plugin, or with another kernel forced, others compute"
    )]
    NoFallback {
        /// The kernel.
        kernel: String,
        /// Rows of activations.
        m: usize,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Status and message, or what was wrong.
        reason: String,
        /// What forbids it.
        forbids: &'static str,
    },
    /// Operands that do not fit together.
    #[error("ternary matmul: {0}")]
    Operands(String),
    /// A GPU failed, or its buffers can't be read back.
    #[error("the GPU failed: {0}")]
    Device(String),
    /// No memory or no threads.
    #[error("{what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Weights can't be packed.
    #[error("kernel {kernel} can't pack weights [{n}, {k}]: {reason}")]
    Pack {
        /// The kernel.
        kernel: String,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Why.
        reason: String,
    },
    /// Private weights can't be read back.
    #[error("kernel {kernel} can't unpack its weights [{n}, {k}]: {reason}")]
    Unpack {
        /// The kernel.
        kernel: String,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Why.
        reason: String,
    },
}

/// A registered kernel, with what is known of it.
#[derive(Debug)]
pub(crate) struct Entry {
    kernel: Kernel,
    /// Set once, from `Ready`, when the kernel turns out to be wrong.
    status: RwLock<Status>,
    /// Whether the status is `Ready`, for the hot path.
    ready: AtomicBool,
    calls: AtomicU64,
    /// By kind.
    failures: [AtomicU64; 3],
    /// For kernels from files, and for GPUs: what was compared in use.
    watch: Option<watch::Watch>,
}

impl Entry {
    fn ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    fn status(&self) -> Status {
        self.status.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn fail(&self, kind: report::Failure) {
        self.failures[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn reject(&self, reason: String) {
        tracing::warn!(kernel = self.kernel.id(), reason, "kernel rejected");
        self.set(Status::Rejected(reason));
    }

    fn set(&self, status: Status) {
        self.ready.store(status == Status::Ready, Ordering::Relaxed);
        *self.status.write().unwrap_or_else(|e| e.into_inner()) = status;
    }
}

/// Groups of M that are tuned together: (name, rows that stand for the group).
pub const BUCKETS: [(&str, usize); 6] =
    [("1", 1), ("2-4", 3), ("5-16", 8), ("17-64", 32), ("65-256", 96), ("257+", 320)];

/// The bucket of `m` rows.
pub fn bucket(m: usize) -> usize {
    match m {
        0..=1 => 0,
        2..=4 => 1,
        5..=16 => 2,
        17..=64 => 3,
        65..=256 => 4,
        _ => 5,
    }
}

/// Whether weights may be packed privately.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayoutPolicy {
    /// Whatever is the fastest.
    Any,
    /// Read canonical weights where they lie.
    Canonical,
}

/// Packed weights as [`KernelManager::pack`] returns them.
#[derive(Debug)]
pub enum Packed {
    /// The chosen kernels read the canonical layout: keep the canonical bytes.
    Canonical,
    /// The chosen kernels' private layout.
    Private(WeightBuffer),
}

/// One matrix of a [`KernelManager::matmul`].
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// What [`KernelManager::choose`] chose for the shape.
    pub choice: &'a Choice,
    /// The weights in the chosen layout.
    pub weights: &'a [u8],
    /// weight = code * scale.
    pub scale: f32,
    /// Column of the output where this matrix's features begin.
    pub column: usize,
}

/// Registers, checks, tunes, selects and runs kernels. See the [module](self).
#[derive(Debug)]
pub struct KernelManager {
    config: ManagerConfig,
    pool: Pool,
    arena: WeightArena,
    plugins: Mutex<Vec<Arc<Plugin>>>,
    entries: RwLock<Vec<Arc<Entry>>>,
    choices: Mutex<HashMap<(usize, usize, LayoutPolicy), Arc<Choice>>>,
    /// All choices that somebody may still hold.
    made: Mutex<Vec<Weak<Choice>>>,
    policy: FallbackPolicy,
    memory: adapt::MemoryWatch,
    events: Mutex<Vec<Event>>,
    store: PluginStore,
    tuner: tune::Tuner,
    reference_calls: AtomicU64,
    fallbacks: Mutex<Vec<Fallback>>,
    scratch: execute::Scratch,
}

impl KernelManager {
    /// A manager without kernels.
    ///
    /// # Errors
    /// If its threads can't be started, or not pinned, or a masked CPU feature has an unknown name.
    pub fn new(config: ManagerConfig) -> Result<Self, ManagerError> {
        config.mask()?;
        let threads = if config.threads == 0 { cpu::physical_cores() } else { config.threads };
        let pool = if config.pin { Pool::pinned(threads) } else { Pool::new(threads) }
            .map_err(|source| ManagerError::System { what: "starting the kernels' threads", source })?;
        Ok(Self {
            tuner: tune::Tuner::new(&config),
            policy: config.policy(),
            store: PluginStore::new(config.plugins.clone(), config.cache_dir.as_deref()),
            config,
            pool,
            arena: WeightArena::default(),
            plugins: Mutex::default(),
            entries: RwLock::default(),
            choices: Mutex::default(),
            made: Mutex::default(),
            memory: adapt::MemoryWatch::default(),
            events: Mutex::default(),
            reference_calls: AtomicU64::new(0),
            fallbacks: Mutex::default(),
            scratch: execute::Scratch::default(),
        })
    }

    /// How it was set up.
    pub fn config(&self) -> &ManagerConfig {
        &self.config
    }

    /// The threads that kernels run on; anything else that computes between them should use these.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Copies and verdicts of plugins from files.
    pub fn store(&self) -> &PluginStore {
        &self.store
    }

    /// Registers the kernels of a plugin that is linked in, and compares each that this machine can run
    /// with the reference, in this process. A kernel that is wrong is rejected, with the reason, and the
    /// others stay. Weights prepared earlier keep their choice.
    ///
    /// # Errors
    /// If a plugin of this name is registered already.
    pub fn register(&self, plugin: Plugin) -> Result<Vec<KernelReport>, PluginError> {
        self.enter(plugin, &|kernel| {
            if kernel.gpu().is_some() {
                // Its results are watched on the device that it is used on.
                return Status::Ready;
            }
            match gate::check_in_process(kernel) {
                Ok(()) => Status::Ready,
                Err(reason) => {
                    tracing::warn!(kernel = kernel.id(), reason, "kernel rejected");
                    Status::Rejected(reason)
                }
            }
        })
    }

    /// Loads a plugin from a file and registers its kernels, if the [policy](crate::store) allows the file
    /// and the [gate] finds nothing wrong: the gate runs in a process of its own, unless its
    /// verdict is known. What is loaded is a copy. A file with the same content as one that is loaded
    /// already is the same plugin.
    ///
    /// # Errors
    /// If the policy refuses the file, the gate could not be run or refuses the plugin, or another plugin
    /// of its name is registered.
    pub fn load_plugin(&self, path: &Path) -> Result<Vec<KernelReport>, PluginError> {
        let stored = self.store.admit(path)?;
        let same =
            |origin: &Origin| matches!(origin, Origin::File { sha256, .. } if *sha256 == stored.sha256);
        let loaded = lock(&self.plugins).iter().any(|plugin| same(plugin.origin()));
        if loaded {
            let entries = self.entries();
            return Ok(entries
                .iter()
                .filter(|e| same(e.kernel.plugin().origin()))
                .map(|e| report(e))
                .collect());
        }
        let config = self.store.config();
        let elsewhere = |known: &gate::Report| {
            let gpu = config.gpu.filter(|_| known.gpu.is_some())?();
            known.is_of_another_gpu(&gpu, config.helper.as_deref()).then_some(gpu)
        };
        let (verdict, elsewhere) =
            match self.store.verdict(&stored.sha256).map(|known| (elsewhere(&known), known)) {
                Some((None, known)) => (known, None),
                Some((Some(gpu), known)) if config.helper.is_none() => (known, Some(gpu)),
                _ => (self.examine(path, &stored)?, None),
            };
        if let Some(refusal) = verdict.refusal {
            return Err(PluginError::Refused { path: path.to_owned(), refusal });
        }
        self.enter(Plugin::load_as(&stored.library, &stored.origin)?, &|kernel| {
            // A kernel for a GPU can be used where the gate had one to try it on.
            let result = verdict.kernels.iter().find(|result| result.kernel == kernel.id());
            match (result.and_then(|result| result.unavailable.as_ref()), &elsewhere) {
                _ if kernel.gpu().is_none() => Status::Ready,
                (Some(reason), _) => Status::Unavailable(reason.clone()),
                (None, Some(gpu)) => Status::Unavailable(format!(
                    "it was tried on {}, and this is {gpu}",
                    verdict.gpu.as_deref().unwrap_or("no GPU")
                )),
                (None, None) => Status::Ready,
            }
        })
    }

    /// Runs the gate on a plugin's file, whatever is known of it, keeps the verdict, and gives it back.
    ///
    /// # Errors
    /// If the policy refuses the file, or the gate could not be run.
    pub fn verify_plugin(&self, path: &Path) -> Result<gate::Report, PluginError> {
        let stored = self.store.admit(path)?;
        self.examine(path, &stored)
    }

    fn examine(&self, path: &Path, stored: &store::Stored) -> Result<gate::Report, PluginError> {
        let config = self.store.config();
        let Some(helper) = &config.helper else {
            return Err(PluginError::Unverified { path: path.to_owned() });
        };
        let report = gate::examine(helper, &stored.library, &stored.origin, &stored.sha256, config.patience)
            .map_err(|source| PluginError::Gate { path: path.to_owned(), source })?;
        tracing::info!(plugin = %path.display(), passed = report.passed(), seconds = report.seconds, "gate");
        self.store.remember(&report);
        Ok(report)
    }

    /// Registers a plugin's kernels; `judge` says what becomes of one that this machine can run.
    fn enter(
        &self,
        plugin: Plugin,
        judge: &dyn Fn(&Kernel) -> Status,
    ) -> Result<Vec<KernelReport>, PluginError> {
        let plugin = Arc::new(plugin);
        {
            let mut plugins = lock(&self.plugins);
            if let Some(other) = plugins.iter().find(|p| p.name() == plugin.name()) {
                return Err(PluginError::Duplicate {
                    origin: plugin.origin().to_string(),
                    name: plugin.name().into(),
                    version: plugin.version().into(),
                    other: other.origin().to_string(),
                    other_version: other.version().into(),
                });
            }
            plugins.push(plugin.clone());
        }
        let foreign = *plugin.origin() != Origin::BuiltIn;
        let mut reports = Vec::new();
        for kernel in plugin.kernels() {
            let lacking = match kernel.target() {
                Target::CubeCl if foreign => Some("only kernels that are linked in can be CubeCL's".into()),
                Target::Cpu => cpu::lacking(kernel.features(), &self.config.masked_features),
                Target::Wgsl | Target::Cuda | Target::CubeCl => None,
                Target::Unknown(_) => {
                    Some(format!("it is for {}, which this host does not know", kernel.target()))
                }
            };
            let status = match lacking {
                Some(reason) => Status::Unavailable(reason),
                None => judge(&kernel),
            };
            let watched = foreign || kernel.gpu().is_some();
            let entry = Arc::new(Entry {
                kernel,
                ready: AtomicBool::new(status == Status::Ready),
                status: RwLock::new(status),
                calls: AtomicU64::new(0),
                failures: Default::default(),
                watch: watched.then(watch::Watch::default),
            });
            reports.push(report(&entry));
            self.entries.write().unwrap_or_else(|e| e.into_inner()).push(entry);
        }
        lock(&self.choices).clear();
        Ok(reports)
    }

    /// Checks that the forced kernel, if there is one, exists.
    ///
    /// # Errors
    /// If it does not.
    pub fn validate(&self) -> Result<(), ManagerError> {
        let Some(name) = &self.config.force else { return Ok(()) };
        let entries = self.entries();
        if entries.iter().any(|entry| names(&entry.kernel, name)) {
            return Ok(());
        }
        Err(self.unknown_kernel(name))
    }

    fn unknown_kernel(&self, name: &str) -> ManagerError {
        let entries = self.entries();
        let known: Vec<_> = entries.iter().map(|entry| entry.kernel.id()).collect();
        ManagerError::UnknownKernel { name: name.to_owned(), known: known.join(", ") }
    }

    /// The policy allows nobody to take over from a kernel.
    fn no_fallback(&self, entry: &Entry, (n, k): (usize, usize), m: usize, reason: String) -> ManagerError {
        let forbids = match self.policy {
            FallbackPolicy::Never if self.config.strict.no_fallback => "strict mode (no-fallback)",
            FallbackPolicy::Never => "the fallback policy (never)",
            _ => "strict mode, with no other kernel left,",
        };
        ManagerError::NoFallback { kernel: entry.kernel.id().into(), m, n, k, reason, forbids }
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        self.entries.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Kernels that may compute this shape.
    fn candidates(&self, m: usize, n: usize, k: usize, policy: LayoutPolicy) -> Vec<Arc<Entry>> {
        let signature = self.signature(m, n, k);
        self.entries()
            .into_iter()
            .filter(|entry| {
                self.config.force.as_ref().is_none_or(|name| names(&entry.kernel, name))
                    && entry.kernel.target() == Target::Cpu
                    && (policy == LayoutPolicy::Any || entry.kernel.layout().is_none())
                    && entry.ready()
                    && entry.kernel.supports(&signature)
                    && entry.kernel.weight_bytes(n, k).is_some()
            })
            .collect()
    }

    fn signature(&self, m: usize, n: usize, k: usize) -> Signature {
        Signature::ternary(m as u64, n as u64, k as u64, self.pool.threads() as u32)
    }

    /// No kernel computes a shape, and strict mode forbids the reference: why, in a clause for each kernel,
    /// and what would provide one.
    fn no_kernel(&self, m: usize, n: usize, k: usize) -> ManagerError {
        let signature = self.signature(m, n, k);
        let forced = |entry: &Entry| self.config.force.as_ref().is_none_or(|name| names(&entry.kernel, name));
        let mut reasons = Vec::new();
        let mut masked = false;
        for entry in self.entries().iter().filter(|entry| forced(entry)) {
            let why = match entry.status() {
                Status::Unavailable(reason) => {
                    masked |= entry.kernel.features().iter().any(|f| self.config.masked_features.contains(f));
                    reason
                }
                Status::Rejected(reason) => format!("rejected: {reason}"),
                Status::Quarantined(reason) => format!("quarantined: {reason}"),
                Status::Ready if entry.kernel.gpu().is_some() => format!("is for {}", entry.kernel.target()),
                Status::Ready if !entry.kernel.supports(&signature) => "does not support the shape".into(),
                Status::Ready => "failed in use, or the weights are not aligned as it asks".into(),
            };
            reasons.push(format!("{}: {why}", entry.kernel.id()));
        }
        let kernels = match reasons.is_empty() {
            true => "No kernel is registered.".into(),
            false => format!("Kernels: {}.", reasons.join("; ")),
        };
        let help = match (&self.config.force, masked) {
            (Some(name), _) => format!("Others than the forced kernel {name} may be able to"),
            (None, true) => "The masked CPU features would provide one".into(),
            (None, false) => "A plugin with a kernel for this shape would provide one".into(),
        };
        ManagerError::NoKernel { strict: self.config.strict, m, n, k, missing: format!("{kernels} {help}.") }
    }

    /// Chooses kernels for weights [n, k], measuring where that has not been done on this machine:
    /// which layout decides the speed of decode (M = 1); within noise of each other, that of prefill
    /// (M = 32); within noise again, the lower memory use. Noise is how much longer the median of the fastest
    /// took than its fastest run, at least 5 % and at most 15 %. A layout that makes prefill more than 4 times
    /// slower is out, however fast its decode. While [memory is low](Self::memory_is_low), the layout is the
    /// canonical one, if there is a kernel for it.
    ///
    /// # Errors
    /// In strict mode, if no kernel can compute the shape.
    pub fn choose(&self, n: usize, k: usize, policy: LayoutPolicy) -> Result<Arc<Choice>, ManagerError> {
        let policy = match self.allowed_layouts(n, k, policy) {
            // A kernel that is forced, or the only one for the shape, may read no canonical weights.
            allowed if allowed != policy && self.candidates(1, n, k, allowed).is_empty() => policy,
            allowed => allowed,
        };
        if let Some(choice) = lock(&self.choices).get(&(n, k, policy)) {
            return Ok(choice.clone());
        }
        if n == 0 || k == 0 || k as u64 > 1 << 23 {
            return Err(ManagerError::Operands(format!(
                "weights [{n}, {k}]: both must be at least 1, and K at most 2^23"
            )));
        }
        let choice = Arc::new(self.decide(n, k, policy)?);
        let choice = lock(&self.choices).entry((n, k, policy)).or_insert(choice).clone();
        let mut made = lock(&self.made);
        if !made.iter().any(|known| std::ptr::eq(known.as_ptr(), &*choice)) {
            made.retain(|known| known.strong_count() > 0);
            made.push(Arc::downgrade(&choice));
        }
        Ok(choice)
    }

    fn decide(&self, n: usize, k: usize, policy: LayoutPolicy) -> Result<Choice, ManagerError> {
        let candidates = self.candidates(1, n, k, policy);
        if candidates.is_empty() && !self.config.strict.allows_reference() {
            return Err(self.no_kernel(1, n, k));
        }
        let mut layouts: Vec<Option<&str>> = Vec::new();
        for entry in &candidates {
            if !layouts.contains(&entry.kernel.layout()) {
                layouts.push(entry.kernel.layout());
            }
        }
        let layout = if layouts.len() > 1 {
            // Median and fastest run of a layout's fastest kernel.
            let best = |m: usize, layout: Option<&str>| {
                let ranking = self.rank(m, n, k, policy);
                let of_layout = ranking.candidates.iter().filter(|c| c.entry.kernel.layout() == layout);
                let times = of_layout.filter_map(|c| Some((c.measurement.median_ns?, c.measurement.min_ns?)));
                times.min().unwrap_or((u64::MAX, u64::MAX))
            };
            let bytes = |layout: Option<&str>| {
                let entry = candidates.iter().find(|e| e.kernel.layout() == layout);
                // Canonical weights are there anyway.
                layout.and(entry).and_then(|e| e.kernel.weight_bytes(n, k)).unwrap_or(0) as u64
            };
            // Decode first: the time for measuring may be spent behind it.
            let mut layouts: Vec<_> = layouts.iter().map(|&l| (l, [1, 32].map(|m| best(m, l)))).collect();
            let fastest = |layouts: &[(_, [(u64, u64); 2])], i: usize| {
                layouts.iter().map(|(_, times)| times[i]).min().unwrap_or((u64::MAX, u64::MAX))
            };
            let (prefill, _) = fastest(&layouts, 1);
            layouts.retain(|(_, times)| times[1].0 as f64 <= prefill as f64 * tune::HOPELESS);
            for i in 0..2 {
                let (median, min) = fastest(&layouts, i);
                let noise = (median as f64 / min.max(1) as f64).clamp(1.05, 1.15);
                layouts.retain(|(_, times)| times[i].0 as f64 <= median as f64 * noise);
            }
            layouts.sort_by_key(|&(l, _)| bytes(l));
            layouts[0].0
        } else {
            layouts.first().copied().flatten()
        };
        let packer = layout.map(|layout| {
            let entry = candidates.iter().find(|e| e.kernel.layout() == Some(layout));
            entry.expect("the layout is a candidate's").clone()
        });
        Ok(Choice::new(n, k, packer))
    }

    /// The ranking for `m` rows of a choice's shape, measured at the first use.
    fn ranking<'a>(&self, choice: &'a Choice, m: usize) -> &'a Ranking {
        choice.slot(m).ranking(self.policy, || {
            let policy = if choice.packer.is_some() { LayoutPolicy::Any } else { LayoutPolicy::Canonical };
            let mut ranking = self.rank(m, choice.n, choice.k, policy);
            ranking.candidates.retain(|c| choice.is_read_by(&c.entry));
            ranking
        })
    }

    /// Measures whatever a choice may need for prompts of up to `m` rows, so that no call has to.
    pub fn warm_up(&self, choice: &Choice, m: usize) {
        for (index, &(_, rows)) in BUCKETS.iter().enumerate() {
            if index <= bucket(m) {
                self.ranking(choice, rows);
            }
        }
    }

    /// Chooses kernels for weights [n, k] and packs canonical rows of them into the chosen layout. A plugin
    /// from a file that packs wrongly is quarantined, and another layout chosen.
    ///
    /// # Errors
    /// As [`choose`](Self::choose) and [`pack`](Self::pack), for the kernels that are left.
    pub fn prepare(
        &self,
        n: usize,
        k: usize,
        policy: LayoutPolicy,
        weights: &[u8],
    ) -> Result<(Arc<Choice>, Packed), ManagerError> {
        loop {
            let choice = self.choose(n, k, policy)?;
            if choice.packer.as_ref().is_some_and(|entry| !entry.ready()) {
                lock(&self.choices).clear();
                continue;
            }
            match self.pack(&choice, weights) {
                Ok(packed) => return Ok((choice, packed)),
                // Every turn takes a plugin out.
                Err(_) if choice.packer.as_ref().is_some_and(|entry| !entry.ready()) => continue,
                Err(error) => return Err(error),
            }
        }
    }

    /// Packs canonical weights (rows of [`canonical::row_bytes`]) into the chosen layout, on all
    /// threads. What a plugin from a file packs is unpacked again and compared; the plugin is quarantined
    /// if it differs.
    ///
    /// # Errors
    /// If the bytes do not fit the shape, memory is short, or the kernel fails.
    pub fn pack(&self, choice: &Choice, weights: &[u8]) -> Result<Packed, ManagerError> {
        let (n, k) = choice.shape();
        if Some(weights.len()) != canonical::matrix_bytes(n, k) {
            return Err(ManagerError::Operands(format!(
                "canonical weights [{n}, {k}] take {:?} bytes, not {}",
                canonical::matrix_bytes(n, k),
                weights.len()
            )));
        }
        let Some(entry) = &choice.packer else { return Ok(Packed::Canonical) };
        let packed = execute::pack(entry, &self.pool, &self.arena, n, k, weights);
        if entry.watch.is_none() {
            return packed.map(Packed::Private);
        }
        let sealed = packed.and_then(|mut packed| {
            execute::seal(entry, &self.pool, (n, k), weights, &mut packed)?;
            Ok(packed)
        });
        if let Err(ManagerError::Pack { reason, .. } | ManagerError::Unpack { reason, .. }) = &sealed {
            self.quarantine(entry, gate::Stage::FirstUse, format!("weights [{n}, {k}]: {reason}"));
        }
        sealed.map(Packed::Private)
    }

    /// The canonical form of weights that [`pack`](Self::pack) packed.
    ///
    /// # Errors
    /// If the kernel can't.
    pub fn unpack(&self, choice: &Choice, weights: &[u8]) -> Result<Vec<u8>, ManagerError> {
        match &choice.packer {
            None => Ok(weights.to_vec()),
            Some(entry) => execute::unpack(entry, &self.pool, choice.n, choice.k, weights),
        }
    }

    /// Why: the candidates for `m` rows of [n, k], the fastest first, with their measurements.
    pub fn explain(&self, m: usize, n: usize, k: usize) -> Ranking {
        self.rank(m, n, k, LayoutPolicy::Any)
    }

    /// What happened so far.
    pub fn report(&self) -> ManagerReport {
        let (cache_file, cache_problem) = self.tuner.cache_file();
        ManagerReport {
            threads: self.pool.threads(),
            pinned: self.config.pin,
            strict: self.config.strict,
            tuned: self.tuner.tuned(),
            cached: self.tuner.cached(),
            cache_file,
            cache_problem,
            kernels: self.entries().iter().map(|entry| report(entry)).collect(),
            reference_calls: self.reference_calls.load(Ordering::Relaxed),
            fallbacks: lock(&self.fallbacks).clone(),
            fallback_policy: self.policy,
            events: lock(&self.events).clone(),
        }
    }
}

/// Whether a name means a kernel: `plugin/kernel`, `kernel`, or `plugin` for all of its kernels.
fn names(kernel: &Kernel, name: &str) -> bool {
    let (plugin, short) = kernel.id().split_once('/').expect("an id is plugin/kernel");
    [kernel.id(), plugin, short].contains(&name)
}

fn report(entry: &Entry) -> KernelReport {
    let plugin = entry.kernel.plugin();
    KernelReport {
        kernel: entry.kernel.id().into(),
        version: plugin.version().into(),
        origin: plugin.origin().to_string(),
        sha256: match plugin.origin() {
            Origin::BuiltIn => None,
            Origin::File { sha256, .. } => Some(sha256.clone()),
        },
        target: entry.kernel.target().to_string(),
        layout: entry.kernel.layout().unwrap_or("canonical").into(),
        features: entry.kernel.features().to_vec(),
        status: entry.status(),
        calls: entry.calls.load(Ordering::Relaxed),
        failures: {
            let [status, wrong, slow] = [0, 1, 2].map(|i: usize| entry.failures[i].load(Ordering::Relaxed));
            Failures { status, wrong, slow }
        },
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Filled weights for the ABI.
pub(crate) fn abi_weights(n: usize, k: usize, scale: f32, data: &[u8]) -> abi::Weights {
    bitnet_burn_plugin::sdk::WeightsRef::new(n, k, scale, data).as_abi()
}
