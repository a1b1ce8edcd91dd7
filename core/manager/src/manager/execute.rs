//! A matmul: which kernel computes each of its matrices, and what happens when one fails.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::adapt::Turn;
use super::cpu_kernels::{FallbackWeights, seal_of};
use super::parts::{Few, Part, run_parts};
use super::report::Failure;
use super::watch::{Fault, Look};
use super::{
    Entry, Fallback, FallbackPolicy, Job, KernelManager, LayoutPolicy, ManagerError, Packed, REFERENCE, lock,
};
use crate::gate::Stage;
use crate::memory::Activations;
use crate::plugin::KernelFailure;

/// A job of a matmul that has not been computed yet.
struct Pending<'a> {
    job: &'a Job<'a>,
    /// Kernels that failed at it, a bit by rank, and the last of them.
    tried: u16,
    failed: Option<(Arc<Entry>, KernelFailure)>,
    turn: Option<Turn<'a>>,
    /// What is to be compared afterwards.
    look: Look,
    /// The result is there: the kernel's first use of the shape made it.
    computed: bool,
}

impl<'a> Pending<'a> {
    /// What its turn is to run, if that is to be timed or not.
    fn part(&self, timed: bool) -> Option<Part<'a>> {
        let turn = self.turn.filter(|turn| !self.computed && turn.timed.is_some() == timed)?;
        let (n, k) = self.job.choice.shape();
        let weights = self.job.scale.weights(n, k, self.job.choice.own_bytes(self.job.weights));
        Some(Part { kernel: &turn.entry.kernel, of: self.job.choice.of, weights, column: self.job.column })
    }
}

impl KernelManager {
    /// y[m, column + i] = activations of row m times row i of each job's weights, in one fork-join.
    ///
    /// What happens when a kernel fails or becomes slow is the [policy](super::FallbackPolicy)'s; it is counted
    /// and reported, and strict mode may refuse it. Kernels of plugins from files are watched ([`gate`](crate::gate),
    /// stages 2 and 3).
    ///
    /// # Errors
    /// If the operands do not fit together, or strict mode or the policy forbids what is left.
    pub fn matmul(
        &self,
        jobs: &[Job],
        x: &Activations,
        y: &mut [f32],
        stride: usize,
    ) -> Result<(), ManagerError> {
        let m = x.m();
        self.check_operands(jobs, x, y, stride)?;
        if m == 0 {
            return Ok(());
        }
        let start =
            |job| Pending { job, tried: 0, failed: None, turn: None, look: Look::Trusted, computed: false };
        let mut pending: Few<Pending> = jobs.iter().map(start).collect();
        while !pending.is_empty() {
            for pending in &mut pending {
                let Pending { job, tried, failed, turn, look, computed } = pending;
                *turn = self.select(job, m, *tried)?;
                match (turn.as_ref(), failed.take()) {
                    (None, failed) => self.run_last(job, failed, x, y, stride)?,
                    (Some(turn), Some((from, failure))) => {
                        let (to, (n, k)) = (turn.entry.kernel.id(), job.choice.shape());
                        self.record_fallback(&from, to, (m, n, k), failure.to_string());
                    }
                    (Some(_), None) => {}
                }
                let Some(turn) = turn else { continue };
                match self.first_use(job, turn, x, y, stride) {
                    Ok(is_result) => {
                        *computed = is_result;
                        *look = self.before(turn, job, x);
                    }
                    Err(failure) => self.failed(pending, m, Stage::FirstUse, failure)?,
                }
            }
            pending.retain(|pending| pending.turn.is_some() || pending.failed.is_some());
            let together: Few<Part> = pending.iter().filter_map(|pending| pending.part(false)).collect();
            let mut failures = match together.is_empty() {
                true => Few::new(),
                false => run_parts(&self.pool, &self.scratch, &together, x, y, stride),
            }
            .into_iter();
            for pending in &mut pending {
                let (job, Some(turn)) = (pending.job, pending.turn) else { continue };
                let failure = match (turn.timed, pending.part(true)) {
                    _ if pending.computed => None,
                    (Some(call), Some(part)) => {
                        // By itself, so that the time is this kernel's alone.
                        let from = self.config.probe.now();
                        let failure = run_parts(&self.pool, &self.scratch, &[part], x, y, stride).remove(0);
                        if failure.is_none() {
                            self.timed(job, x, turn, call, (from, self.config.probe.now()));
                        }
                        failure
                    }
                    _ => failures.next().expect("one for each part"),
                };
                let look = std::mem::replace(&mut pending.look, Look::Trusted);
                let failure = match failure {
                    Some(failure) => failure,
                    None => match self.look(look, turn.entry, job, x, (y, stride), turn.entry.count()) {
                        Ok(()) => continue,
                        Err(Fault::Wrong(reason)) => KernelFailure::WrongResult { reason },
                        Err(Fault::Error(error)) => return Err(error),
                    },
                };
                self.failed(pending, m, Stage::InUse, failure)?;
            }
            pending.retain(|pending| pending.failed.is_some());
        }
        Ok(())
    }

