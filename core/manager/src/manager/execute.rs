//! Running kernels: the host owns the threads, the partitioning and every buffer.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bitnet_burn_plugin::abi::{self, Output, Tile};
use bitnet_burn_plugin::canonical;
use smallvec::{SmallVec, smallvec};

use super::adapt::Turn;
use super::choice::Repacked;
use super::report::Failure;
use super::{
    Entry, Fallback, FallbackPolicy, Job, KernelManager, LayoutPolicy, ManagerError, Packed, REFERENCE,
    abi_weights, lock,
};
use crate::gate;
use crate::memory::{Activations, AlignedBytes, WeightArena, WeightBuffer};
use crate::plugin::{Kernel, KernelFailure, max_workspace};
use crate::pool::Pool;
use bitnet_burn_formats::reference;

/// Bytes of activations that a tile walks over again and again: they should stay in the L2 cache.
const ACTIVATION_BLOCK: usize = 480 << 10;
/// A task should read at least so many bytes of weights, or the fork-join costs more than it wins.
const MIN_TASK_BYTES: usize = 16 << 10;

/// One for each matrix of a matmul: there are at most three in a model, so that nothing is allocated.
type Few<T> = SmallVec<[T; 4]>;

/// Workspaces, kept from call to call.
#[derive(Debug, Default)]
pub(super) struct Scratch(Mutex<Vec<AlignedBytes>>);

impl Scratch {
    fn take(&self, size: usize) -> AlignedBytes {
        let mut free = lock(&self.0);
        match free.iter().position(|buffer| buffer.len() >= size) {
            Some(i) => free.swap_remove(i),
            None => AlignedBytes::zeroed(size),
        }
    }

    fn give_back(&self, buffer: AlignedBytes) {
        let mut free = lock(&self.0);
        if free.len() < 4 {
            free.push(buffer);
        }
    }
}

/// One kernel on one matrix, writing columns `column..column + n` of the output.
pub(super) struct Part<'a> {
    pub kernel: &'a Kernel,
    pub weights: abi::Weights,
    pub column: usize,
}

/// The output of a matmul, shared by the tasks, which write disjoint tiles.
#[derive(Clone, Copy)]
struct SharedOutput(*mut f32);

// SAFETY: the tasks write disjoint tiles of a buffer that outlives them (`run_parts`).
unsafe impl Send for SharedOutput {}
// SAFETY: as above.
unsafe impl Sync for SharedOutput {}

impl SharedOutput {
    fn at(self, column: usize) -> *mut f32 {
        self.0.wrapping_add(column)
    }
}

