//! Files in memory.
//!
//! **Changing or truncating a file while its map, or a view of it, is alive is undefined behaviour**: replace
//! files by renaming a new one over the old name, as [`files::replace`](crate::files::replace) does.
#![allow(unsafe_code, reason = "a memory map")]

use crate::error::FileError;
use bytes::Bytes;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// A file in memory, whose pages can be given back.
#[derive(Clone)]
pub struct FileMap(Arc<memmap2::Mmap>);

impl AsRef<[u8]> for FileMap {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl FileMap {
    /// Gives the file's pages in this process back to the system, which reads them again where they are
    /// needed: what was only read to be packed should not stay beside its packing.
    pub fn release(&self) {
        #[cfg(unix)]
        // SAFETY: the map is a read-only one of a file: a page that is given back holds the same bytes when
        // it is read again.
        if let Err(error) = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) } {
            tracing::debug!(%error, "the model's pages stay in memory");
        }
    }

    /// Takes the advice of huge pages back for a part of the file, if it is one of this file's.
    pub fn read_by_parts(&self, part: &[u8]) {
        let offset = (part.as_ptr() as usize).wrapping_sub(self.0.as_ptr() as usize);
        #[cfg(target_os = "linux")]
        if offset < self.0.len() {
            let _ = self.0.advise_range(memmap2::Advice::NoHugePage, offset, part.len());
        }
        #[cfg(not(target_os = "linux"))]
        let _ = offset;
    }
}

/// Maps a file into memory. An empty file has no map.
///
/// # Errors
/// [`FileError::Io`], or [`FileError::NoModel`] for what is no regular file.
pub fn map_file(path: &Path) -> Result<(Bytes, Option<FileMap>), FileError> {
    let io = |action| move |error| FileError::Io { path: path.to_owned(), action, error };
    let meta = std::fs::metadata(path).map_err(io("open"))?;
    if !meta.is_file() {
        let problem = "not a regular file".to_owned();
        return Err(FileError::NoModel { path: path.to_owned(), problem });
    }
    let file = File::open(path).map_err(io("open"))?;
    if meta.len() == 0 {
        return Ok((Bytes::new(), None));
    }
    // SAFETY: the map is private to this process and never written through. That nobody changes or
    // truncates the file meanwhile cannot be enforced; the module's documentation demands it.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io("map"))?;
    // Advice: file systems with large folios then read the file into huge pages, which are as fast as memory of
    // the program's own; others, and pages that are in the cache already, stay as they are.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    let map = FileMap(Arc::new(map));
    Ok((Bytes::from_owner(map.clone()), Some(map)))
}
