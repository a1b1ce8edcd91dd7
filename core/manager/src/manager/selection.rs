//! Selection: which kernels and which layout the weights of a shape get.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bitnet_burn_plugin::abi::{self, Signature};
use bitnet_burn_plugin::canonical;

use super::registry::names;
use super::tune_cpu::CpuContest;
use super::tuner::Weighed;
use super::{
    BUCKETS, CpuKernels, Entry, FallbackPolicy, KernelManager, LayoutCost, LayoutPolicy, ManagerError,
    Packed, Ranking, ScaleKind, Status, WeightShape, bucket, lock, packing,
};
use crate::gate;
use crate::memory::PageBuffer;
use crate::plugin::Target;

impl KernelManager {
    /// A kernel failed, and the policy forbids a fallback.
    pub(super) fn no_fallback(
        &self,
        entry: &Entry,
        (n, k): (usize, usize),
        m: usize,
        reason: String,
    ) -> ManagerError {
        let forbids = match self.policy {
            FallbackPolicy::Never if self.config.strict.no_fallback => "strict mode (no-fallback)",
            FallbackPolicy::Never => "the fallback policy (never)",
            _ => "strict mode, with no other kernel left,",
        };
        ManagerError::NoFallback { kernel: entry.kernel.id().into(), m, n, k, reason, forbids }
    }

    /// Kernels that may compute this shape.
    pub(super) fn candidates(&self, m: usize, of: WeightShape, policy: LayoutPolicy) -> Vec<Arc<Entry>> {
        let signature = self.signature(m, of);
        self.entries()
            .into_iter()
            .filter(|entry| {
                self.config.force.as_ref().is_none_or(|name| names(&entry.kernel, name))
                    && entry.kernel.target() == Target::Cpu
                    && match policy {
                        LayoutPolicy::Any => true,
                        LayoutPolicy::Canonical => entry.kernel.layout().is_none(),
                        LayoutPolicy::BuiltIn => entry.kernel.layout().is_none() || entry.watch.is_none(),
                    }
                    && entry.ready()
                    && self.claims(entry, &signature)
            })
            .collect()
    }

    pub(super) fn signature(&self, m: usize, of: WeightShape) -> Signature {
        of.signature(m, self.pool.threads())
    }