/// Runs kernels over shared activations in one fork-join. Returns each part's failure, if it failed.
///
/// The caller has checked that `y` holds `x.m()` rows of `stride`, and that every part's columns are
/// within the stride and disjoint from the others'.
pub(super) fn run_parts(
    pool: &Pool,
    scratch: &Scratch,
    parts: &[Part],
    x: &Activations,
    y: &mut [f32],
    stride: usize,
) -> Few<Option<KernelFailure>> {
    let m = x.m();
    let abi_x = x.as_abi();
    let mut failures: Few<Option<KernelFailure>> = parts.iter().map(|_| None).collect();

    // Parts of one kernel share its workspace.
    let mut workspaces: Few<(&Kernel, AlignedBytes)> = Few::new();
    let mut workspace_of: Few<usize> = smallvec![usize::MAX; parts.len()];
    for (i, part) in parts.iter().enumerate() {
        if let Some(known) = workspaces.iter().position(|(kernel, _)| std::ptr::eq(*kernel, part.kernel)) {
            workspace_of[i] = known;
            failures[i] = failures[..i]
                .iter()
                .zip(&parts[..i])
                .find(|(_, other)| std::ptr::eq(other.kernel, part.kernel))
                .and_then(|(failure, _)| failure.clone());
            continue;
        }
        let signature = abi::Signature::ternary(m as u64, part.weights.n, abi_x.k, pool.threads() as u32);
        let size = part.kernel.workspace_size(&signature);
        if size > max_workspace(m, x.stride()) {
            failures[i] = Some(KernelFailure {
                status: abi::STATUS_INVALID_ARGUMENT,
                message: format!("asks for a workspace of {size} bytes"),
            });
            continue;
        }
        let mut workspace = scratch.take(size);
        // SAFETY: filled activations, and a workspace of the size that the kernel asked for.
        failures[i] = unsafe { part.kernel.prepare(&abi_x, workspace.as_mut_ptr()) }.err();
        workspace_of[i] = workspaces.len();
        workspaces.push((part.kernel, workspace));
    }

    let grid = Grid::new(pool.threads(), parts, m, x.stride());
    let output = SharedOutput(y.as_mut_ptr());
    let first_failure: Few<AtomicU32> = parts.iter().map(|_| AtomicU32::new(0)).collect();
    let messages: Mutex<Vec<(usize, KernelFailure)>> = Mutex::default();
    let skip: Few<bool> = failures.iter().map(Option::is_some).collect();
    pool.run(grid.tasks(), &|task| {
        let (i, tile) = grid.tile(task);
        if skip[i] || first_failure[i].load(Ordering::Relaxed) != 0 {
            return;
        }
        let part = &parts[i];
        let y = Output {
            struct_size: size_of::<Output>() as u64,
            y: output.at(part.column),
            stride: stride as u64,
        };
        let workspace = workspaces[workspace_of[i]].1.as_ptr();
        // SAFETY: the structs are filled and their buffers live until `pool.run` returns; the grid's
        // tiles are disjoint and within [m, n] of the part, whose columns are its own.
        if let Err(failure) = unsafe { part.kernel.run(&part.weights, &abi_x, workspace, &y, &tile) } {
            first_failure[i].store(1, Ordering::Relaxed);
            lock(&messages).push((i, failure));
        }
    });
    for (i, failure) in messages.into_inner().unwrap_or_else(|e| e.into_inner()) {
        failures[i].get_or_insert(failure);
    }
    for (_, workspace) in workspaces {
        scratch.give_back(workspace);
    }
    failures
}

/// Cuts several matrices' outputs into tiles: decode into ranges of rows that are read as one stream
/// each, prefill into blocks of activations that stay in cache.
struct Grid {
    m: usize,
    m_block: usize,
    /// Per part: rows of a tile, number of row ranges, output features, first task.
    parts: Few<(usize, usize, usize, usize)>,
    tasks: usize,
}

impl Grid {
    fn new(threads: usize, parts: &[Part], m: usize, x_stride: usize) -> Self {
        let m_block = (ACTIVATION_BLOCK / x_stride / 8 * 8).max(8).min(m.max(1));
        let m_blocks = m.div_ceil(m_block);
        let total: usize = parts.iter().map(|p| p.weights.n as usize * m_blocks).sum();
        // Several ranges a thread even out what other programs take away; one thread needs none.
        let wanted = if threads == 1 { 1 } else { threads * 4 };
        let mut tasks = 0;
        let parts = parts
            .iter()
            .map(|part| {
                let (n, k) = (part.weights.n as usize, part.weights.k as usize);
                let granule = part.kernel.row_granule();
                let least = if m == 1 { MIN_TASK_BYTES / canonical::row_bytes(k).max(1) } else { 1 };
                let rows = total
                    .div_ceil(wanted)
                    .max(least)
                    .next_multiple_of(granule)
                    .min(n.next_multiple_of(granule));
                let ranges = n.div_ceil(rows);
                let first = tasks;
                tasks += ranges * m_blocks;
                (rows, ranges, n, first)
            })
            .collect();
        Self { m, m_block, parts, tasks }
    }

    fn tasks(&self) -> usize {
        self.tasks
    }

