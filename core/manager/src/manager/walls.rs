//! The first use of each shape by a kernel of a plugin from a file, between walls: the gate tries some shapes, and a
//! size that is wrong for others would damage the memory behind a buffer.
//!
//! The kernel packs, unpacks or multiplies with buffers of its own, behind which lie marked bytes and then pages that end
//! the process when they are touched. If a mark has changed, the plugin is in quarantine before it gets buffers that
//! others use. Otherwise a product is copied to where it belongs; a packing is made again.
//!
//! A contained plugin has no buffers of this process to write beside.

use std::collections::HashSet;
use std::sync::{RwLock, atomic::Ordering};

use bitnet_burn_plugin::abi::{
    self, ACTIVATION_ALIGNMENT, ACTIVATION_SLACK, CANONICAL_ALIGNMENT, WORKSPACE_ALIGNMENT,
};

use super::adapt::Turn;
use super::packing::{self, SharedBytes};
use super::parts::{Buffers, Few, Part, ThreadScratch, run_tiles};
use super::{Entry, Job, KernelManager, ManagerError, abi_weights};
use crate::gate::{Place, Stage, Walled, Walls};
use crate::memory::Activations;
use crate::plugin::{KernelFailure, max_workspace};

/// Marked bytes behind a buffer, at least and at most.
const LEAST: usize = 64 << 10;
const MOST: usize = 64 << 20;

/// Shapes that a kernel has been tried on: (M, N, K), or (none, N, K) for packing.
#[derive(Debug, Default)]
pub(super) struct Tried(RwLock<HashSet<(Option<usize>, usize, usize)>>);

impl Tried {
    fn knows(&self, shape: (Option<usize>, usize, usize)) -> bool {
        self.0.read().unwrap_or_else(|e| e.into_inner()).contains(&shape)
    }

    fn learn(&self, shape: (Option<usize>, usize, usize)) {
        self.0.write().unwrap_or_else(|e| e.into_inner()).insert(shape);
    }
}

/// A buffer of `size` bytes with about `margin` marked ones behind it.
fn walled(name: &'static str, size: usize, alignment: usize, margin: usize) -> Result<Walled, Trouble> {
    Ok(Walled::new(name, size, alignment, Place::Odd, Walls::Far(margin.clamp(LEAST, MOST)))?)
}

/// A read-only input between walls.
fn input(name: &'static str, bytes: &[u8], alignment: usize) -> Result<Walled, Trouble> {
    let mut buffer = walled(name, bytes.len(), alignment, LEAST)?;
    buffer.bytes_mut().copy_from_slice(bytes);
    buffer.freeze()?;
    Ok(buffer)
}

/// Why there is no result.
enum Trouble {
    Kernel(KernelFailure),
    /// No memory for the buffers: nothing is known then.
    System(std::io::Error),
}

impl From<KernelFailure> for Trouble {
    fn from(failure: KernelFailure) -> Self {
        Self::Kernel(failure)
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        Self::System(error)
    }
}

fn check<'a>(buffers: impl IntoIterator<Item = &'a Walled>) -> Result<(), Trouble> {
    for buffer in buffers {
        buffer.check().map_err(|reason| KernelFailure::Forbidden { reason })?;
    }
    Ok(())
}

