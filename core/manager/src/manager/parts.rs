//! One fork-join over the kernels of a matmul: the host owns the threads, the partitioning and every buffer.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use bitnet_burn_plugin::abi::{self, Output, Tile, WORKSPACE_ALIGNMENT};
use bitnet_burn_plugin::canonical;
use smallvec::{SmallVec, smallvec};

use super::{WeightShape, lock};
use crate::memory::{Activations, AlignedBytes};
use crate::plugin::{Kernel, KernelFailure, max_workspace};
use crate::pool::Pool;

/// Bytes of activations that a tile walks over again and again: they should stay in the L2 cache.
const ACTIVATION_BLOCK: usize = 480 << 10;
/// A task should read at least this many bytes of weights, or the fork-join costs more than it wins.
const MIN_TASK_BYTES: usize = 16 << 10;

/// One for each matrix of a matmul: there are at most three in a model, so that nothing is allocated.
pub(crate) type Few<T> = SmallVec<[T; 4]>;

/// Workspaces, kept from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Mutex<Vec<AlignedBytes>>);

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
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub kernel: &'a Kernel,
    /// What the kernel was chosen for.
    pub of: WeightShape,
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

/// Runs kernels over shared activations in one fork-join, and those of each contained plugin in its process. Returns each
/// part's failure, if it failed.
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
    let here = |parts: &[Part], y: &mut [f32]| {
        // SAFETY: filled activations, and an output that holds the parts' columns (the caller's promise).
        unsafe { run_here(pool, scratch, parts, &x.as_abi(), (y.as_mut_ptr(), stride)) }
    };
    if parts.iter().all(|part| part.kernel.contained().is_none()) {
        return here(parts, y);
    }
    let mut failures: Few<Option<KernelFailure>> = parts.iter().map(|_| None).collect();
    let mut left: Few<usize> = (0..parts.len()).collect();
    while let Some(&first) = left.first() {
        let process = |part: &Part| part.kernel.contained().map(std::ptr::from_ref);
        let same = |&i: &usize| process(&parts[i]) == process(&parts[first]);
        let numbers: Few<usize> = left.iter().copied().filter(same).collect();
        left.retain(|i| !numbers.contains(i));
        let together: Few<Part> = numbers.iter().map(|&i| parts[i]).collect();
        let results = match parts[first].kernel.contained() {
            None => here(&together, y),
            Some(contained) => contained.multiply(&together, x, y, stride),
        };
        for (i, result) in numbers.into_iter().zip(results) {
            failures[i] = result;
        }
    }
    failures
}

/// Runs kernels of this process over shared activations in one fork-join. Returns each part's failure, if it failed.
///
/// # Safety
/// The activations and the parts' weights are filled, and live during the call. `y` and the elements from row to row are an
/// output of `x.m` rows, and every part's columns are within them and disjoint from the others'.
pub(crate) unsafe fn run_here(
    pool: &Pool,
    scratch: &Scratch,
    parts: &[Part],
    x: &abi::Activations,
    (y, stride): (*mut f32, usize),
) -> Few<Option<KernelFailure>> {
    let (m, x_stride) = (x.m as usize, x.stride as usize);
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
        let signature = part.of.signature(m, pool.threads());
        let size = match part.kernel.workspace_size(&signature) {
            Ok(size) => size,
            Err(failure) => {
                failures[i] = Some(failure);
                continue;
            }
        };
        if size > max_workspace(m, x_stride) {
            failures[i] = Some(KernelFailure::Workspace { bytes: size });
            continue;
        }
        let mut workspace = scratch.take(size);
        // SAFETY: filled activations, and a workspace of the size that the kernel asked for.
        failures[i] = unsafe { part.kernel.prepare(x, workspace.as_mut_ptr()) }.err();
        workspace_of[i] = workspaces.len();
        workspaces.push((part.kernel, workspace));
    }

    // Of all threads, one after the other.
    let mut thread_scratch: Few<Option<(AlignedBytes, ThreadScratch)>> = Few::new();
    for (part, failure) in parts.iter().zip(&mut failures) {
        let size = part.kernel.scratch_size(&part.of.signature(m, pool.threads()));
        thread_scratch.push(match size {
            Ok(0) => None,
            Ok(size) if size <= max_workspace(m, x_stride) => {
                let mut buffer = scratch.take(ThreadScratch::bytes(size, pool.threads()));
                let shared = ThreadScratch::new(buffer.as_mut_ptr(), size);
                Some((buffer, shared))
            }
            Ok(bytes) => {
                failure.get_or_insert(KernelFailure::Workspace { bytes });
                None
            }
            Err(reason) => {
                failure.get_or_insert(reason);
                None
            }
        });
    }

    // SAFETY: filled activations; a part that has not failed has a workspace, which `prepare` filled, and the scratch that
    // it asked for; the output is as the caller promises.
    unsafe {
        let buffers = |i: usize| Buffers {
            workspace: workspaces[workspace_of[i]].1.as_ptr(),
            scratch: thread_scratch[i].as_ref().map(|(_, shared)| *shared),
        };
        run_tiles(pool, parts, x, buffers, (y, stride), &mut failures);
    }
    for (_, workspace) in workspaces {
        scratch.give_back(workspace);
    }
    for (buffer, _) in thread_scratch.into_iter().flatten() {
        scratch.give_back(buffer);
    }
    failures
}

