//! A temporary directory that goes with its value or, if that lives in a static, with the process.

use std::path::Path;

use tempfile::TempDir;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Temporary(TempDir);

impl Temporary {
    /// A directory of the user's own, whose name begins with `prefix`.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new(prefix: &str) -> std::io::Result<Self> {
        let dir = tempfile::Builder::new().prefix(prefix).tempdir()?;
        #[cfg(unix)]
        at_exit::remember(dir.path());
        Ok(Self(dir))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

#[cfg(unix)]
impl Drop for Temporary {
    fn drop(&mut self) {
        at_exit::forget(self.path());
    }
}

/// Rust drops no statics. C calls functions at the end of `main` and in `exit`.
#[cfg(unix)]
mod at_exit {
    use std::path::{Path, PathBuf};
    use std::sync::{Mutex, MutexGuard, Once};

    /// Directories, each with the process that made it: one that was forked off must not take them away.
    static DIRECTORIES: Mutex<Vec<(u32, PathBuf)>> = Mutex::new(Vec::new());

    fn directories() -> MutexGuard<'static, Vec<(u32, PathBuf)>> {
        DIRECTORIES.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn remember(dir: &Path) {
        static REGISTERED: Once = Once::new();
        // SAFETY: registers a function that takes nothing, returns nothing and does not unwind. If there is no memory
        // to register it, the directory stays.
        REGISTERED.call_once(|| unsafe {
            libc::atexit(remove);
        });
        directories().push((std::process::id(), dir.to_owned()));
    }

    pub fn forget(dir: &Path) {
        directories().retain(|(_, known)| known != dir);
    }

    extern "C" fn remove() {
        // A thread that was stopped within the lock would hold it for ever.
        let Ok(directories) = DIRECTORIES.try_lock() else { return };
        for (process, dir) in directories.iter() {
            if *process == std::process::id() {
                // The process ends: an error could not be reported.
                let _ = std::fs::remove_dir_all(dir);
            }
        }
    }
}
