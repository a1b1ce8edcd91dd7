//! Kernels for the first calls of a process: chosen without measuring, for weights where they lie.

use std::sync::Arc;

use super::tune_cpu::{Candidate, CpuContest};
use super::tuner::Standings;
use super::{CpuKernels, KernelManager, LayoutPolicy, Ranking, ScaleKind, WeightShape, bucket, lock};

impl KernelManager {
    /// Built-in kernels that read canonical weights of a shape where they lie. Nothing is measured for them: their order is
    /// that of earlier measurements, or else that of their registration (the widest instructions first).
    ///
    /// `None` where that would be slow or is not allowed: for weights with many scales, whose canonical kernels are scalar,
    /// where a kernel is forced, and where no kernel fits.
    pub fn choose_unmeasured(&self, of: impl Into<WeightShape>) -> Option<Arc<CpuKernels>> {
        let of = of.into();
        if self.config.force.is_some() || of.scales != ScaleKind::One || of.check().is_err() {
            return None;
        }
        let built_in = |entry: &Arc<super::Entry>| entry.watch.is_none();
        if !self.candidates(1, of, LayoutPolicy::Canonical).iter().any(built_in) {
            return None;
        }
        let choice = Arc::new(CpuKernels::unmeasured(of));
        let mut made = lock(&self.made);
        made.retain(|known| known.strong_count() > 0);
        made.push(Arc::downgrade(&choice));
        Some(choice)
    }

    /// The ranking for `m` rows of such a choice.
    pub(super) fn known_ranking(&self, m: usize, of: WeightShape) -> Ranking {
        let contest = CpuContest { manager: self, of, policy: LayoutPolicy::Canonical };
        let Standings { rows, kernels, source } = self.tuner.known(&contest, bucket(m));
        let candidates = kernels
            .into_iter()
            .filter(|(entry, _)| entry.watch.is_none())
            .map(|(entry, measurement)| Candidate { entry, measurement })
            .collect();
        Ranking { rows, candidates, source }
    }
}