    /// Notes that the kernel whose turn it was has failed, and what that means for later calls.
    ///
    /// # Errors
    /// If the policy forbids a fallback.
    fn failed(
        &self,
        pending: &mut Pending,
        m: usize,
        stage: Stage,
        failure: KernelFailure,
    ) -> Result<(), ManagerError> {
        let (choice, turn) = (pending.job.choice, pending.turn.take().expect("it was a kernel's turn"));
        let fault = failure.is_fault();
        turn.entry.fail(if fault { Failure::Wrong } else { Failure::Status });
        if let KernelFailure::Forbidden { reason } = &failure {
            let (n, k) = choice.shape();
            self.condemn(turn.entry, stage, format!("[{m}, {k}] x [{n}, {k}]ᵀ: {reason}"));
        }
        if fault {
            self.forbid_doubt(turn.entry, &failure)?;
        }
        if self.policy == FallbackPolicy::Never {
            return Err(self.no_fallback(turn.entry, choice.shape(), m, failure.to_string()));
        }
        if !fault {
            self.demote(choice, m, turn.rank, failure.to_string());
        }
        pending.tried |= 1 << turn.rank;
        pending.failed = Some((turn.entry.clone(), failure));
        Ok(())
    }

    fn check_operands(
        &self,
        jobs: &[Job],
        x: &Activations,
        y: &[f32],
        stride: usize,
    ) -> Result<(), ManagerError> {
        let fail = |message: String| Err(ManagerError::Operands(message));
        // One that ends behind all columns that there are exceeds any output.
        let columns = |job: &Job| (job.column, job.column.saturating_add(job.choice.of.n));
        let mut end = 0;
        for (i, job) in jobs.iter().enumerate() {
            let (n, k) = job.choice.shape();
            if k != x.k() {
                return fail(format!("weights [{n}, {k}] do not fit activations [{}, {}]", x.m(), x.k()));
            }
            job.check_scales(x)?;
            if job.weights.len() != job.choice.weight_bytes() {
                return fail(format!(
                    "weights [{n}, {k}] take {} bytes in the layout {}, not {}",
                    job.choice.weight_bytes(),
                    job.choice.layout().unwrap_or("canonical"),
                    job.weights.len()
                ));
            }
            if let Some(kernel) = job.choice.matrices.damaged() {
                return Err(ManagerError::Damaged {
                    kernel: kernel.clone(),
                    what: super::watch::WEIGHTS,
                    n,
                    k,
                });
            }
            let (from, to) = columns(job);
            let overlaps = |other: &Job| columns(other).0 < to && from < columns(other).1;
            if to > stride || jobs[..i].iter().any(overlaps) {
                let columns: Vec<_> = jobs.iter().map(columns).collect();
                return fail(format!("columns {columns:?} overlap or exceed the output's {stride}"));
            }
            end = end.max(to);
        }
        let rows = x.m().saturating_sub(1);
        let needed = rows.checked_mul(stride).and_then(|before| before.checked_add(end));
        if x.m() > 0 && needed.is_none_or(|needed| y.len() < needed) {
            return fail(format!("an output of {} elements can't hold {} rows of {stride}", y.len(), x.m()));
        }
        Ok(())
    }

