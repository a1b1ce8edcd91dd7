//! Memory of KV caches: aligned, in huge pages, and zero without being written to.
//!
//! Decoding reads all of a cache for every token. In pages of 4 KiB walking the page tables costs a good part of
//! that, and vectors that begin 16 bytes into a cache line, as an allocator's do, take two lines a load.

use std::mem::MaybeUninit;

use bitnet_burn_manager::memory::{PageArena, PageBuffer};
use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};

/// Bytes of an arena that a tensor may own and write to in place; a copy of them is ordinary memory.
struct CacheMemory(PageBuffer);

/// Alignment of a cache.
const ALIGNMENT: usize = 64;

/// `size` zero bytes.
///
/// # Errors
/// If the system has no memory left.
pub(crate) fn zeros(arena: &PageArena, size: usize) -> std::io::Result<Bytes> {
    let buffer = arena.allocate(size, ALIGNMENT)?;
    // SAFETY: the controller gives `size` bytes, all of which are initialised: an arena's are zero.
    Ok(unsafe { Bytes::from_controller(Box::new(CacheMemory(buffer)), size) })
}

impl AllocationController for CacheMemory {
    /// What a copy has to have, of which `Bytes` allows 16 at most.
    fn alloc_align(&self) -> usize {
        align_of::<u128>()
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        let bytes = self.0.as_mut_slice();
        // SAFETY: the same bytes, which the caller promises to write only initialised values to.
        Ok(unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len()) })
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let bytes = self.0.as_slice();
        // SAFETY: the same bytes; initialised ones are valid as possibly uninitialised ones.
        Ok(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_are_zero_aligned_apart_and_written_in_place() {
        let arena = PageArena::default();
        let mut all: Vec<Bytes> = (0..9).map(|i| zeros(&arena, 1000 + i).unwrap()).collect();
        for (i, bytes) in all.iter_mut().enumerate() {
            assert!(bytes.len() == 1000 + i && bytes.iter().all(|&b| b == 0));
            let before = bytes.as_ptr();
            bytes.fill(i as u8 + 1);
            assert_eq!((before, before as usize % ALIGNMENT), (bytes.as_ptr(), 0));
        }
        let mut copy = all[3].clone();
        copy.fill(77);
        for (i, bytes) in all.iter().enumerate() {
            assert!(bytes.iter().all(|&b| b == i as u8 + 1));
        }
    }
}