    fn tile(&self, task: usize) -> (usize, Tile) {
        let i = self.parts.iter().rposition(|part| part.3 <= task).expect("the first part begins at 0");
        let (rows, ranges, n, first) = self.parts[i];
        let (block, range) = ((task - first) / ranges, (task - first) % ranges);
        let (n0, m0) = (range * rows, block * self.m_block);
        let tile = Tile {
            struct_size: size_of::<Tile>() as u64,
            n0: n0 as u64,
            n1: (n0 + rows).min(n) as u64,
            m0: m0 as u64,
            m1: (m0 + self.m_block).min(self.m) as u64,
        };
        (i, tile)
    }
}

/// Bytes behind the packing of a plugin from a file: a checksum of the canonical weights.
const CHECKSUM: usize = 8;

/// Bytes of weights [n, k] as they are kept: in the kernel's packing, and, where that is a plugin's from a
/// file, with the checksum of what was packed, so that what comes back is never silently something else.
pub(super) fn stored_bytes(entry: &Entry, n: usize, k: usize) -> Option<usize> {
    let size = entry.kernel.weight_bytes(n, k)?;
    match entry.watch {
        Some(_) if entry.kernel.layout().is_some() => Some(size.next_multiple_of(CHECKSUM) + CHECKSUM),
        _ => Some(size),
    }
}

/// Stored weights without the checksum.
pub(super) fn own_bytes<'a>(entry: &Entry, n: usize, k: usize, stored: &'a [u8]) -> &'a [u8] {
    match entry.watch.as_ref().and_then(|_| entry.kernel.weight_bytes(n, k)) {
        Some(own) => &stored[..own],
        None => stored,
    }
}

/// A fast checksum against mistakes (not against malice): FNV-1a over words of 8 bytes.
fn checksum(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(8);
    let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(29);
    let hash = (&mut words).fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        step(hash, u64::from_le_bytes(word.try_into().expect("8 bytes")))
    });
    words.remainder().iter().fold(hash, |hash, &byte| step(hash, u64::from(byte)))
}

/// Runs `work` on ranges of output features that begin at the kernel's granules, on all threads.
fn by_granules(
    kernel: &Kernel,
    pool: &Pool,
    n: usize,
    work: &(dyn Fn(std::ops::Range<usize>) -> Result<(), KernelFailure> + Sync),
) -> Result<(), KernelFailure> {
    let granules = n.div_ceil(kernel.row_granule());
    let tasks = (pool.threads() * 4).min(granules).max(1);
    let failure: Mutex<Option<KernelFailure>> = Mutex::default();
    pool.run(tasks, &|task| {
        let bound = |i: usize| (granules * i / tasks * kernel.row_granule()).min(n);
        let rows = bound(task)..bound(task + 1);
        if rows.is_empty() {
            return;
        }
        if let Err(error) = work(rows) {
            lock(&failure).get_or_insert(error);
        }
    });
    failure.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
}

/// Packs a matrix on all threads.
pub(super) fn pack(
    entry: &Entry,
    pool: &Pool,
    arena: &WeightArena,
    n: usize,
    k: usize,
    weights: &[u8],
) -> Result<WeightBuffer, ManagerError> {
    let kernel = &entry.kernel;
    let size = stored_bytes(entry, n, k).ok_or_else(|| {
        ManagerError::Operands(format!("kernel {} can't pack weights [{n}, {k}]", kernel.id()))
    })?;
    let mut packed = arena
        .allocate(size, kernel.weight_alignment())
        .map_err(|source| ManagerError::System { what: "memory for packed weights", source })?;
    let canonical = abi_weights(n, k, 1.0, weights);
    let out = SharedBytes(packed.as_mut_slice().as_mut_ptr());
    by_granules(kernel, pool, n, &|rows| {
        // SAFETY: the buffer has the size and the alignment that the kernel asked for, and the ranges
        // are disjoint and begin at granules.
        unsafe { kernel.pack(&canonical, out.pointer(), rows) }
    })
    .map_err(|error| ManagerError::Pack {
        kernel: kernel.id().into(),
        n,
        k,
        reason: error.to_string(),
    })?;
    Ok(packed)
}

