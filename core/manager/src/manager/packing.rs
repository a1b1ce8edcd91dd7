//! Weights in a kernel's private layout: packing, unpacking, and the seal on what a plugin from a file packed.

use std::sync::Mutex;

use bitnet_burn_plugin::canonical;

use super::{Entry, ManagerError, abi_weights, lock};
use crate::gate;
use crate::memory::{PageArena, PageBuffer};
use crate::plugin::{Kernel, KernelFailure};
use crate::pool::Pool;

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
pub fn checksum(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(8);
    let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(29);
    let hash = (&mut words).fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        step(hash, u64::from_le_bytes(word.try_into().expect("8 bytes")))
    });
    words.remainder().iter().fold(hash, |hash, &byte| step(hash, u64::from(byte)))
}

/// Runs `work` on ranges of output features that begin at the kernel's granules, on all threads.
pub(crate) fn by_granules(
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
    arena: &PageArena,
    n: usize,
    k: usize,
    weights: &[u8],
) -> Result<PageBuffer, ManagerError> {
    let kernel = &entry.kernel;
    let size = stored_bytes(entry, n, k).ok_or_else(|| {
        ManagerError::Operands(format!("kernel {} can't pack weights [{n}, {k}]", kernel.id()))
    })?;
    let arena = match kernel.contained() {
        Some(contained) if kernel.gpu().is_none() => contained.arena(),
        _ => arena,
    };
    let packed = match entry.watch {
        // It is going to be sealed.
        Some(_) => arena.allocate_pages(size),
        None => arena.allocate(size, kernel.weight_alignment()),
    };
    let mut packed =
        packed.map_err(|source| ManagerError::System { what: "memory for packed weights", source })?;
    let result = match kernel.packs_elsewhere() {
        Some(contained) => {
            let own = kernel.weight_bytes(n, k).unwrap_or(0);
            contained.pack(kernel, (n, k), weights, &mut packed.as_mut_slice()[..own])
        }
        None => {
            let canonical = abi_weights(n, k, 1.0, weights);
            let out = SharedBytes(packed.as_mut_slice().as_mut_ptr());
            by_granules(kernel, pool, n, &|rows| {
                // SAFETY: the buffer has the size and the alignment that the kernel asked for, and the ranges
                // are disjoint and begin at granules.
                unsafe { kernel.pack(&canonical, out.pointer(), rows) }
            })
        }
    };
    result.map_err(|error| ManagerError::Pack {
        kernel: kernel.id().into(),
        n,
        k,
        reason: error.to_string(),
    })?;
    Ok(packed)
}

/// A buffer that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct SharedBytes(pub *mut u8);

// SAFETY: the tasks of `pack` write disjoint parts of a buffer that outlives them.
unsafe impl Send for SharedBytes {}
// SAFETY: as above.
unsafe impl Sync for SharedBytes {}

impl SharedBytes {
    pub fn pointer(self) -> *mut u8 {
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
    packed: &mut PageBuffer,
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
    let packed = own_bytes(entry, n, k, packed);
    if let Some(contained) = kernel.packs_elsewhere() {
        let result = contained.unpack(kernel, (n, k), packed, &mut canonical);
        return result.map(|()| canonical).map_err(|error| fail(error.to_string()));
    }
    let weights = abi_weights(n, k, 1.0, packed);
    let out = SharedBytes(canonical.as_mut_ptr());
    by_granules(kernel, pool, n, &|rows| {
        // SAFETY: filled weights of the kernel's own size, room for all canonical rows, and disjoint
        // ranges of them.
        unsafe { kernel.unpack(&weights, out.pointer(), rows) }
    })
    .map_err(|error| fail(error.to_string()))?;
    Ok(canonical)
}
