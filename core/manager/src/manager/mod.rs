//! The kernel manager: registers kernels, checks them against the reference, measures them on the
//! caller's shapes, remembers the result, selects, falls back, and can say why.
//!
//! ```text
//! register ▸ check ▸ tune ▸ select ▸ run ▸ watch ▸ fall back
//! ```
//!
//! Plugins from files pass the [gate] before their kernels are candidates, and are watched
//! while they compute: the first result for each exact shape and for each matrix, and one in many after that, is
//! compared with what it should be. A mismatch quarantines the plugin.

mod adapt;
mod cache;
mod config;
mod cpu_kernels;
mod execute;
mod gpu;
mod matrices;
mod measurement;
mod objective;
mod packing;
mod parts;
mod probe;
mod registry;
mod repack;
mod report;
mod selection;
mod slot;
mod tune_cpu;
mod tuner;
mod unmeasured;
mod walls;
mod watch;
mod weights;

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};

use bitnet_burn_plugin::abi;

pub use self::adapt::{Feedback, LOW_MEMORY};
pub use self::config::{FallbackPolicy, MAX_THREADS, ManagerConfig};
pub use self::cpu_kernels::CpuKernels;
pub use self::gpu::{DEFAULT_BODY, GpuKernel};
pub use self::measurement::{Measurement, Source};
pub use self::objective::{LayoutCost, Objective};
pub use self::packing::checksum;
#[cfg_attr(not(target_os = "linux"), allow(unused_imports, reason = "nothing is contained elsewhere"))]
pub(crate) use self::packing::{SharedBytes, by_granules};
#[cfg_attr(not(target_os = "linux"), allow(unused_imports, reason = "nothing is contained elsewhere"))]
pub(crate) use self::parts::{Few, Part, Scratch, ThreadScratch, run_here};
pub use self::probe::{Machine, Memory, Probe, peak_memory};
pub(crate) use self::registry::Entry;
pub use self::report::{
    Doubt, Event, EventKind, Failures, Fallback, KernelReport, ManagerReport, REFERENCE, Status,
};
pub use self::slot::{PROBATION_AFTER, RACE_TURNS, TIMED_EVERY, TRIAL_CALLS, WINDOW};
pub use self::tune_cpu::{Candidate, Ranking, Turns, rotation_bytes};
pub use self::tuner::{Contest, Inputs, Standings, Unfit};
pub use self::weights::{Job, Scale, ScaleKind, WeightShape};
use crate::cpu;
pub use crate::error::ManagerError;
use crate::memory::{PageArena, PageBuffer};
use crate::plugin::Plugin;
use crate::pool::Pool;
use crate::store::PluginStore;

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
    /// Whatever is the fastest, but no packing of a plugin from a file.
    BuiltIn,
}

/// Packed weights as [`KernelManager::pack`] returns them.
#[derive(Debug)]
pub enum Packed {
    /// The chosen kernels read the canonical layout: keep the canonical bytes.
    Canonical,
    /// The chosen kernels' private layout.
    Private(PageBuffer),
}

/// Registers, checks, tunes, selects and runs kernels. See the [crate](crate).
#[derive(Debug)]
pub struct KernelManager {
    config: ManagerConfig,
    pool: Pool,
    arena: PageArena,
    /// What plugins from files packed.
    sealed: PageArena,
    plugins: Mutex<Vec<Arc<Plugin>>>,
    entries: RwLock<Vec<Arc<Entry>>>,
    choices: Mutex<HashMap<(WeightShape, LayoutPolicy), Arc<CpuKernels>>>,
    /// All choices that callers may still hold.
    made: Mutex<Vec<Weak<CpuKernels>>>,
    policy: FallbackPolicy,
    memory: adapt::MemoryWatch,
    events: Mutex<Vec<Event>>,
    store: PluginStore,
    tuner: tuner::Tuner,
    reference_calls: AtomicU64,
    fallbacks: Mutex<Vec<Fallback>>,
    scratch: parts::Scratch,
    /// Where results of plugins from files are compared follows from this.
    seed: u64,
    /// How often kernels were chosen for weights.
    loads: AtomicU64,
    doubts: Mutex<Vec<Doubt>>,
    in_doubt: AtomicU64,
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
            tuner: tuner::Tuner::new(&config),
            policy: config.policy(),
            store: PluginStore::new(config.plugins.clone(), config.cache_dir.as_deref()),
            // The standard library's hash maps get their seeds from the system.
            seed: config.seed.unwrap_or_else(|| RandomState::new().hash_one(0)),
            config,
            pool,
            arena: PageArena::default(),
            sealed: PageArena::default(),
            plugins: Mutex::default(),
            entries: RwLock::default(),
            choices: Mutex::default(),
            made: Mutex::default(),
            memory: adapt::MemoryWatch::default(),
            events: Mutex::default(),
            reference_calls: AtomicU64::new(0),
            fallbacks: Mutex::default(),
            scratch: parts::Scratch::default(),
            loads: AtomicU64::new(0),
            doubts: Mutex::default(),
            in_doubt: AtomicU64::new(0),
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

    /// What happened so far.
    pub fn report(&self) -> ManagerReport {
        let (cache_file, cache_problem) = self.tuner.cache_file();
        let (tuned, cached) = self.tuner.counts();
        ManagerReport {
            threads: self.pool.threads(),
            pinned: self.config.pin,
            strict: self.config.strict,
            tuned,
            cached,
            cache_file,
            cache_problem,
            kernels: self.entries().iter().map(|entry| registry::report(entry)).collect(),
            reference_calls: self.reference_calls.load(Ordering::Relaxed),
            fallbacks: lock(&self.fallbacks).clone(),
            fallback_policy: self.policy,
            seed: self.seed,
            doubts: lock(&self.doubts).clone(),
            events: lock(&self.events).clone(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Filled weights with one scale for the ABI.
pub(crate) fn abi_weights(n: usize, k: usize, scale: f32, data: &[u8]) -> abi::Weights {
    bitnet_burn_plugin::sdk::WeightsRef::new(n, k, scale, data).as_abi()
}