/// What a kernel has beside its operands.
pub(super) struct Buffers {
    pub workspace: *const u8,
    pub scratch: Option<ThreadScratch>,
}

/// The scratch of a kernel's threads, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct ThreadScratch {
    first: *mut u8,
    size: usize,
}

// SAFETY: each thread gets a part of its own of a buffer that outlives the matmul.
unsafe impl Send for ThreadScratch {}
// SAFETY: as above.
unsafe impl Sync for ThreadScratch {}

impl ThreadScratch {
    /// Bytes for a number of threads with `size` each.
    pub fn bytes(size: usize, threads: usize) -> usize {
        Self::stride(size) * threads
    }

    fn stride(size: usize) -> usize {
        size.next_multiple_of(WORKSPACE_ALIGNMENT)
    }

    /// Of as many [`bytes`](Self::bytes), aligned to 64.
    pub fn new(first: *mut u8, size: usize) -> Self {
        Self { first, size }
    }

    /// A tile with the scratch of a thread.
    pub fn give(self, tile: Tile, thread: usize) -> Tile {
        let scratch = self.first.wrapping_add(thread * Self::stride(self.size));
        Tile { scratch, scratch_size: self.size as u64, ..tile }
    }
}

/// Runs the kernels of the parts that have not failed, tile by tile on all threads, and notes failures.
///
/// # Safety
/// `x` and its buffers are filled. `buffers` gives the workspace of a part, which `prepare` filled, and the scratch that its
/// kernel asked for. The output, a pointer and the elements from row to row, has `x.m` rows; the parts' columns are within them and disjoint.
pub(super) unsafe fn run_tiles(
    pool: &Pool,
    parts: &[Part],
    x: &abi::Activations,
    buffers: impl Fn(usize) -> Buffers + Sync,
    (y, stride): (*mut f32, usize),
    failures: &mut Few<Option<KernelFailure>>,
) {
    let grid = Grid::new(pool.threads(), parts, x.m as usize, x.stride as usize);
    let output = SharedOutput(y);
    let first_failure: Few<AtomicU32> = parts.iter().map(|_| AtomicU32::new(0)).collect();
    let messages: Mutex<Vec<(usize, KernelFailure)>> = Mutex::default();
    let skip: Few<bool> = failures.iter().map(Option::is_some).collect();
    pool.run(grid.tasks(), &|task| {
        let (i, mut tile) = grid.tile(task);
        if skip[i] || first_failure[i].load(Ordering::Relaxed) != 0 {
            return;
        }
        let part = &parts[i];
        let y = Output {
            struct_size: size_of::<Output>() as u64,
            y: output.at(part.column),
            stride: stride as u64,
        };
        let Buffers { workspace, scratch } = buffers(i);
        let thread = pool.thread();
        tile.thread = thread as u32;
        if let Some(scratch) = scratch {
            tile = scratch.give(tile, thread);
        }
        // SAFETY: the structs are filled and their buffers live until `pool.run` returns (the caller's promise); the
        // grid's tiles are disjoint and within [m, n] of the part, whose columns are its own.
        if let Err(failure) = unsafe { part.kernel.run(&part.weights, x, workspace, &y, &tile) } {
            first_failure[i].store(1, Ordering::Relaxed);
            lock(&messages).push((i, failure));
        }
    });
    for (i, failure) in messages.into_inner().unwrap_or_else(|e| e.into_inner()) {
        failures[i].get_or_insert(failure);
    }
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
        (i, Tile::new(n0..(n0 + rows).min(n), m0..(m0 + self.m_block).min(self.m)))
    }
}