    /// A job's weights in the canonical layout, unpacked if they are in a private one.
    pub(super) fn canonical_weights<'a>(&self, job: &Job<'a>) -> Result<Cow<'a, [u8]>, ManagerError> {
        match job.choice.packer {
            None => Ok(Cow::Borrowed(job.weights)),
            Some(_) => Ok(Cow::Owned(self.unpack(job.choice, job.weights)?)),
        }
    }

    /// Fallback after all ranked kernels failed. Weights in the packing of a plugin from a file are packed anew,
    /// once, for other kernels, which can't read that packing; other weights are computed by the reference.
    fn run_last(
        &self,
        job: &Job,
        failed: Option<(Arc<Entry>, KernelFailure)>,
        x: &Activations,
        y: &mut [f32],
        stride: usize,
    ) -> Result<(), ManagerError> {
        let (n, k) = job.choice.shape();
        let m = x.m();
        if let Some(packer) = job.choice.packer.as_ref().filter(|packer| packer.watch.is_some()) {
            let fallback_weights = self.fallback_weights(job, packer)?;
            let job = fallback_weights.job(job);
            if let Some((from, failure)) = failed {
                let to = self.first_ready(job.choice, m);
                let to = to.as_ref().map_or(REFERENCE, |entry| entry.kernel.id());
                self.record_fallback(&from, to, (m, n, k), failure.to_string());
            }
            return self.matmul(&[job], x, y, stride);
        }
        match failed {
            Some((from, failure)) if !self.config.strict.allows_reference() => {
                return Err(self.no_fallback(&from, (n, k), m, failure.to_string()));
            }
            None if !self.config.strict.allows_reference() => return Err(self.no_kernel(m, job.choice.of)),
            Some((from, failure)) => {
                self.record_fallback(&from, REFERENCE, (m, n, k), failure.to_string());
            }
            None => {}
        }
        let (weights, out) = (&self.canonical_weights(job)?, &mut y[job.column..]);
        job.scale.reference(weights, (n, k), x, out, stride);
        self.reference_calls.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The weights of a job in another packing than that of its choice, which a plugin from a file made.
    pub(super) fn fallback_weights(
        &self,
        job: &Job,
        packer: &Entry,
    ) -> Result<Arc<FallbackWeights>, ManagerError> {
        let seal = seal_of(job.weights).ok_or_else(|| ManagerError::Operands("no weights".into()))?;
        let mut known = lock(&job.choice.fallback_weights);
        if let Some(fallback_weights) = known.get(&seal) {
            return Ok(fallback_weights.clone());
        }
        // A plugin that only takes a rest, or became slow, would be chosen again.
        let policy = if packer.ready() { LayoutPolicy::BuiltIn } else { LayoutPolicy::Any };
        let canonical = self.unpack(job.choice, job.weights)?;
        let (choice, packed) = self.choose_and_pack(job.choice.of, policy, &canonical)?;
        let canonical = if matches!(packed, Packed::Canonical) { canonical } else { Vec::new() };
        let fallback_weights = Arc::new(FallbackWeights { choice, canonical, packed });
        known.insert(seal, fallback_weights.clone());
        // Whoever chooses next gets a choice without these, so that they go with the weights.
        lock(&self.choices).retain(|_, choice| !std::ptr::eq(&**choice, job.choice));
        Ok(fallback_weights)
    }

    /// Counts that a kernel failed at a shape and what took its place.
    pub(super) fn record_fallback(
        &self,
        from: &Entry,
        to: &str,
        shape: (usize, usize, usize),
        reason: String,
    ) {
        let kernel = from.kernel.id();
        let mut fallbacks = lock(&self.fallbacks);
        let same = |f: &&mut Fallback| {
            f.kernel == kernel && f.replacement == to && (f.shape.1, f.shape.2) == (shape.1, shape.2)
        };
        match fallbacks.iter_mut().find(same) {
            Some(known) => known.count += 1,
            None => {
                let (kernel, replacement) = (kernel.into(), to.into());
                fallbacks.push(Fallback { kernel, replacement, shape, reason, count: 1 });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::ManagerConfig;

    #[test]
    fn operands_whose_sizes_wrap_around_are_refused_and_nothing_is_written() {
        let manager = KernelManager::new(ManagerConfig { threads: 1, ..ManagerConfig::default() }).unwrap();
        let choice = manager.choose((64, 128), LayoutPolicy::Canonical).unwrap();
        let (weights, x) = (vec![0xaa; 64 * 32], Activations::from_rows(&[1.0; 9 * 128], 128));
        let mut y = vec![7.0; 9 * 64];
        // The columns would begin in front of `y`; the ninth row would be its first; all rows would be one.
        for (column, stride) in [(usize::MAX - 15, 64), (0, 1 << 61), (0, 1 << 63), (1 << 63, usize::MAX)] {
            let job = Job { choice: &choice, weights: &weights, scale: 1.0.into(), column };
            let error = manager.matmul(&[job, job], &x, &mut y, stride).unwrap_err();
            assert!(matches!(error, ManagerError::Operands(_)), "{error}");
            let error = manager.matmul(&[job], &x, &mut y, stride).unwrap_err();
            assert!(matches!(error, ManagerError::Operands(_)), "{error}");
        }
        assert!(y.iter().all(|&y| y == 7.0));
        for (n, k) in [(usize::MAX, 128), (1 << 60, 1 << 12), (1 << 63, 1), (1, usize::MAX), (0, 1)] {
            let error = manager.choose((n, k), LayoutPolicy::Any).unwrap_err();
            assert!(matches!(error, ManagerError::Operands(_)), "{error}");
        }
    }
}