#[derive(Clone, Copy)]
struct SharedBytes(*mut u8);

// SAFETY: the tasks of `pack` write disjoint parts of a buffer that outlives them.
unsafe impl Send for SharedBytes {}
// SAFETY: as above.
unsafe impl Sync for SharedBytes {}

impl SharedBytes {
    fn pointer(self) -> *mut u8 {
        self.0
    }
}

/// Compares what was packed with the canonical weights, and notes their checksum behind it: for plugins
/// from files, once for each matrix.
pub(super) fn seal(
    entry: &Entry,
    pool: &Pool,
    (n, k): (usize, usize),
    weights: &[u8],
    packed: &mut WeightBuffer,
) -> Result<(), ManagerError> {
    let back = unpack_unsealed(entry, pool, n, k, packed.as_slice())?;
    if let Some(place) = gate::difference(&back, weights, k) {
        let reason = format!("unpack(pack(w)) differs from w {place}");
        return Err(ManagerError::Pack { kernel: entry.kernel.id().into(), n, k, reason });
    }
    let (_, seal) = packed.as_mut_slice().split_last_chunk_mut().expect("room for the checksum");
    *seal = checksum(weights).to_le_bytes();
    Ok(())
}

/// The canonical weights of what [`pack`] packed and, for plugins from files, [`seal`] sealed.
pub(super) fn unpack(
    entry: &Entry,
    pool: &Pool,
    n: usize,
    k: usize,
    packed: &[u8],
) -> Result<Vec<u8>, ManagerError> {
    let canonical = unpack_unsealed(entry, pool, n, k, packed)?;
    if entry.watch.is_some() && packed.last_chunk() != Some(&checksum(&canonical).to_le_bytes()) {
        let reason = "what comes back is not what was packed".into();
        return Err(ManagerError::Unpack { kernel: entry.kernel.id().into(), n, k, reason });
    }
    Ok(canonical)
}

fn unpack_unsealed(
    entry: &Entry,
    pool: &Pool,
    n: usize,
    k: usize,
    packed: &[u8],
) -> Result<Vec<u8>, ManagerError> {
    let kernel = &entry.kernel;
    let fail = |reason: String| ManagerError::Unpack { kernel: kernel.id().into(), n, k, reason };
    let stored = stored_bytes(entry, n, k);
    if stored != Some(packed.len()) {
        return Err(fail(format!("they are {} bytes, not {stored:?}", packed.len())));
    }
    let mut canonical = vec![0; n * canonical::row_bytes(k)];
    let weights = abi_weights(n, k, 1.0, own_bytes(entry, n, k, packed));
    let out = SharedBytes(canonical.as_mut_ptr());
    by_granules(kernel, pool, n, &|rows| {
        // SAFETY: filled weights of the kernel's own size, room for all canonical rows, and disjoint
        // ranges of them.
        unsafe { kernel.unpack(&weights, out.pointer(), rows) }
    })
    .map_err(|error| fail(error.to_string()))?;
    Ok(canonical)
}

/// One canonical row of what [`pack`] packed.
pub(super) fn unpack_row(
    entry: &Entry,
    n: usize,
    k: usize,
    packed: &[u8],
    row: usize,
) -> Result<Vec<u8>, KernelFailure> {
    let kernel = &entry.kernel;
    let (granule, row_bytes) = (kernel.row_granule(), canonical::row_bytes(k));
    let first = row / granule * granule;
    let rows = first..(first + granule).min(n);
    // The kernel counts from row 0: untouched pages of a fresh zeroed buffer cost nothing.
    let mut canonical = vec![0; n * row_bytes];
    let weights = abi_weights(n, k, 1.0, own_bytes(entry, n, k, packed));
    // SAFETY: filled weights of the kernel's own size, and room for all canonical rows.
    unsafe { kernel.unpack(&weights, canonical.as_mut_ptr(), rows) }?;
    Ok(canonical[row * row_bytes..][..row_bytes].to_vec())
}