impl KernelManager {
    /// If the shape is new to a kernel of a plugin from a file, it computes the job between walls: whether it did, and
    /// the result is in `y`.
    ///
    /// # Errors
    /// If it fails there.
    pub(super) fn first_use(
        &self,
        job: &Job,
        turn: &Turn,
        x: &Activations,
        y: &mut [f32],
        stride: usize,
    ) -> Result<bool, KernelFailure> {
        if turn.entry.watch.is_none() || turn.entry.kernel.contained().is_some() {
            return Ok(false);
        }
        // The same again, most of the time. (No rank and no rows at all are a choice's zero.)
        let (memo, this) = (&job.choice.slot(x.m()).walled, (turn.rank as u64) << 56 | x.m() as u64);
        if memo.load(Ordering::Relaxed) == this {
            return Ok(false);
        }
        let (n, k) = job.choice.shape();
        let weights = job.scale.weights(n, k, job.choice.own_bytes(job.weights));
        let part = Part { kernel: &turn.entry.kernel, of: job.choice.of, weights, column: 0 };
        let result = self.run_between_walls(turn.entry, &part, x)?;
        memo.store(this, Ordering::Relaxed);
        let Some(result) = result else { return Ok(false) };
        for (m, row) in result.bytes().chunks_exact(4 * n).enumerate() {
            let out = y[job.column + m * stride..][..n].iter_mut();
            out.zip(row.as_chunks().0).for_each(|(y, bytes)| *y = f32::from_ne_bytes(*bytes));
        }
        Ok(true)
    }

    /// Runs a kernel of a plugin from a file between walls, unless it was for this exact shape: the output, m rows of
    /// n floats.
    ///
    /// # Errors
    /// If it fails, or writes beside its buffers.
    pub(super) fn run_between_walls(
        &self,
        entry: &Entry,
        part: &Part,
        x: &Activations,
    ) -> Result<Option<Walled>, KernelFailure> {
        let shape = (Some(x.m()), part.weights.n as usize, x.k());
        if entry.watch.is_none() || entry.kernel.contained().is_some() || entry.tried.knows(shape) {
            return Ok(None);
        }
        match self.try_run(part, x) {
            Ok(result) => {
                entry.tried.learn(shape);
                Ok(Some(result))
            }
            Err(Trouble::Kernel(failure)) => Err(failure),
            Err(Trouble::System(error)) => {
                no_walls(entry, &error);
                Ok(None)
            }
        }
    }

    fn try_run(&self, part: &Part, x: &Activations) -> Result<Walled, Trouble> {
        let (m, n) = (x.m(), part.weights.n as usize);
        let slack = [0; ACTIVATION_SLACK];
        let rows = x.q().iter().map(|&q| q as u8).chain(slack);
        let q = input("the activations", &rows.collect::<Vec<_>>(), ACTIVATION_ALIGNMENT)?;
        let scale = x.scale().iter().flat_map(|scale| scale.to_ne_bytes());
        let scale = input("the activations' scales", &scale.collect::<Vec<_>>(), 4)?;
        let sum = x.sum().iter().flat_map(|sum| sum.to_ne_bytes());
        let sum = input("the activations' sums", &sum.collect::<Vec<_>>(), 4)?;
        let abi_x = abi::Activations {
            q: q.as_ptr().cast(),
            scale: scale.as_ptr().cast(),
            sum: sum.as_ptr().cast(),
            group_scale: scale.as_ptr().cast(),
            group_sum: sum.as_ptr().cast(),
            ..x.as_abi()
        };
        let signature = part.of.signature(m, self.pool.threads());
        let size = part.kernel.workspace_size(&signature)?;
        if size > max_workspace(m, x.stride()) {
            return Err(KernelFailure::Workspace { bytes: size }.into());
        }
        let margin = x.q().len().saturating_mul(4);
        let mut workspace = walled("the workspace", size, WORKSPACE_ALIGNMENT, margin)?;
        // SAFETY: filled activations, and a workspace of the size that the kernel asked for.
        unsafe { part.kernel.prepare(&abi_x, workspace.as_mut_ptr()) }?;
        check([&workspace])?;
        workspace.freeze()?;
        let size = part.kernel.scratch_size(&signature)?;
        if size > max_workspace(m, x.stride()) {
            return Err(KernelFailure::Workspace { bytes: size }.into());
        }
        let bytes = ThreadScratch::bytes(size, self.pool.threads());
        let mut scratch = walled("the scratch", bytes, WORKSPACE_ALIGNMENT, margin)?;
        let of_threads = (size > 0).then(|| ThreadScratch::new(scratch.as_mut_ptr(), size));
        let outputs = m.checked_mul(n).and_then(|outputs| outputs.checked_mul(4));
        let outputs = outputs.ok_or_else(|| std::io::Error::other("an output of more than 2^64 bytes"))?;
        let mut y = walled("the output", outputs, 4, outputs)?;
        let mut failures: Few<Option<KernelFailure>> = Few::from_iter([None]);
        let (prepared, out) = (SharedBytes(workspace.as_mut_ptr()), y.as_mut_ptr().cast());
        // SAFETY: filled activations, the workspace that was prepared, scratch for all threads, and an output of m rows of n, all of which live
        // until the call returns; the only part's columns are the n.
        unsafe {
            run_tiles(
                &self.pool,
                std::slice::from_ref(part),
                &abi_x,
                |_| Buffers { workspace: prepared.pointer().cast_const(), scratch: of_threads },
                (out, n),
                &mut failures,
            )
        };
        check([&q, &scale, &sum, &workspace, &scratch, &y])?;
        failures.remove(0).map_or(Ok(y), |failure| Err(failure.into()))
    }

