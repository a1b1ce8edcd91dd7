//! Kernels that are GPU source: the manager lists them, packs for them, compares their results and quarantines those
//! that were wrong. `bitnet-burn-backends`, which has the device, compiles, launches and times them, as a [`Contest`].

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bitnet_burn_plugin::abi::Signature;
use bitnet_burn_plugin::canonical;

use super::report::{EventKind, Failure};
use super::tune_cpu::identity;
use super::tuner::{Contest, Standings};
use super::watch::WEIGHTS;
use super::{
    CpuKernels, Entry, FallbackPolicy, Job, KernelManager, ManagerError, Measurement, packing,
    registry::names,
};
use crate::gate::Stage;
use crate::gpu::close;
use crate::memory::{Activations, PageBuffer};
use crate::plugin::{Kernel, Target};
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::reference;

/// A registered kernel for a GPU.
#[derive(Clone, Debug)]
pub struct GpuKernel(Arc<Entry>);

impl PartialEq for GpuKernel {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for GpuKernel {}

impl Hash for GpuKernel {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

impl GpuKernel {
    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.0.kernel
    }

    /// Whether nothing wrong is known of it.
    pub fn ready(&self) -> bool {
        self.0.ready()
    }

    /// Whether it claims to compute [m, k] x [n, k]ᵀ.
    pub fn supports(&self, m: usize, n: usize, k: usize) -> bool {
        self.0.kernel.supports(&Signature::ternary(m as u64, n as u64, k as u64, 1))
    }

    /// Bytes of weights [n, k] as [`KernelManager::pack_for_gpu`] gives them; `None` if it can't pack them.
    pub fn weight_bytes(&self, n: usize, k: usize) -> Option<usize> {
        match self.0.kernel.layout() {
            Some(_) => packing::stored_bytes(&self.0, n, k),
            None => canonical::matrix_bytes(n, k),
        }
    }

    /// What the cache calls it: this exact build.
    pub fn identity(&self) -> String {
        identity(&self.0)
    }

    /// Counts a call whose result is used without having been compared in full; whether it is one of those that
    /// [`KernelManager::spot_check`] should see.
    pub fn count(&self, manager: &KernelManager) -> bool {
        let call = self.0.count();
        self.0.watch.as_ref().is_some_and(|watch| {
            watch.unchecked(call);
            watch.is_due(call, manager.seed)
        })
    }

    /// Counts a call whose result was compared in full ([`KernelManager::check_first`]).
    pub fn count_compared(&self) {
        self.0.count();
    }
}

/// Outputs of a spot check.
const COMPARED_FEATURES: usize = 8;

impl KernelManager {
    /// The kernels that may compute [m, k] x [n, k]ᵀ on a GPU of this language: the forced one alone, if one is
    /// forced.
    pub fn gpu_kernels(&self, target: Target, (m, n, k): (usize, usize, usize)) -> Vec<GpuKernel> {
        let force = &self.config.force;
        let may = |entry: &Entry| {
            entry.ready()
                && entry.kernel.target() == target
                && force.as_ref().is_none_or(|name| names(&entry.kernel, name))
        };
        let signature = Signature::ternary(m as u64, n as u64, k as u64, 1);
        let kernels = self.entries().into_iter().filter(|entry| may(entry) && self.claims(entry, &signature));
        kernels.map(GpuKernel).collect()
    }

    /// Canonical weights [n, k] in a kernel's private layout, with the checksum of what was packed. What comes out is
    /// unpacked again and compared; the plugin is quarantined if it differs.
    ///
    /// # Errors
    /// If memory is short, or the kernel fails or packs wrongly.
    pub fn pack_for_gpu(
        &self,
        kernel: &GpuKernel,
        n: usize,
        k: usize,
        weights: &[u8],
    ) -> Result<PageBuffer, ManagerError> {
        self.pack_sealed(&kernel.0, n, k, weights)
    }

    /// The canonical form of what [`pack_for_gpu`](Self::pack_for_gpu) packed.
    ///
    /// # Errors
    /// If the kernel can't, or it is not what was packed.
    pub fn unpack_for_gpu(
        &self,
        kernel: &GpuKernel,
        n: usize,
        k: usize,
        packed: &[u8],
    ) -> Result<Vec<u8>, ManagerError> {
        packing::unpack(&kernel.0, &self.pool, n, k, packed)
    }

