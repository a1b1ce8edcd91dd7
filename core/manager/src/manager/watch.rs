//! The second and third stage of the [gate]: kernels of plugins from files, watched while
//! they compute.
//!
//! * The first result of a kernel for every exact (M, N, K), and for every matrix, is compared, all of it, with that of a
//!   built-in kernel (or of the reference, where there is none), whose result is returned.
//! * After that, calls 2, 3, 5, 9, 17 ... of each matrix are compared, and from then on one in [`COMPARED_EVERY`](super::matrices::COMPARED_EVERY) at
//!   least: one row of activations, all its outputs ([`matrices`](super::matrices) says how). Which call and which row
//!   follow from the manager's seed, which differs from process to process.
//! * Where a result is compared, what the kernel read is compared, too: it may not have changed.
//!
//! A mismatch quarantines the plugin with all its kernels, for this process and, through its verdict, for
//! later ones; the call is computed again by what is left. What the plugin gave to callers before, and nothing compared,
//! is in [doubt](super::Doubt).

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use super::adapt::Turn;
use super::matrices::{Key, Known, Matrix, Projection, next_comparison};
use super::packing::checksum;
use super::parts::{Part, run_parts};
use super::report::EventKind;
use super::weights::rows;
use super::{Doubt, Entry, Job, KernelManager, ManagerError, Scale, Status, lock};
use crate::gate::{self, Refusal, Stage};
use crate::memory::Activations;
use crate::plugin::Origin;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::reference;
use bitnet_burn_plugin::canonical;
use bitnet_burn_plugin::sdk::Scales;

/// What is known of a watched kernel.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The shapes (M, N, K) for which it has computed what a built-in kernel has.
    shapes: RwLock<HashSet<(usize, usize, usize)>>,
    /// Results that callers got and nothing compared, and the number of the first such call.
    unchecked: AtomicU64,
    since: AtomicU64,
    /// Kernels for GPUs: the call after which the result is compared.
    due: AtomicU64,
}

impl Watch {
    fn knows(&self, shape: (usize, usize, usize)) -> bool {
        self.shapes.read().unwrap_or_else(|e| e.into_inner()).contains(&shape)
    }

    fn learn(&self, shape: (usize, usize, usize)) {
        self.shapes.write().unwrap_or_else(|e| e.into_inner()).insert(shape);
    }

    /// Counts a result that nothing compared; `call` is the number of calls of the kernel so far.
    pub(super) fn unchecked(&self, call: u64) {
        if self.unchecked.fetch_add(1, Ordering::Relaxed) == 0 {
            self.since.store(call, Ordering::Relaxed);
        }
    }

    /// For kernels of GPUs, whose matrices the manager does not see: whether the result of a call is to be compared.
    pub(super) fn is_due(&self, call: u64, seed: u64) -> bool {
        let due = call >= self.due.load(Ordering::Relaxed);
        if due {
            self.due.store(next_comparison(call, seed), Ordering::Relaxed);
        }
        due
    }
}

/// What is to be compared once a kernel has computed.
#[derive(Debug)]
pub(super) enum Look {
    /// Nothing: it is linked in.
    Trusted,
    /// Nothing this time.
    No,
    /// A row of its outputs. The checksum is that of the activations.
    Row { matrix: Arc<Matrix>, x: u64 },
    /// All outputs. The error says why the weights can't be read.
    All { matrix: Result<Arc<Matrix>, String>, x: u64 },
}

/// What a look found.
#[derive(Debug)]
pub(super) enum Fault {
    /// The result is wrong, and others can compute it again. The plugin is in quarantine.
    Wrong(String),
    /// Nothing can compute it again.
    Error(ManagerError),
}

/// A checksum of everything that kernels read of activations.
fn of_activations(x: &Activations) -> u64 {
    let mut sum = checksum(x.bytes());
    for (scale, row) in x.scale().iter().zip(x.sum()) {
        sum = sum.rotate_left(7) ^ (u64::from(scale.to_bits()) << 32 | u64::from(*row as u32));
    }
    sum
}

/// Where many scales lie.
fn address(scales: Scales<'_>) -> usize {
    match scales {
        Scales::None => 0,
        Scales::F32 { values, .. } => values.as_ptr() as usize,
        Scales::F16 { values, .. } => values.as_ptr() as usize,
    }
}

/// A checksum of many scales.
fn of_scales(scale: Scale<'_>) -> Option<u64> {
    let step = |sum: u64, bits: u32| (sum ^ u64::from(bits)).wrapping_mul(0x100_0000_01b3).rotate_left(29);
    match scale {
        Scale::One(_) | Scale::Groups(Scales::None) => None,
        Scale::Groups(Scales::F32 { values, .. }) => {
            Some(values.iter().fold(0, |sum, value| step(sum, value.to_bits())))
        }
        Scale::Groups(Scales::F16 { values, .. }) => {
            Some(values.iter().fold(0, |sum, bits| step(sum, u32::from(*bits))))
        }
    }
}

