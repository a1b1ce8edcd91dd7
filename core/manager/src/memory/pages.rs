//! Buffers that lie in huge pages where the system has them: privately packed weights, and KV caches.
//!
//! Decode reads every weight once a token; with 4 KiB pages the page walks alone cost a third of the
//! bandwidth. A single matrix is often smaller than a huge page, so buffers share large chunks that
//! ask the system for huge pages.

use std::io::{Error, ErrorKind};
use std::ops::Range;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::{Arc, Mutex};

use memmap2::MmapMut;

const CHUNK: usize = 64 << 20;
pub(super) const HUGE_PAGE: usize = 2 << 20;

/// Where the chunks of an arena come from, if they are not ordinary memory.
pub(crate) trait Chunks: Keep {
    /// `size` bytes of zeros, a multiple of huge pages and aligned to one, which belong to the caller for as long as it keeps
    /// what comes with them.
    ///
    /// # Errors
    /// If the system or the space has no such memory left.
    fn chunk(&self, size: usize) -> std::io::Result<(*mut u8, Kept)>;
}

/// What keeps a chunk's memory.
pub(crate) type Kept = Box<dyn Keep>;

/// Anything that does.
pub(crate) trait Keep: std::fmt::Debug + Send + Sync + UnwindSafe + RefUnwindSafe {}

impl<T: std::fmt::Debug + Send + Sync + UnwindSafe + RefUnwindSafe> Keep for T {}

/// Hands out page-backed buffers for packed weights, and for KV caches.
///
/// A sealed buffer becomes read-only at the next `protect`, not at once: each border
/// between pages that may be written and pages that may not costs a huge page.
#[derive(Debug, Default)]
pub struct PageArena {
    /// The chunk that is being filled, and how much of it is taken.
    current: Mutex<Option<(Arc<Chunk>, usize)>>,
    /// Whether buffers are written to, so that the system gives their memory now and not when they are used.
    committed: bool,
    /// Sealed parts of chunks that are not read-only yet.
    sealed: Mutex<Vec<(Arc<Chunk>, Range<usize>)>>,
    source: Option<Box<dyn Chunks>>,
}

#[derive(Debug)]
struct Chunk {
    base: *mut u8,
    size: usize,
    _memory: Kept,
}

// SAFETY: the pointer is into memory that the chunk owns; disjoint parts are handed out.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

/// A part of a [`PageArena`] that belongs to its owner alone.
#[derive(Debug)]
pub struct PageBuffer {
    chunk: Arc<Chunk>,
    offset: usize,
    size: usize,
    /// It is not written to any more.
    sealed: bool,
}

impl PageArena {
    /// Buffers of memory that the system has really given: it may promise more than it has, and keep the promise page by
    /// page.
    pub fn committed() -> Self {
        Self { committed: true, ..Self::default() }
    }

    /// Buffers in memory of another kind.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "other systems have no other kind"))]
    pub(crate) fn of(source: impl Chunks + 'static) -> Self {
        Self { source: Some(Box::new(source)), ..Self::default() }
    }

    /// A zeroed buffer of `size` bytes, aligned to `alignment` (a power of two up to 2 MiB).
    ///
    /// # Errors
    /// If the system has no memory left, the size is larger than any machine's memory, or the alignment is not possible.
    pub fn allocate(&self, size: usize, alignment: usize) -> std::io::Result<PageBuffer> {
        let mut buffer = self.reserve(size, alignment)?;
        if self.committed {
            buffer.as_mut_slice().fill(0);
        }
        Ok(buffer)
    }

    /// `size` bytes that begin at a page, for a buffer that is to be sealed: no other buffer lies in its pages.
    ///
    /// # Errors
    /// If the system has no memory left.
    pub(crate) fn allocate_pages(&self, size: usize) -> std::io::Result<PageBuffer> {
        let page = page_size();
        let mut buffer = self.allocate(size.next_multiple_of(page), page.min(HUGE_PAGE))?;
        buffer.size = size;
        Ok(buffer)
    }

    /// Ends the writing of a buffer that [`allocate_pages`](Self::allocate_pages) gave.
    pub(crate) fn seal(&self, buffer: &mut PageBuffer) {
        buffer.sealed = true;
        let range = buffer.offset..(buffer.offset + buffer.size).next_multiple_of(page_size());
        self.sealed.lock().unwrap_or_else(|e| e.into_inner()).push((buffer.chunk.clone(), range));
    }

    /// Makes the pages of all sealed buffers read-only: a write into them ends the process where it happens, with
    /// SIGSEGV. Elsewhere than on Unix, pages stay as they are.
    ///
    /// # Errors
    /// If the system can't.
    pub(crate) fn protect(&self) -> std::io::Result<()> {
        let mut sealed = self.sealed.lock().unwrap_or_else(|e| e.into_inner());
        // In order, so that neighbours become one range.
        sealed.sort_by_key(|(chunk, range)| (chunk.base as usize, range.start));
        let mut ranges: Vec<(Arc<Chunk>, Range<usize>)> = Vec::new();
        for (chunk, range) in sealed.drain(..) {
            match ranges.last_mut() {
                Some((last, end)) if Arc::ptr_eq(last, &chunk) && end.end == range.start => {
                    end.end = range.end
                }
                _ => ranges.push((chunk, range)),
            }
        }
        ranges.into_iter().try_for_each(|(chunk, range)| chunk.protect(range))
    }

