//! The second and third stage of the [gate]: kernels of plugins from files, watched while
//! they compute.
//!
//! * The first result of a kernel for every exact (M, N, K) is compared, all of it, with that of a
//!   built-in kernel (or of the reference, where there is none), whose result is returned.
//! * After that, one call in [`COMPARED_EVERY`] is compared with the reference in [`COMPARED_FEATURES`] places of
//!   one row of activations. Which, follows from the number of the call: nothing is random, and nothing
//!   asks a clock.
//!
//! A mismatch quarantines the plugin with all its kernels, for this process and, through its verdict, for
//! later ones; the call is computed again by what is left.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};

use bitnet_burn_plugin::canonical;

use super::packing;
use super::parts::{Part, run_parts};
use super::report::EventKind;
use super::{Entry, Job, KernelManager, ManagerError, Status, abi_weights, lock};
use crate::gate::{self, Refusal, Stage};
use crate::memory::Activations;
use crate::plugin::Origin;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::reference;

/// One call in this many is compared: a prime, so that it falls on other layers every time.
pub(super) const COMPARED_EVERY: u64 = 251;
/// Output features that are compared then.
pub(super) const COMPARED_FEATURES: usize = 8;

/// The shapes (M, N, K) for which a kernel has computed what a built-in one has.
#[derive(Debug, Default)]
pub(super) struct Watch(RwLock<HashSet<(usize, usize, usize)>>);

impl Watch {
    fn knows(&self, shape: (usize, usize, usize)) -> bool {
        self.0.read().unwrap_or_else(|e| e.into_inner()).contains(&shape)
    }

    fn learn(&self, shape: (usize, usize, usize)) {
        self.0.write().unwrap_or_else(|e| e.into_inner()).insert(shape);
    }
}

impl KernelManager {
    /// What a kernel has written for a job, looked at if it is its turn. `call` is the number of calls of
    /// the kernel before.
    ///
    /// # Errors
    /// What is wrong with it. The plugin is in quarantine then, and the output must be computed again.
    pub(super) fn look(
        &self,
        (rank, entry): (usize, &Entry),
        job: &Job,
        x: &Activations,
        y: &mut [f32],
        stride: usize,
        call: u64,
    ) -> Result<(), String> {
        let Some(watch) = &entry.watch else { return Ok(()) };
        if !entry.ready() {
            return Err("another result of the plugin was wrong meanwhile".into());
        }
        let (n, k) = job.choice.shape();
        let shape = (x.m(), n, k);
        // What was looked up last for this choice: the same again, most of the time. (No rank and no rows at
        // all are a choice's zero.)
        let (memo, this) = (&job.choice.slot(x.m()).watched, (rank as u64) << 56 | x.m() as u64);
        let known = memo.load(Ordering::Relaxed) == this || {
            let known = watch.knows(shape);
            if known {
                memo.store(this, Ordering::Relaxed);
            }
            known
        };
        let (stage, result) = if !known {
            (Stage::FirstUse, self.compare_all(job, x, &mut y[job.column..], stride))
        } else if call % COMPARED_EVERY == COMPARED_EVERY - 1 {
            (Stage::InUse, self.compare_some(entry, job, x, &y[job.column..], stride, call))
        } else {
            return Ok(());
        };
        match result {
            Ok(()) if stage == Stage::FirstUse => watch.learn(shape),
            Ok(()) => {}
            Err(reason) => {
                let reason = format!("[{}, {k}] x [{n}, {k}]ᵀ: {reason}", x.m());
                self.quarantine(entry, stage, reason.clone());
                return Err(reason);
            }
        }
        Ok(())
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
            let differs = |(got, want): (&f32, &f32)| {
                got.to_bits() != want.to_bits() && !(got.is_nan() && want.is_nan())
            };
            if let Some(i) = got.iter().zip(want).position(differs) {
                wrong.get_or_insert_with(|| format!("y[{m}, {i}] = {:e}, {by} has {:e}", got[i], want[i]));
            }
            got.copy_from_slice(want);
        }
        wrong.map_or(Ok(()), Err)
    }

    /// Compares some outputs with the reference.
    fn compare_some(
        &self,
        entry: &Entry,
        job: &Job,
        x: &Activations,
        y: &[f32],
        stride: usize,
        call: u64,
    ) -> Result<(), String> {
        let (n, k) = job.choice.shape();
        let mut random = SplitMix64::new(call);
        let m = random.next_u64() as usize % x.m();
        let q = &x.q()[m * x.stride()..][..k];
        let row_bytes = canonical::row_bytes(k);
        for _ in 0..COMPARED_FEATURES.min(n) {
            let row = random.next_u64() as usize % n;
            let unpacked;
            let codes = match job.choice.packer {
                None => &job.weights[row * row_bytes..][..row_bytes],
                Some(_) => {
                    unpacked = packing::unpack_row(entry, n, k, job.weights, row)
                        .map_err(|failure| format!("unpack of row {row}: {failure}"))?;
                    &unpacked
                }
            };
            let want = reference::row_sum_products(codes, q) as f32 * (job.scale * x.scale()[m]);
            let got = y[m * stride + row];
            if got.to_bits() != want.to_bits() && !(got.is_nan() && want.is_nan()) {
                return Err(format!(
                    "y[{m}, {row}] = {got:e}, the reference has {want:e} (call {} of the kernel)",
                    call + 1
                ));
            }
        }
        Ok(())
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
        let signature = self.signature(x.m(), n, k);
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
            let part = Part { kernel, weights: abi_weights(n, k, job.scale, weights), column: 0 };
            if run_parts(&self.pool, &self.scratch, &[part], x, y, stride).remove(0).is_none() {
                return Ok(Some(entry));
            }
        }
        reference::matmul(weights, n, k, job.scale, x.q(), x.stride(), x.scale(), x.m(), y, stride);
        Ok(None)
    }

    /// Keeps all kernels of a plugin from computing, now and in later processes.
    pub(super) fn quarantine(&self, entry: &Entry, stage: Stage, reason: String) {
        if matches!(entry.status(), Status::Quarantined(_)) {
            return;
        }
        let plugin = entry.kernel.plugin();
        let kernel = entry.kernel.id();
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
                kernels: Vec::new(),
                refusal,
                warnings: Vec::new(),
                seconds: 0.0,
            },
        };
        self.store.remember(&report);
    }
}

impl Entry {
    /// Counts a call; how many there were before.
    pub(super) fn count(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed)
    }
}