/// Whether two outputs differ; those that are not numbers do not.
fn differ(a: f32, b: f32) -> bool {
    a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan())
}

/// What [`KernelManager::look`] calls weights that a kernel wrote into.
pub(super) const WEIGHTS: &str = "its weights";

impl KernelManager {
    fn key(entry: &Entry, job: &Job) -> Key {
        let kernel = std::ptr::from_ref(entry) as usize;
        let scale = match job.scale {
            Scale::One(scale) => scale.to_bits() as usize,
            Scale::Groups(scales) => address(scales),
        };
        Key { kernel, weights: job.weights.as_ptr() as usize, scale }
    }

    /// Counts a call that a kernel is going to compute, and says what is to be compared then.
    pub(super) fn before(&self, turn: &Turn, job: &Job, x: &Activations) -> Look {
        let entry = turn.entry;
        let Some(watch) = &entry.watch else { return Look::Trusted };
        let (n, k) = job.choice.shape();
        let shape = (x.m(), n, k);
        // What was looked up last for this choice: the same again, most of the time. (No rank and no rows at
        // all are a choice's zero.)
        let (memo, this) = (&job.choice.slot(x.m()).watched, (turn.rank as u64) << 56 | x.m() as u64);
        let shape_is_known = memo.load(Ordering::Relaxed) == this || {
            let known = watch.knows(shape);
            if known {
                memo.store(this, Ordering::Relaxed);
            }
            known
        };
        match job.choice.matrices.count(Self::key(entry, job), self.seed, !shape_is_known) {
            Known::NotDue => Look::No,
            Known::Due(matrix) if shape_is_known => Look::Row { matrix, x: of_activations(x) },
            Known::Due(matrix) => Look::All { matrix: Ok(matrix), x: of_activations(x) },
            Known::No => {
                let matrix = self.new_matrix(job).map_err(|error| error.to_string());
                Look::All { matrix, x: of_activations(x) }
            }
        }
    }

    fn new_matrix(&self, job: &Job) -> Result<Arc<Matrix>, ManagerError> {
        // Loading is over as a rule: what was packed so far is not written any more.
        if let Err(error) = self.sealed.protect() {
            tracing::warn!(%error, "packed weights can't be protected from writes");
        }
        let loads = self.loads.load(Ordering::Relaxed);
        Ok(Arc::new(Matrix::new(self.project(job)?, loads)))
    }

    /// What is kept of a job's weights and scales.
    fn project(&self, job: &Job) -> Result<(Projection, Option<u64>), ManagerError> {
        let (n, k) = job.choice.shape();
        let multipliers = job.choice.matrices.multipliers(n, self.seed);
        let projection = Projection::new(&self.pool, &self.canonical_weights(job)?, k, multipliers);
        Ok((projection, of_scales(job.scale)))
    }

    /// Looks at what a kernel has written for a job. `call` is the number of the kernel's call, from 1.
    ///
    /// # Errors
    /// What is wrong with it. The plugin is in quarantine then.
    pub(super) fn look(
        &self,
        look: Look,
        entry: &Entry,
        job: &Job,
        x: &Activations,
        (y, stride): (&mut [f32], usize),
        call: u64,
    ) -> Result<(), Fault> {
        let Some(watch) = &entry.watch else { return Ok(()) };
        if !entry.ready() {
            return Err(Fault::Wrong("another result of the plugin was wrong meanwhile".into()));
        }
        let y = &mut y[job.column..];
        let (mut right, mut matrix, before, stage) = match look {
            Look::Trusted => return Ok(()),
            Look::No => {
                watch.unchecked(call);
                return Ok(());
            }
            Look::Row { matrix, x: before } => {
                (self.compare_row(&matrix, job, x, y, (stride, call)), Ok(matrix), before, Stage::InUse)
            }
            Look::All { matrix, x: before } => {
                (self.compare_all(job, x, y, stride), matrix, before, Stage::FirstUse)
            }
        };
        if of_activations(x) != before {
            return Err(Fault::Error(self.damaged(entry, "the activations", job.choice.shape())));
        }
        let mut first = stage == Stage::FirstUse;
        match &matrix {
            Err(reason) => right = Err(reason.clone()),
            Ok(_) if right.is_ok() => {}
            Ok(known) => match self.project(job) {
                Ok((now, scales)) if now == known.projection && scales == known.scales => {}
                Ok(now) if known.loads != self.loads.load(Ordering::Relaxed) => {
                    // Other weights lie where those did: this is their first use.
                    right = self.compare_all(job, x, y, stride);
                    matrix = Ok(Arc::new(Matrix::new(now, self.loads.load(Ordering::Relaxed))));
                    first = true;
                }
                _ => {
                    job.choice.matrices.damage(entry.kernel.id());
                    return Err(Fault::Error(self.damaged(entry, WEIGHTS, job.choice.shape())));
                }
            },
        }
        let (m, (n, k)) = (x.m(), job.choice.shape());
        match (right, matrix) {
            (Ok(()), Ok(matrix)) if first => {
                watch.learn((m, n, k));
                job.choice.matrices.learn(Self::key(entry, job), matrix);
            }
            (Ok(()), _) if m == 1 => {}
            (Ok(()), _) => watch.unchecked(call),
            (Err(reason), _) => {
                let reason = format!("[{m}, {k}] x [{n}, {k}]ᵀ: {reason}");
                self.quarantine(entry, stage, reason.clone());
                return Err(Fault::Wrong(reason));
            }
        }
        Ok(())
    }

