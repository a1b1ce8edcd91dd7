//! Files in memory.
//!
//! **Changing or truncating a file while its map, or a view of it, is alive is undefined behaviour**: replace
//! files by renaming a new one over the old name, as [`files::replace`](crate::files::replace) does. A program can
//! outlive a truncation with [`outlive_truncation`].
#![allow(unsafe_code, reason = "a memory map")]

use crate::error::FileError;
use crate::files::FileIdentity;
use bytes::Bytes;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file in memory, whose pages can be given back.
#[derive(Clone)]
pub struct FileMap(Arc<Inner>);

struct Inner {
    #[cfg_attr(not(any(target_os = "linux", target_os = "macos")), expect(dead_code, reason = "no signals"))]
    path: PathBuf,
    identity: FileIdentity,
    /// Before the map: what refers to it must go first.
    #[cfg_attr(not(any(target_os = "linux", target_os = "macos")), expect(dead_code, reason = "no signals"))]
    watched: Watched,
    map: memmap2::Mmap,
}

impl AsRef<[u8]> for FileMap {
    fn as_ref(&self) -> &[u8] {
        &self.0.map
    }
}

impl FileMap {
    /// Gives the file's pages in this process back to the system, which reads them again where they are
    /// needed: what was only read to be packed should not stay beside its packing.
    pub fn release(&self) {
        #[cfg(unix)]
        // SAFETY: the map is a read-only one of a file: a page that is given back holds the same bytes when
        // it is read again.
        if let Err(error) = unsafe { self.0.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) } {
            tracing::debug!(%error, "the model's pages stay in memory");
        }
    }

    /// [`release`](Self::release) for a part of the file, if it is one of this file's.
    pub fn release_part(&self, part: &[u8]) {
        #[cfg(unix)]
        if let Some(offset) = self.offset_of(part) {
            // SAFETY: as in `release`. Pages are given back whole, and those at the ends come back when they are read.
            let given = unsafe {
                self.0.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, part.len())
            };
            if let Err(error) = given {
                tracing::debug!(%error, "pages of the model stay in memory");
            }
        }
        #[cfg(not(unix))]
        let _ = part;
    }

    /// Where a part of this file begins; `None` for other bytes.
    pub fn offset_of(&self, part: &[u8]) -> Option<usize> {
        let offset = (part.as_ptr() as usize).wrapping_sub(self.0.map.as_ptr() as usize);
        (offset < self.0.map.len()).then_some(offset)
    }

    /// Takes the advice of huge pages back for a part of the file, if it is one of this file's.
    pub fn read_by_parts(&self, part: &[u8]) {
        #[cfg(target_os = "linux")]
        if let Some(offset) = self.offset_of(part) {
            let _ = self.0.map.advise_range(memmap2::Advice::NoHugePage, offset, part.len());
        }
        #[cfg(not(target_os = "linux"))]
        let _ = part;
    }

    /// Which file is mapped.
    pub fn identity(&self) -> &FileIdentity {
        &self.0.identity
    }

    /// That no part was missing when it was read.
    ///
    /// # Errors
    /// [`FileError::Shrank`], in a program that [outlives](outlive_truncation) it.
    pub fn intact(&self) -> Result<(), FileError> {
        #[cfg(any(target_os = "linux", target_os = "macos"))]
        if self.0.watched.lost() {
            return Err(FileError::Shrank { path: self.0.path.clone() });
        }
        Ok(())
    }
}