    /// Compares a GPU kernel's first result for an exact shape with that of a built-in kernel of the CPU (or of the
    /// reference, if there is none), which is put in its place. If it is wrong, the plugin is in quarantine.
    /// `weights` are canonical; the rows of `y` are n long.
    ///
    /// # Errors
    /// If there is no trusted result, or the result was wrong and the policy forbids a fallback.
    pub fn check_first(
        &self,
        kernel: &GpuKernel,
        (n, weights, scale): (usize, &[u8], f32),
        x: &Activations,
        y: &mut [f32],
    ) -> Result<(), ManagerError> {
        let (m, k) = (x.m(), x.k());
        let choice = CpuKernels::new((n, k).into(), None);
        let mut trusted = vec![0f32; m * n];
        let by = self.run_trusted(
            &Job { choice: &choice, weights, scale: scale.into(), column: 0 },
            x,
            &mut trusted,
            n,
        )?;
        if let Some(i) = (0..m * n).find(|&i| !close(y[i], trusted[i])) {
            let by = by.as_ref().map_or(super::REFERENCE, |entry| entry.kernel.id());
            let (row, column) = (i / n, i % n);
            let reason = format!(
                "[{m}, {k}] x [{n}, {k}]ᵀ: y[{row}, {column}] = {:e}, {by} has {:e}",
                y[i], trusted[i]
            );
            self.wrong_on_gpu(kernel, Stage::FirstUse, &reason, (m, n, k))?;
        }
        y.copy_from_slice(&trusted);
        Ok(())
    }

    /// Compares some outputs of a later call with the reference; whether they are right. If not, the plugin is in
    /// quarantine, and the output must be computed again.
    ///
    /// # Errors
    /// If they are wrong and the policy forbids a fallback.
    pub fn spot_check(
        &self,
        kernel: &GpuKernel,
        (n, weights, scale): (usize, &[u8], f32),
        x: &Activations,
        y: &[f32],
    ) -> Result<bool, ManagerError> {
        let (m, k, row_bytes) = (x.m(), x.k(), canonical::row_bytes(x.k()));
        let mut random = SplitMix64::new(self.seed ^ kernel.0.calls.load(Ordering::Relaxed));
        let row = random.below(m as u64) as usize;
        let q = &x.q()[row * x.stride()..][..k];
        for _ in 0..COMPARED_FEATURES.min(n) {
            let column = random.below(n as u64) as usize;
            let codes = &weights[column * row_bytes..][..row_bytes];
            let want = reference::row_sum_products(codes, q) as f32 * (scale * x.scale()[row]);
            let got = y[row * n + column];
            if !close(got, want) {
                let reason = format!(
                    "[{m}, {k}] x [{n}, {k}]ᵀ: y[{row}, {column}] = {got:e}, the reference has {want:e} (call {} of \
                     the kernel)",
                    kernel.0.calls.load(Ordering::Relaxed)
                );
                self.wrong_on_gpu(kernel, Stage::InUse, &reason, (m, n, k))?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn wrong_on_gpu(
        &self,
        kernel: &GpuKernel,
        stage: Stage,
        reason: &str,
        shape: (usize, usize, usize),
    ) -> Result<(), ManagerError> {
        self.quarantine(&kernel.0, stage, reason.to_owned());
        self.forbid_doubt(&kernel.0, &reason)?;
        self.give_way(kernel, Failure::Wrong, shape, format!("wrong result: {reason}"))
    }

    /// Quarantines the plugin of a GPU kernel after whose calls the weights [n, k] were not what they had been; the error
    /// that says so.
    pub fn wrote_into_weights(&self, kernel: &GpuKernel, (n, k): (usize, usize)) -> ManagerError {
        self.damaged(&kernel.0, WEIGHTS, (n, k))
    }

    /// Counts and reports that a GPU kernel could not compute a shape, and the operation's default body does from now on.
    ///
    /// # Errors
    /// If the policy forbids a fallback.
    pub fn gpu_failed(
        &self,
        kernel: &GpuKernel,
        shape: (usize, usize, usize),
        reason: String,
    ) -> Result<(), ManagerError> {
        self.event(EventKind::Demoted, Some(kernel.kernel().id()), Some(shape), reason.clone());
        self.give_way(kernel, Failure::Status, shape, reason)
    }

    fn give_way(
        &self,
        kernel: &GpuKernel,
        kind: Failure,
        shape: (usize, usize, usize),
        reason: String,
    ) -> Result<(), ManagerError> {
        kernel.0.fail(kind);
        if self.policy == FallbackPolicy::Never {
            return Err(self.no_fallback(&kernel.0, (shape.1, shape.2), shape.0, reason));
        }
        self.record_fallback(&kernel.0, DEFAULT_BODY, shape, reason);
        Ok(())
    }

    /// The kernels of a contest for `m` rows, the fastest first; measured if that has not been done on this machine.
    pub fn rank_in<C: Contest>(&self, contest: &C, m: usize) -> Standings<C::Kernel> {
        self.tuner.rank(contest, m)
    }

    /// A kernel that packs the layout that the weights of a contest should have, by the rules of
    /// [`choose`](Self::choose); `None` for the canonical one.
    pub fn packer_in<C: Contest>(&self, contest: &C) -> Option<C::Kernel> {
        self.tuner.packer(contest)
    }

    /// What was measured under a [signature](Contest::signature), on this machine.
    pub fn measurements(&self, signature: &str) -> Option<Vec<Measurement>> {
        self.tuner.measurements(signature)
    }

    /// Whether the budget for measurements leaves time for another one.
    pub fn may_tune(&self) -> bool {
        self.tuner.has_time()
    }
}

/// Name under which reports and measurements have the operation's default body.
pub const DEFAULT_BODY: &str = "default body";