    fn reserve(&self, size: usize, alignment: usize) -> std::io::Result<PageBuffer> {
        if !alignment.is_power_of_two() || alignment > HUGE_PAGE {
            let problem =
                format!("an alignment of {alignment}; powers of two up to {HUGE_PAGE} are possible");
            return Err(Error::new(ErrorKind::InvalidInput, problem));
        }
        let mut current = self.current.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((chunk, used)) = &mut *current {
            let offset = used.next_multiple_of(alignment);
            if offset.checked_add(size).is_some_and(|end| end <= chunk.size) {
                *used = offset + size;
                return Ok(PageBuffer { chunk: chunk.clone(), offset, size, sealed: false });
            }
        }
        let chunk = Arc::new(Chunk::new(size.max(CHUNK), self.source.as_deref())?);
        // A buffer that fills its own chunk leaves the shared one to the small ones.
        if size < CHUNK {
            *current = Some((chunk.clone(), size));
        }
        Ok(PageBuffer { chunk, offset: 0, size, sealed: false })
    }
}

impl Chunk {
    fn new(size: usize, source: Option<&dyn Chunks>) -> std::io::Result<Self> {
        // With a page more, so that there is an aligned beginning.
        let sizes = size
            .checked_next_multiple_of(HUGE_PAGE)
            .and_then(|size| Some((size, size.checked_add(HUGE_PAGE)?)))
            .filter(|&(_, mapped)| isize::try_from(mapped).is_ok());
        let Some((size, mapped)) = sizes else {
            let problem = format!("{size} bytes exceed the memory of any machine");
            return Err(Error::new(ErrorKind::OutOfMemory, problem));
        };
        if let Some(source) = source {
            let (base, memory) = source.chunk(size)?;
            return Ok(Self { base, size, _memory: memory });
        }
        let mut map = MmapMut::map_anon(mapped)?;
        // Advice: a system without huge pages is slower, not wrong.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_mut_ptr();
        let base = start.wrapping_add(start.align_offset(HUGE_PAGE));
        Ok(Self { base, size, _memory: Box::new(map) })
    }

    #[cfg(unix)]
    fn protect(&self, range: Range<usize>) -> std::io::Result<()> {
        debug_assert!(range.end <= self.size && range.start.is_multiple_of(page_size()));
        // SAFETY: whole pages of this chunk's memory, and no `&mut` to them is left: whoever seals a buffer gives that up.
        match unsafe { libc::mprotect(self.base.add(range.start).cast(), range.len(), libc::PROT_READ) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    #[cfg(not(unix))]
    fn protect(&self, _: Range<usize>) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(unix)]
fn page_size() -> usize {
    // SAFETY: only asks.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(not(unix))]
fn page_size() -> usize {
    4096
}

impl PageBuffer {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        debug_assert!(self.offset + self.size <= self.chunk.size);
        // SAFETY: the range lies within the chunk's memory, which lives as long as `self`, and no other
        // buffer was given any of it.
        unsafe { std::slice::from_raw_parts(self.chunk.base.add(self.offset), self.size) }
    }

    /// The bytes, to be filled.
    ///
    /// # Panics
    /// If they are packed weights that are sealed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        assert!(!self.sealed, "sealed weights are not written");
        // SAFETY: as in `as_slice`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.base.add(self.offset), self.size) }
    }
}

impl AsRef<[u8]> for PageBuffer {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_no_machine_has_are_errors() {
        let arena = PageArena::default();
        for size in [usize::MAX, usize::MAX - 100, usize::MAX - HUGE_PAGE, isize::MAX as usize, 1 << 62] {
            arena.allocate(size, 64).unwrap_err();
        }
        for alignment in [0, 3, 2 * HUGE_PAGE, 1 << 63] {
            let error = arena.allocate(100, alignment).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        }
        // The chunk that small buffers share is as it was.
        let first = arena.allocate(100, 64).unwrap();
        arena.allocate(usize::MAX - 100, 64).unwrap_err();
        let second = arena.allocate(100, 64).unwrap();
        assert_eq!(second.as_slice().as_ptr() as usize, first.as_slice().as_ptr() as usize + 128);
    }

    #[test]
    fn buffers_are_aligned_disjoint_and_zero() {
        let arena = PageArena::default();
        let mut buffers: Vec<_> = (1..40).map(|i| arena.allocate(i * 1000, 1 << (i % 13)).unwrap()).collect();
        buffers.push(arena.allocate(CHUNK + 5, 64).unwrap());
        for (i, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.as_slice().iter().all(|&b| b == 0));
            buffer.as_mut_slice().fill(i as u8 + 1);
        }
        for (i, buffer) in buffers.iter().enumerate() {
            assert!(buffer.as_slice().iter().all(|&b| b == i as u8 + 1));
            if i < 39 {
                assert_eq!(buffer.as_slice().as_ptr() as usize % (1 << ((i + 1) % 13)), 0);
            }
        }
    }

    #[test]
    fn sealed_buffers_keep_their_bytes_and_their_neighbours_stay_writable() {
        let arena = PageArena::default();
        let mut buffers: Vec<_> = [1, 5000, CHUNK, 70_000].map(|s| arena.allocate_pages(s).unwrap()).into();
        for (i, buffer) in buffers.iter_mut().enumerate() {
            buffer.as_mut_slice().fill(i as u8 + 1);
            if i != 1 {
                arena.seal(buffer);
            }
        }
        arena.protect().unwrap();
        buffers[1].as_mut_slice().fill(9);
        let mut later = arena.allocate_pages(10).unwrap();
        later.as_mut_slice().fill(7);
        arena.seal(&mut later);
        arena.protect().unwrap();
        for (buffer, byte) in buffers.iter().chain([&later]).zip([1, 9, 3, 4, 7]) {
            assert!(buffer.as_slice().iter().all(|&b| b == byte));
        }
        assert!(std::panic::catch_unwind(move || later.as_mut_slice()[0] = 1).is_err());
    }
}