/// Maps a file into memory. An empty file has no map.
///
/// # Errors
/// [`FileError::Io`], or [`FileError::NoModel`] for what is no regular file.
pub fn map_file(path: &Path) -> Result<(Bytes, Option<FileMap>), FileError> {
    let io = |action| move |error| FileError::Io { path: path.to_owned(), action, error };
    // Before it is opened: opening a pipe waits for its writer.
    if !std::fs::metadata(path).map_err(io("open"))?.is_file() {
        let problem = "not a regular file".to_owned();
        return Err(FileError::NoModel { path: path.to_owned(), problem });
    }
    let file = File::open(path).map_err(io("open"))?;
    let identity = FileIdentity::of(&file.metadata().map_err(io("open"))?);
    if identity.bytes() == 0 {
        return Ok((Bytes::new(), None));
    }
    // SAFETY: the map is private to this process and never written through. That nobody changes or
    // truncates the file meanwhile cannot be enforced; the module's documentation demands it.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io("map"))?;
    // Advice: file systems with large folios then read the file into huge pages, which are as fast as memory of
    // the program's own; others, and pages that are in the cache already, stay as they are.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    let watched = Watched::new(&map, path);
    let map = FileMap(Arc::new(Inner { path: path.to_owned(), identity, watched, map }));
    Ok((Bytes::from_owner(map.clone()), Some(map)))
}

#[cfg(any(target_os = "linux", target_os = "macos"))]
use truncation::Watched;
#[cfg(any(target_os = "linux", target_os = "macos"))]
pub use truncation::{any_truncated, outlive_truncation};

/// Does nothing: on this system, a mapped file cannot be truncated, or its truncation cannot be outlived.
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
pub fn outlive_truncation() {}

/// Whether a read has met the end of a truncated file.
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
pub fn any_truncated() -> bool {
    false
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
struct Watched;

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
impl Watched {
    fn new(_: &[u8], _: &Path) -> Self {
        Self
    }
}

/// A read beyond the end of a truncated file raises SIGBUS. Here it reads zeros, and the map is marked.
#[cfg(any(target_os = "linux", target_os = "macos"))]
mod truncation {
    use std::mem::MaybeUninit;
    use std::path::Path;
    use std::ptr::null_mut;
    use std::sync::Once;
    use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::*};

    /// A map that the signal handler knows.
    struct Slot {
        /// 0: free. 1: being filled.
        start: AtomicUsize,
        bytes: AtomicUsize,
        lost: AtomicBool,
        message: AtomicPtr<u8>,
        message_bytes: AtomicUsize,
    }

    static SLOTS: [Slot; 256] = [const {
        Slot {
            start: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
            message: AtomicPtr::new(null_mut()),
            message_bytes: AtomicUsize::new(0),
        }
    }; 256];
    static TRUNCATED: AtomicBool = AtomicBool::new(false);
    static PAGE: AtomicUsize = AtomicUsize::new(0);
    static mut PREVIOUS: MaybeUninit<libc::sigaction> = MaybeUninit::uninit();

    /// A map's place among those that the handler knows, until it is dropped. With more maps than places, the last ones
    /// are not watched.
    pub(super) struct Watched {
        slot: Option<&'static Slot>,
        /// What the handler writes to stderr.
        _message: Box<[u8]>,
    }

    impl Watched {
        pub(super) fn new(map: &[u8], path: &Path) -> Self {
            let message = format!(
                "error: {}: the file became shorter while it was in use: what is computed from now on is wrong\n",
                path.display()
            );
            let mut message = message.into_bytes().into_boxed_slice();
            let slot = SLOTS.iter().find(|slot| slot.start.compare_exchange(0, 1, Acquire, Relaxed).is_ok());
            if let Some(slot) = slot {
                slot.bytes.store(map.len(), Relaxed);
                slot.lost.store(false, Relaxed);
                slot.message.store(message.as_mut_ptr(), Relaxed);
                slot.message_bytes.store(message.len(), Relaxed);
                slot.start.store(map.as_ptr() as usize, Release);
            }
            Self { slot, _message: message }
        }

        pub(super) fn lost(&self) -> bool {
            self.slot.is_some_and(|slot| slot.lost.load(Acquire))
        }
    }

    impl Drop for Watched {
        fn drop(&mut self) {
            if let Some(slot) = self.slot {
                slot.start.store(0, Release);
            }
        }
    }

    /// From now on, what is read behind the end of a mapped file that was truncated is zero, and
    /// [`FileMap::intact`](super::FileMap::intact) says so. The first such read writes a line to stderr. For programs, as
    /// they start: it sets the process's handler of SIGBUS. Other causes of this signal end the process as before.
    pub fn outlive_truncation() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // SAFETY: `sysconf` reads a constant. The handler has the signature that SA_SIGINFO asks for; `PREVIOUS` is
            // written here alone, before the handler can read it: until `sigaction` returns, only a SIGBUS of another
            // thread could, and there is no map yet in a program that starts.
            unsafe {
                PAGE.store(libc::sysconf(libc::_SC_PAGESIZE) as usize, Relaxed);
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_bus_error as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&mut action.sa_mask);
                libc::sigaction(libc::SIGBUS, &action, (&raw mut PREVIOUS).cast());
            }
        });
    }

    /// Whether a read has met the end of a truncated file, be it still mapped or not.
    pub fn any_truncated() -> bool {
        TRUNCATED.load(Relaxed)
    }

    /// Calls what a signal handler may call: `mmap` and `write` are system calls on these systems.
    extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid `siginfo_t`; for SIGBUS it has an address.
        let address = unsafe { (*info).si_addr() } as usize;
        let page = PAGE.load(Relaxed);
        for slot in &SLOTS {
            let start = slot.start.load(Acquire);
            let bytes = slot.bytes.load(Relaxed);
            if start <= 1 || address < start || address >= start + bytes {
                continue;
            }
            let from = address & !(page - 1);
            let length = start + bytes - from;
            // SAFETY: the pages from this one to the map's end are the map's own. They lie behind the end of the file, so
            // no read of them has succeeded; the map is alive, since it was being read.
            let zeros = unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED;
                libc::mmap(from as *mut _, length, libc::PROT_READ, flags, -1, 0)
            };
            if zeros == libc::MAP_FAILED {
                break;
            }
            TRUNCATED.store(true, Relaxed);
            if !slot.lost.swap(true, AcqRel) {
                let (message, bytes) = (slot.message.load(Relaxed), slot.message_bytes.load(Relaxed));
                // SAFETY: the message lives as long as its slot is taken.
                unsafe { libc::write(libc::STDERR_FILENO, message.cast(), bytes) };
            }
            return;
        }
        // SAFETY: `PREVIOUS` was written when this handler was set. The instruction is repeated, and what was there
        // before handles the signal.
        unsafe { libc::sigaction(libc::SIGBUS, (&raw const PREVIOUS).cast(), null_mut()) };
    }
}