    /// No kernel computes a shape, and strict mode forbids the reference: why, in a clause for each kernel,
    /// and what would provide one.
    pub(super) fn no_kernel(&self, m: usize, of: WeightShape) -> ManagerError {
        let (signature, WeightShape { n, k, .. }) = (self.signature(m, of), of);
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
                Status::Ready if entry.kernel.operation() != signature.operation => {
                    match entry.kernel.operation() {
                        abi::OPERATION_TERNARY_MATMUL => "is for weights with one scale".into(),
                        _ => "is for weights with many scales".into(),
                    }
                }
                Status::Ready if !entry.kernel.supports(&signature) => {
                    entry.kernel.why_not(&signature).unwrap_or_else(|| "does not support the shape".into())
                }
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

    /// Chooses kernels for weights of a shape, `(n, k)` for those with one scale, measuring where that has not been done on
    /// this machine: the [`Objective`](super::Objective) says in which layout. While [memory is low](Self::memory_is_low), it is the
    /// canonical one, if there is a kernel for it.
    ///
    /// # Errors
    /// If no matrix has the shape, or groups do not fit together; in strict mode, if no kernel can compute the shape.
    pub fn choose(
        &self,
        of: impl Into<WeightShape>,
        policy: LayoutPolicy,
    ) -> Result<Arc<CpuKernels>, ManagerError> {
        let of = of.into();
        let WeightShape { n, k, .. } = of;
        self.loads.fetch_add(1, Ordering::Relaxed);
        let policy = match self.allowed_layouts(n, k, policy) {
            // Canonical weights with many scales are no file's: they save no memory, and their kernels are slow.
            _ if of.scales != ScaleKind::One => policy,
            // A kernel that is forced, or the only one for the shape, may read no canonical weights.
            allowed if allowed != policy && self.candidates(1, of, allowed).is_empty() => policy,
            allowed => allowed,
        };
        if let Some(choice) = lock(&self.choices).get(&(of, policy)) {
            return Ok(choice.clone());
        }
        of.check()?;
        let choice = Arc::new(self.decide(of, policy)?);
        let choice = lock(&self.choices).entry((of, policy)).or_insert(choice).clone();
        let mut made = lock(&self.made);
        if !made.iter().any(|known| std::ptr::eq(known.as_ptr(), &*choice)) {
            made.retain(|known| known.strong_count() > 0);
            made.push(Arc::downgrade(&choice));
        }
        Ok(choice)
    }

    fn decide(&self, of: WeightShape, policy: LayoutPolicy) -> Result<CpuKernels, ManagerError> {
        let candidates = self.candidates(1, of, policy);
        if candidates.is_empty() && !self.config.strict.allows_reference() {
            return Err(self.no_kernel(1, of));
        }
        let packer = self.tuner.packer(&CpuContest { manager: self, of, policy });
        Ok(CpuKernels::new(of, packer))
    }

    /// The ranking for `m` rows of a choice's shape, measured at the first use.
    pub(super) fn ranking<'a>(&self, choice: &'a CpuKernels, m: usize) -> &'a Ranking {
        choice.slot(m).ranking(self.policy, || {
            if !choice.measures {
                return self.known_ranking(m, choice.of);
            }
            let policy = if choice.packer.is_some() { LayoutPolicy::Any } else { LayoutPolicy::Canonical };
            let mut ranking = self.rank(m, choice.of, policy);
            ranking.candidates.retain(|c| choice.is_read_by(&c.entry));
            ranking
        })
    }

    /// Measures whatever a choice may need for prompts of up to `m` rows, so that no call has to.
    pub fn warm_up(&self, choice: &CpuKernels, m: usize) {
        for (index, &(_, rows)) in BUCKETS.iter().enumerate() {
            if index <= bucket(m) {
                self.ranking(choice, rows);
            }
        }
    }

    /// Chooses kernels for weights of a shape and packs canonical rows of them into the chosen layout. A plugin
    /// from a file that packs wrongly is quarantined, and another layout chosen.
    ///
    /// # Errors
    /// As [`choose`](Self::choose) and [`pack`](Self::pack), for the kernels that are left.
    pub fn choose_and_pack(
        &self,
        of: impl Into<WeightShape>,
        policy: LayoutPolicy,
        weights: &[u8],
    ) -> Result<(Arc<CpuKernels>, Packed), ManagerError> {
        let of = of.into();
        loop {
            let choice = self.choose(of, policy)?;
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
    pub fn pack(&self, choice: &CpuKernels, weights: &[u8]) -> Result<Packed, ManagerError> {
        let (n, k) = choice.shape();
        if Some(weights.len()) != canonical::matrix_bytes(n, k) {
            return Err(ManagerError::Operands(format!(
                "canonical weights [{n}, {k}] take {:?} bytes, not {}",
                canonical::matrix_bytes(n, k),
                weights.len()
            )));
        }
        let Some(entry) = &choice.packer else { return Ok(Packed::Canonical) };
        let packed = match entry.watch {
            Some(_) => self.pack_sealed(entry, n, k, weights),
            None => packing::pack(entry, &self.pool, &self.arena, n, k, weights),
        };
        packed.map(Packed::Private)
    }

    /// Packs weights with the kernel of a plugin from a file or of a GPU: what comes out is unpacked again and compared,
    /// its checksum is kept behind it, and the plugin is quarantined if it differs.
    pub(super) fn pack_sealed(
        &self,
        entry: &Entry,
        n: usize,
        k: usize,
        weights: &[u8],
    ) -> Result<PageBuffer, ManagerError> {
        self.pack_between_walls(entry, n, k, weights)?;
        // What goes to a GPU is not read here again.
        let arena = if entry.kernel.gpu().is_some() { &self.arena } else { &self.sealed };
        let sealed = packing::pack(entry, &self.pool, arena, n, k, weights).and_then(|mut packed| {
            packing::seal(entry, &self.pool, (n, k), weights, &mut packed)?;
            arena.seal(&mut packed);
            Ok(packed)
        });
        if let Err(ManagerError::Pack { reason, .. } | ManagerError::Unpack { reason, .. }) = &sealed {
            self.quarantine(entry, gate::Stage::FirstUse, format!("weights [{n}, {k}]: {reason}"));
        }
        sealed
    }

    /// The canonical form of weights that [`pack`](Self::pack) packed.
    ///
    /// # Errors
    /// If the kernel can't.
    pub fn unpack(&self, choice: &CpuKernels, weights: &[u8]) -> Result<Vec<u8>, ManagerError> {
        match &choice.packer {
            None => Ok(weights.to_vec()),
            Some(entry) => packing::unpack(entry, &self.pool, choice.of.n, choice.of.k, weights),
        }
    }

    /// The layouts that compete for weights of a shape, the chosen one first. There is one alone where nothing was measured.
    pub fn layouts(&self, of: impl Into<WeightShape>) -> Vec<LayoutCost> {
        let terms = self.tuner.objective().terms();
        let weighed =
            self.tuner.layouts(&CpuContest { manager: self, of: of.into(), policy: LayoutPolicy::Any });
        let layout = |weighed: &Weighed<Arc<Entry>>| {
            let fastest = terms.iter().zip(&weighed.fastest).map(|(&(rows, _), fastest)| {
                let time =
                    |(entry, (median, _)): &(Arc<Entry>, (u64, u64))| (entry.kernel.id().to_owned(), *median);
                (rows, fastest.as_ref().map(time))
            });
            LayoutCost {
                layout: weighed.layout.as_ref().map(|(name, _)| name.clone()),
                fastest: fastest.collect(),
                cost: weighed.cost(terms, |(median, _)| median),
            }
        };
        weighed.iter().map(layout).collect()
    }

    /// The kernels that are ready and say why they don't compute `m` rows with weights of a shape, with their reasons.
    pub fn reasons(&self, m: usize, of: impl Into<WeightShape>) -> Vec<(String, String)> {
        let signature = self.signature(m, of.into());
        let entries = self.entries();
        let ready = entries.iter().filter(|entry| entry.ready() && entry.kernel.target() == Target::Cpu);
        ready
            .filter_map(|entry| Some((entry.kernel.id().into(), entry.kernel.why_not(&signature)?)))
            .collect()
    }

    /// Why: the candidates for `m` rows and weights of a shape, the fastest first, with their measurements.
    pub fn explain(&self, m: usize, of: impl Into<WeightShape>) -> Ranking {
        self.rank(m, of.into(), LayoutPolicy::Any)
    }
}
