//! Memory that another process maps: files without a name.

use std::fs::File;
use std::io::{Error, Result};
use std::ops::Range;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::sync::{Arc, Mutex};

use memmap2::{MmapOptions, MmapRaw};

use super::pages::{Chunks, HUGE_PAGE, Kept};

/// A file in memory, of which this process has mapped more than it holds: it grows in place.
#[derive(Debug)]
pub(crate) struct SharedFile {
    file: File,
    map: MmapRaw,
    size: Mutex<usize>,
}

impl SharedFile {
    /// A file of `size` bytes that can grow to `most`. It can't be made shorter, so accesses of this
    /// process never fall behind its end.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new(name: &std::ffi::CStr, size: usize, most: usize) -> Result<Self> {
        // SAFETY: a name that ends with NUL; the descriptor belongs to the file from here on.
        let file = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            match libc::memfd_create(name.as_ptr(), flags) {
                -1 => return Err(Error::last_os_error()),
                descriptor => File::from_raw_fd(descriptor),
            }
        };
        file.set_len(size as u64)?;
        // SAFETY: a call on a descriptor of our own.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) } != 0 {
            return Err(Error::last_os_error());
        }
        let map = MmapOptions::new().len(most).no_reserve_swap().map_raw(&file)?;
        Ok(Self { file, map, size: Mutex::new(size) })
    }

    /// Bytes that can be mapped.
    pub fn most(&self) -> usize {
        self.map.len()
    }

    pub fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Makes the file at least this long; no longer than it can be.
    ///
    /// # Errors
    /// Those of the system.
    pub fn grow(&self, size: usize) -> Result<()> {
        let mut known = self.size.lock().unwrap_or_else(|e| e.into_inner());
        if size > self.most() {
            return Err(Error::other(format!(
                "{size} bytes are more than the {} that can be shared",
                self.most()
            )));
        }
        if size > *known {
            self.file.set_len(size as u64)?;
            *known = size;
        }
        Ok(())
    }

    /// Gives the memory of a range back. It holds zeros then.
    pub fn release(&self, range: Range<usize>) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (start, bytes) = (range.start as libc::off_t, range.len() as libc::off_t);
        // SAFETY: a call on a descriptor of our own. If it fails, the memory stays in use, and nothing else.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, start, bytes) };
    }

    /// For a process that may write, too.
    ///
    /// # Errors
    /// Those of the system.
    pub fn writable(&self) -> Result<File> {
        self.file.try_clone()
    }

    /// For a process that may only read: the descriptor can't be mapped for writing.
    ///
    /// # Errors
    /// Those of the system.
    pub fn read_only(&self) -> Result<File> {
        File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// The part of a file in which an arena's chunks lie.
#[derive(Debug)]
pub(crate) struct Space {
    file: Arc<SharedFile>,
    /// In order; no two are neighbours.
    free: Mutex<Vec<Range<usize>>>,
}

/// A chunk that goes back to its space.
#[derive(Debug)]
struct Taken {
    space: Arc<Space>,
    range: Range<usize>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.space.file.release(self.range.clone());
        let mut free = self.space.free.lock().unwrap_or_else(|e| e.into_inner());
        let at = free.partition_point(|other| other.start < self.range.start);
        free.insert(at, self.range.clone());
        for i in [at + 1, at] {
            if i > 0 && i < free.len() && free[i - 1].end == free[i].start {
                free[i - 1].end = free[i].end;
                free.remove(i);
            }
        }
    }
}

impl Space {
    /// All of a file from `start` on, whole huge pages.
    pub fn new(file: Arc<SharedFile>, start: usize) -> Self {
        let first = file.base().wrapping_add(start);
        let start = start + first.align_offset(HUGE_PAGE);
        let end = start + (file.most() - start) / HUGE_PAGE * HUGE_PAGE;
        Self { file, free: Mutex::new(std::iter::once(start..end).collect()) }
    }
}

impl Chunks for Arc<Space> {
    fn chunk(&self, size: usize) -> Result<(*mut u8, Kept)> {
        let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        let at = free.iter().position(|range| range.len() >= size);
        let at =
            at.ok_or_else(|| Error::other(format!("there is no room for {size} bytes that can be shared")))?;
        let start = free[at].start;
        free[at].start += size;
        if free[at].is_empty() {
            free.remove(at);
        }
        drop(free);
        let base = self.file.base().wrapping_add(start);
        // SAFETY: advice for whole pages of our own map: a system without huge pages here is slower, not wrong.
        unsafe { libc::madvise(base.cast(), size, libc::MADV_HUGEPAGE) };
        // An arena that had these pages before may have made them read-only.
        // SAFETY: whole pages of our own map, which were free until now.
        match unsafe { libc::mprotect(base.cast(), size, libc::PROT_READ | libc::PROT_WRITE) } {
            0 => Ok((base, Box::new(Taken { space: self.clone(), range: start..start + size }))),
            _ => Err(Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::PageArena;
    use super::*;

    #[test]
    fn chunks_are_zero_and_come_back() {
        let file = Arc::new(SharedFile::new(c"test", 1 << 30, 1 << 30).unwrap());
        let space = Arc::new(Space::new(file.clone(), 5000));
        let free = || space.free.lock().unwrap().clone();
        let all = free();
        for _ in 0..3 {
            let arena = PageArena::of(space.clone());
            let mut buffers: Vec<_> =
                [1000, 70 << 20, 3 << 20].map(|size| arena.allocate(size, 64).unwrap()).into();
            for buffer in &mut buffers {
                assert!(buffer.as_slice().iter().all(|&byte| byte == 0));
                buffer.as_mut_slice().fill(7);
                let offset = buffer.as_slice().as_ptr() as usize - file.base() as usize;
                assert!((5000..1 << 30).contains(&offset));
            }
            assert!(arena.allocate(1 << 30, 64).is_err());
            assert_eq!(free().len(), 1);
            drop(buffers.remove(1));
            drop((arena, buffers));
            assert_eq!(free(), all);
        }
    }

    #[test]
    fn who_may_only_read_cant_write() {
        let file = SharedFile::new(c"test", 4096, 1 << 20).unwrap();
        // SAFETY: within the file.
        unsafe { file.base().write(9) };
        let other = file.read_only().unwrap();
        assert!(MmapOptions::new().len(4096).map_raw(&other).is_err());
        // SAFETY: nothing writes there now.
        assert_eq!(unsafe { memmap2::Mmap::map(&other) }.unwrap()[0], 9);
        // It can't be made shorter, and grows up to a limit.
        assert!(file.writable().unwrap().set_len(10).is_err());
        file.grow(8192).unwrap();
        file.grow(5000).unwrap();
        assert!(file.grow((1 << 20) + 1).is_err());
        assert_eq!(other.metadata().unwrap().len(), 8192);
    }
}