    /// Quarantines the plugin of a kernel that wrote where it may only read; the error that says so.
    pub(super) fn damaged(&self, entry: &Entry, what: &'static str, (n, k): (usize, usize)) -> ManagerError {
        self.quarantine(entry, Stage::InUse, format!("[{n}, {k}]: it wrote into {what}"));
        ManagerError::Damaged { kernel: entry.kernel.id().into(), what, n, k }
    }

    /// Compares all outputs with a built-in kernel's, and puts those in their place.
    fn compare_all(&self, job: &Job, x: &Activations, y: &mut [f32], stride: usize) -> Result<(), String> {
        let (n, _) = job.choice.shape();
        let mut trusted = vec![0f32; x.m() * n];
        let by = self.run_trusted(job, x, &mut trusted, n).map_err(|error| error.to_string())?;
        let by = by.as_ref().map_or(super::REFERENCE, |entry| entry.kernel.id());
        let mut wrong = None;
        for (m, want) in trusted.chunks_exact(n).enumerate() {
            let got = &mut y[m * stride..][..n];
            if let Some(i) = got.iter().zip(want).position(|(got, want)| differ(*got, *want)) {
                wrong.get_or_insert_with(|| format!("y[{m}, {i}] = {:e}, {by} has {:e}", got[i], want[i]));
            }
            got.copy_from_slice(want);
        }
        wrong.map_or(Ok(()), Err)
    }

    /// Compares one row of outputs with the projection of the weights, and, where that does not do, with the reference.
    fn compare_row(
        &self,
        matrix: &Matrix,
        job: &Job,
        x: &Activations,
        y: &[f32],
        (stride, call): (usize, u64),
    ) -> Result<(), String> {
        let (n, k) = job.choice.shape();
        let m = SplitMix64::new(self.seed ^ call).below(x.m() as u64) as usize;
        let (q, y) = (&x.q()[m * x.stride()..][..k], &y[m * stride..][..n]);
        // (Sums of many scales can't be found again in the outputs.)
        let agrees = match job.scale {
            Scale::One(scale) => {
                let multipliers = job.choice.matrices.multipliers(n, self.seed);
                matrix.projection.agrees(multipliers, q, scale * x.scale()[m], y)
            }
            Scale::Groups(_) => None,
        };
        if agrees == Some(true) {
            return Ok(());
        }
        let weights = self.canonical_weights(job).map_err(|error| error.to_string())?;
        for (i, (&got, row)) in y.iter().zip(weights.chunks_exact(canonical::row_bytes(k))).enumerate() {
            let want = match job.scale {
                Scale::One(scale) => reference::row_sum_products(row, q) as f32 * (scale * x.scale()[m]),
                Scale::Groups(scales) => reference::scaled_row(row, (i, k), scales, rows(x, m..m + 1))[0],
            };
            if differ(got, want) {
                return Err(format!(
                    "y[{m}, {i}] = {got:e}, the reference has {want:e} (call {call} of the kernel)"
                ));
            }
        }
        // The outputs are those of the weights as they are now.
        agrees.map_or(Ok(()), |_| Err("its weights are not what they were".into()))
    }

    /// Computes a job without the kernels of plugins from files: a private packing is unpacked, and the
    /// first built-in kernel that can reads it, or the reference (`None`).
    pub(super) fn run_trusted(
        &self,
        job: &Job,
        x: &Activations,
        y: &mut [f32],
        stride: usize,
    ) -> Result<Option<Arc<Entry>>, ManagerError> {
        let (n, k) = job.choice.shape();
        let weights = &*self.canonical_weights(job)?;
        let signature = self.signature(x.m(), job.choice.of);
        let address = weights.as_ptr() as usize;
        for entry in self.entries() {
            let kernel = &entry.kernel;
            if entry.watch.is_some()
                || kernel.layout().is_some()
                || !entry.ready()
                || !kernel.supports(&signature)
                || !address.is_multiple_of(kernel.weight_alignment())
            {
                continue;
            }
            let part =
                Part { kernel, of: job.choice.of, weights: job.scale.weights(n, k, weights), column: 0 };
            if run_parts(&self.pool, &self.scratch, &[part], x, y, stride).remove(0).is_none() {
                return Ok(Some(entry));
            }
        }
        job.scale.reference(weights, (n, k), x, y, stride);
        Ok(None)
    }

