//! Weights in the packing of a plugin from a file whose kernels became slow: they are packed anew for others, where that
//! pays.
//!
//! Only kernels that read a layout can take part in its [races](super::slot). Where all of them became slow, the layout
//! itself is in question: kernels of other layouts are compared, first by what tuning has for them, then by a measurement
//! on the call at hand.

use super::report::EventKind;
use super::slot::{RACE_TURNS, Slowdown, median, microseconds, scaled};
use super::tune_cpu::{CpuContest, identity};
use super::tuner::Contest as _;
use super::{CpuKernels, Entry, Job, KernelManager, LayoutPolicy};
use crate::memory::Activations;
use std::sync::Arc;

/// Both forms of the weights stay in memory: the other one must take less than this part of the time.
const WORTH_IT: f64 = 0.5;

impl KernelManager {
    /// The kernels that read a job's weights became slow. If they are packed by a plugin from a file, and others are so
    /// much faster that it pays, its shape and bucket of rows leaves that packing. Whether it did.
    pub(super) fn repack(&self, job: &Job, x: &Activations, slow: Slowdown) -> bool {
        let (m, of) = (x.m(), job.choice.of);
        let n = of.n;
        let Some(packer) = job.choice.packer.as_ref().filter(|packer| packer.watch.is_some()) else {
            return false;
        };
        let now = &self.ranking(job.choice, m).candidates[slow.rank];
        let others = self.rank(m, of, LayoutPolicy::BuiltIn).candidates;
        let best = others.iter().filter_map(|other| other.measurement.median_ns).min();
        let promising = match (best, now.measurement.median_ns) {
            (Some(best), Some(tuned)) => (best as f64) < tuned as f64 * slow.factor() * WORTH_IT,
            _ => !others.is_empty(),
        };
        if !promising || self.memory_is_low() {
            return false;
        }
        let Ok(weights) = self.fallback_weights(job, packer) else { return false };
        let (other, mut y) = (Job { column: 0, ..weights.job(job) }, vec![0.0; m * n]);
        let mut times = Vec::new();
        for _ in 0..=RACE_TURNS {
            let from = self.config.probe.now();
            if self.matmul(&[other], x, &mut y, n).is_err() {
                job.choice.forget_fallback_weights(job.weights);
                return false;
            }
            times.push(scaled(self.config.probe.now().saturating_sub(from), m));
        }
        // The first turn found its code and its buffers in memory.
        let time = median(&times[1..]).expect("there was a race");
        let winner = self.first_ready(&weights.choice, m);
        let Some(winner) = winner.filter(|_| time < slow.time * WORTH_IT) else {
            job.choice.forget_fallback_weights(job.weights);
            return false;
        };
        job.choice.slot(m).leave();
        let reason = format!(
            "{} for {} ({}), now that {} takes {}, {:.1} times what was expected: weights are packed anew",
            microseconds(time),
            winner.kernel.id(),
            weights.choice.layout().unwrap_or("canonical"),
            now.kernel(),
            microseconds(slow.time),
            slow.factor(),
        );
        self.event(EventKind::Retuned, Some(winner.kernel.id()), Some((m, n, of.k)), reason);
        if let Some(tuned) = now.measurement.median_ns {
            // On tuning's scale.
            let scale = |time: f64| (tuned as f64 * time / slow.expected) as u64;
            let times = [(identity(&now.entry), scale(slow.time)), (identity(&winner), scale(time))];
            let contest = CpuContest { manager: self, of, policy: LayoutPolicy::Any };
            let rows = self.ranking(job.choice, m).rows;
            self.tuner.remeasured(&contest.signature(rows), times.into_iter());
        }
        true
    }

    /// The kernel that computes m rows of a choice next.
    pub(super) fn first_ready(&self, choice: &CpuKernels, m: usize) -> Option<Arc<Entry>> {
        let candidates = &self.ranking(choice, m).candidates;
        let rank = choice.slot(m).first(|rank| candidates[rank].entry.ready())?;
        Some(candidates[rank].entry.clone())
    }
}