/// A job of a matmul that has not been computed yet.
struct Pending<'a> {
    job: &'a Job<'a>,
    /// Kernels that failed at it, a bit by rank, and the last of them.
    tried: u16,
    failed: Option<(Arc<Entry>, KernelFailure)>,
    turn: Option<Turn<'a>>,
}

impl<'a> Pending<'a> {
    /// What its turn is to run, if that is to be timed or not.
    fn part(&self, timed: bool) -> Option<Part<'a>> {
        let turn = self.turn.filter(|turn| turn.timed.is_some() == timed)?;
        let (n, k) = self.job.choice.shape();
        let weights = abi_weights(n, k, self.job.scale, self.job.choice.own_bytes(self.job.weights));
        Some(Part { kernel: &turn.entry.kernel, weights, column: self.job.column })
    }
}

impl KernelManager {
    /// y[m, column + i] = activations of row m times row i of each job's weights, in one fork-join.
    ///
    /// What happens when a kernel fails or becomes slow is the [policy](super::FallbackPolicy)'s; it is counted
    /// and reported, and strict mode may refuse it. Kernels of plugins from files are watched ([`gate`],
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
        let start = |job| Pending { job, tried: 0, failed: None, turn: None };
        let mut pending: Few<Pending> = jobs.iter().map(start).collect();
        while !pending.is_empty() {
            for Pending { job, tried, failed, turn } in &mut pending {
                *turn = self.select(job, m, *tried)?;
                match (turn, failed.take()) {
                    (None, failed) => self.run_last(job, failed, x, y, stride)?,
                    (Some(turn), Some((from, failure))) => {
                        self.record_fallback(&from, turn.entry.kernel.id(), job, m, &failure);
                    }
                    (Some(_), None) => {}
                }
            }
            pending.retain(|pending| pending.turn.is_some());
            let together: Few<Part> = pending.iter().filter_map(|pending| pending.part(false)).collect();
            let mut failures = match together.is_empty() {
                true => Few::new(),
                false => run_parts(&self.pool, &self.scratch, &together, x, y, stride),
            }
            .into_iter();
            for pending in &mut pending {
                let (job, turn) = (pending.job, pending.turn.expect("the others have been computed"));
                let failure = match (turn.timed, pending.part(true)) {
                    (Some(call), Some(part)) => {
                        // By itself, so that the time is this kernel's alone.
                        let from = self.config.probe.now();
                        let failure = run_parts(&self.pool, &self.scratch, &[part], x, y, stride).remove(0);
                        if failure.is_none() {
                            self.timed(job, m, turn, call, (from, self.config.probe.now()));
                        }
                        failure
                    }
                    _ => failures.next().expect("one for each part"),
                };
                let failure = failure.or_else(|| {
                    let call = turn.entry.count();
                    let wrong = self.look((turn.rank, turn.entry), job, x, y, stride, call).err()?;
                    Some(KernelFailure { status: abi::STATUS_OK, message: wrong })
                });
                let Some(failure) = failure else { continue };
                let wrong = failure.status == abi::STATUS_OK;
                turn.entry.fail(if wrong { Failure::Wrong } else { Failure::Status });
                if self.policy == FallbackPolicy::Never {
                    return Err(self.no_fallback(turn.entry, job.choice.shape(), m, failure.to_string()));
                }
                if !wrong {
                    self.demote(job.choice, m, turn.rank, failure.to_string());
                }
                pending.tried |= 1 << turn.rank;
                pending.failed = Some((turn.entry.clone(), failure));
            }
            pending.retain(|pending| pending.failed.is_some());
        }
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
        let columns = |job: &Job| (job.column, job.column + job.choice.n);
        let mut end = 0;
        for (i, job) in jobs.iter().enumerate() {
            let (n, k) = job.choice.shape();
            if k != x.k() {
                return fail(format!("weights [{n}, {k}] do not fit activations [{}, {}]", x.m(), x.k()));
            }
            if job.weights.len() != job.choice.weight_bytes() {
                return fail(format!(
                    "weights [{n}, {k}] take {} bytes in the layout {}, not {}",
                    job.choice.weight_bytes(),
                    job.choice.layout().unwrap_or("canonical"),
                    job.weights.len()
                ));
            }
            let (from, to) = columns(job);
            let overlaps = |other: &Job| columns(other).0 < to && from < columns(other).1;
            if to > stride || jobs[..i].iter().any(overlaps) {
                let columns: Vec<_> = jobs.iter().map(columns).collect();
                return fail(format!("columns {columns:?} overlap or exceed the output's {stride}"));
            }
            end = end.max(to);
        }
        if x.m() > 0 && y.len() < (x.m() - 1) * stride + end {
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

    /// What is left when no kernel of the ranking is. Weights in the packing of a plugin from a file are
    /// packed anew, once, for the other kernels, which could not read that packing; for all others there is
    /// the reference.
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
            let repacked = self.repacked(job, packer)?;
            let job = repacked.job(job);
            if let Some((from, failure)) = failed {
                let candidates = &self.ranking(job.choice, m).candidates;
                let to = job.choice.slot(m).first(|rank| candidates[rank].entry.ready());
                let to = to.map_or(REFERENCE, |rank| candidates[rank].kernel());
                self.record_fallback(&from, to, &job, m, &failure);
            }
            return self.matmul(&[job], x, y, stride);
        }
        match failed {
            Some((from, failure)) if !self.config.strict.allows_reference() => {
                return Err(self.no_fallback(&from, (n, k), m, failure.to_string()));
            }
            None if !self.config.strict.allows_reference() => return Err(self.no_kernel(m, n, k)),
            Some((from, failure)) => self.record_fallback(&from, REFERENCE, job, m, &failure),
            None => {}
        }
        let (weights, out) = (&self.canonical_weights(job)?, &mut y[job.column..]);
        reference::matmul(weights, n, k, job.scale, x.q(), x.stride(), x.scale(), m, out, stride);
        self.reference_calls.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The weights of a job in another packing than that of its choice, which a plugin from a file made.
    fn repacked(&self, job: &Job, packer: &Entry) -> Result<Arc<Repacked>, ManagerError> {
        let (n, k) = job.choice.shape();
        // The seal says what was packed: the same bytes at any address, until the weights are dropped.
        let seal = *job.weights.last_chunk().ok_or_else(|| ManagerError::Operands("no weights".into()))?;
        let mut known = lock(&job.choice.repacked);
        if let Some(repacked) = known.get(&u64::from_le_bytes(seal)) {
            return Ok(repacked.clone());
        }
        // A plugin that is only taking a rest would be chosen again.
        let policy = if packer.ready() { LayoutPolicy::Canonical } else { LayoutPolicy::Any };
        let canonical = self.unpack(job.choice, job.weights)?;
        let (choice, packed) = self.prepare(n, k, policy, &canonical)?;
        let canonical = if matches!(packed, Packed::Canonical) { canonical } else { Vec::new() };
        let repacked = Arc::new(Repacked { choice, canonical, packed });
        known.insert(u64::from_le_bytes(seal), repacked.clone());
        // Whoever chooses next gets a choice without these, so that they go with the weights.
        lock(&self.choices).retain(|_, choice| !std::ptr::eq(&**choice, job.choice));
        Ok(repacked)
    }

    fn record_fallback(&self, from: &Entry, to: &str, job: &Job, m: usize, failure: &KernelFailure) {
        let (n, k) = job.choice.shape();
        let kernel = from.kernel.id();
        let mut fallbacks = lock(&self.fallbacks);
        let same =
            |f: &&mut Fallback| f.kernel == kernel && f.replacement == to && (f.shape.1, f.shape.2) == (n, k);
        match fallbacks.iter_mut().find(same) {
            Some(known) => known.count += 1,
            None => fallbacks.push(Fallback {
                kernel: kernel.into(),
                replacement: to.into(),
                shape: (m, n, k),
                reason: failure.to_string(),
                count: 1,
            }),
        }
    }
}