    /// Packs and unpacks canonical weights with a kernel of a plugin from a file between walls, unless it was for this
    /// shape. If it does something forbidden, the plugin is in quarantine.
    ///
    /// # Errors
    /// If it fails, or writes beside its buffers.
    pub(super) fn pack_between_walls(
        &self,
        entry: &Entry,
        n: usize,
        k: usize,
        weights: &[u8],
    ) -> Result<(), ManagerError> {
        let shape = (None, n, k);
        if entry.watch.is_none() || entry.kernel.contained().is_some() || entry.tried.knows(shape) {
            return Ok(());
        }
        match self.try_packing(entry, n, k, weights) {
            Ok(()) => entry.tried.learn(shape),
            Err(Trouble::System(error)) => no_walls(entry, &error),
            Err(Trouble::Kernel(failure)) => {
                let reason = failure.to_string();
                if failure.is_fault() {
                    self.condemn(entry, Stage::FirstUse, format!("weights [{n}, {k}]: {reason}"));
                }
                return Err(ManagerError::Pack { kernel: entry.kernel.id().into(), n, k, reason });
            }
        }
        Ok(())
    }

    fn try_packing(&self, entry: &Entry, n: usize, k: usize, weights: &[u8]) -> Result<(), Trouble> {
        let kernel = &entry.kernel;
        // A kernel that can't pack the shape says so when it is asked in earnest.
        let Some(size) = kernel.packed_bytes(n, k)? else { return Ok(()) };
        let mut packed = walled("the packed weights", size, kernel.weight_alignment(), n.saturating_mul(k))?;
        let (canonical, out) = (abi_weights(n, k, 1.0, weights), SharedBytes(packed.as_mut_ptr()));
        packing::by_granules(kernel, &self.pool, n, &|rows| {
            // SAFETY: the buffer has the size and the alignment that the kernel asked for, and the ranges
            // are disjoint and begin at granules.
            unsafe { kernel.pack(&canonical, out.pointer(), rows) }
        })?;
        check([&packed])?;
        packed.freeze()?;
        let mut back = walled("the unpacked weights", weights.len(), CANONICAL_ALIGNMENT, weights.len())?;
        let (own, out) = (abi_weights(n, k, 1.0, packed.bytes()), SharedBytes(back.as_mut_ptr()));
        packing::by_granules(kernel, &self.pool, n, &|rows| {
            // SAFETY: filled weights of the kernel's own size, room for all canonical rows, and disjoint
            // ranges of them.
            unsafe { kernel.unpack(&own, out.pointer(), rows) }
        })?;
        check([&packed, &back])
    }
}

fn no_walls(entry: &Entry, error: &std::io::Error) {
    tracing::warn!(kernel = entry.kernel.id(), %error, "no memory to try a kernel between walls");
}