#[cfg(all(test, any(target_os = "linux", target_os = "macos")))]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_file_reads_as_zeros_and_says_so() {
        outlive_truncation();
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let pages = |value: u8| vec![value; 1 << 20];
        let map = |name: &str, value: u8| {
            std::fs::write(path(name), pages(value)).unwrap();
            map_file(&path(name)).unwrap()
        };
        let ((short, short_map), (whole, whole_map)) = (map("short", 1), map("whole", 2));
        File::options().write(true).open(path("short")).unwrap().set_len(100_000).unwrap();
        let (short_map, whole_map) = (short_map.unwrap(), whole_map.unwrap());
        // Nothing that is missing was read yet.
        assert_eq!(short[99_999], 1);
        short_map.intact().unwrap();
        // From threads at once, as kernels do.
        std::thread::scope(|scope| {
            for at in [(1 << 20) - 1, 500_000, 200_000, 700_000] {
                let short = &short;
                scope.spawn(move || assert_eq!(short[at], 0));
            }
        });
        let error = short_map.intact().unwrap_err().to_string();
        assert!(error.contains("short") && error.contains("became shorter"), "{error}");
        assert_eq!((whole[(1 << 20) - 1], short[50]), (2, 1));
        whole_map.intact().unwrap();
        assert!(any_truncated());
        drop((short, short_map));
        // Its place is free again, for a file that is whole.
        let (again, again_map) = map("again", 3);
        assert_eq!(again[1 << 19], 3);
        again_map.unwrap().intact().unwrap();
    }
}