    /// Notes the results of a plugin that callers got and nothing compared.
    fn note_doubts(&self, wrong: &Entry) {
        let plugin = wrong.kernel.plugin();
        for entry in self.entries().iter().filter(|entry| Arc::ptr_eq(entry.kernel.plugin(), plugin)) {
            let Some(watch) = &entry.watch else { continue };
            let unchecked = watch.unchecked.load(Ordering::Relaxed);
            if unchecked > 0 {
                let (kernel, since_call) =
                    (entry.kernel.id().to_owned(), watch.since.load(Ordering::Relaxed));
                lock(&self.doubts).push(Doubt { kernel, unchecked, since_call });
                self.in_doubt.fetch_add(unchecked, Ordering::Relaxed);
            }
        }
    }

    /// Results of plugins that were wrong in use, which callers had got before and which nothing had compared: how many
    /// came into doubt so far. A caller that finds more after a step than before may have got wrong results since its first
    /// [unchecked](Self::unchecked_results) one.
    pub fn results_in_doubt(&self) -> u64 {
        self.in_doubt.load(Ordering::Relaxed)
    }

    /// Results of plugins from files that callers got so far and nothing compared. As long as the number stays, all results
    /// come from kernels that are linked in, or were compared.
    pub fn unchecked_results(&self) -> u64 {
        let entries = self.entries.read().unwrap_or_else(|e| e.into_inner());
        let watched = entries.iter().filter_map(|entry| entry.watch.as_ref());
        watched.map(|watch| watch.unchecked.load(Ordering::Relaxed)).sum()
    }

    /// # Errors
    /// If strict mode forbids to go on after a kernel was wrong: when results are in doubt.
    pub(super) fn forbid_doubt(
        &self,
        entry: &Entry,
        failure: &dyn std::fmt::Display,
    ) -> Result<(), ManagerError> {
        let plugin = entry.kernel.plugin().name();
        let of_plugin = |doubt: &&Doubt| doubt.kernel.split_once('/').is_some_and(|(name, _)| name == plugin);
        let unchecked: u64 = lock(&self.doubts).iter().filter(of_plugin).map(|doubt| doubt.unchecked).sum();
        if !self.config.strict.gated_plugins || unchecked == 0 {
            return Ok(());
        }
        let (kernel, reason) = (entry.kernel.id().to_owned(), failure.to_string());
        Err(ManagerError::Doubtful { kernel, reason, unchecked })
    }

    /// Keeps all kernels of a plugin from computing, now and in later processes.
    pub(super) fn quarantine(&self, entry: &Entry, stage: Stage, reason: String) {
        if matches!(entry.status(), Status::Quarantined(_)) {
            return;
        }
        let plugin = entry.kernel.plugin();
        let kernel = entry.kernel.id();
        self.note_doubts(entry);
        let text = format!("{}: {reason}; none of its kernels is used any more", plugin.origin());
        self.event(EventKind::Quarantined, Some(kernel), None, text);
        for other in self.entries() {
            if Arc::ptr_eq(other.kernel.plugin(), plugin) && !matches!(other.status(), Status::Unavailable(_))
            {
                other.set(Status::Quarantined(format!("kernel {kernel}, {reason}")));
            }
        }
        // New weights get other kernels.
        lock(&self.choices).clear();
        let Origin::File { sha256, path } = plugin.origin() else { return };
        let known = self.store.verdict(sha256);
        let refusal = Some(Refusal { stage, trying: Some(format!("kernel {kernel}")), reason });
        let report = match known {
            Some(report) => gate::Report { refusal, ..report },
            None => gate::Report {
                gate: gate::GATE_VERSION,
                abi: gate::host_abi(),
                sha256: sha256.clone(),
                file: path.clone(),
                plugin: None,
                gpu: None,
                helper: String::new(),
                confinement: gate::Confinement::default(),
                kernels: Vec::new(),
                refusal,
                warnings: Vec::new(),
                log: Vec::new(),
                seconds: 0.0,
            },
        };
        self.store.remember(&report);
    }
}

impl Entry {
    /// Counts a call; how many there are now.
    pub(super) fn count(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed) + 1
    }
}
