//! Files that are there as a whole or not at all, and what names them.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use tempfile::{Builder, NamedTempFile, TempDir};

use crate::error::FileError;

/// How the names of unfinished files begin and end.
const UNFINISHED: (&str, &str) = (".bitnet-", ".part");

/// SHA-256 in hexadecimal digits.
///
/// ```
/// assert!(bitnet_burn_formats::files::sha256(b"abc").starts_with("ba7816bf8f01cfea"));
/// ```
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Size and SHA-256 of a regular file, read in pieces.
///
/// # Errors
/// Those of the system, and [`Other`](io::ErrorKind::Other) for what is no regular file. They name the path.
pub fn sha256_of_file(path: &Path) -> io::Result<(u64, String)> {
    let context = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    // A device or a pipe may never end.
    if !fs::metadata(path).map_err(context)?.is_file() {
        return Err(context(io::Error::other("not a regular file")));
    }
    let mut file = File::open(path).map_err(context)?;
    let mut hash = Sha256::new();
    let bytes = io::copy(&mut file, &mut hash).map_err(context)?;
    Ok((bytes, hex(&hash.finalize())))
}

/// What tells whether a path still leads to the same file with the same content: size, time of the last change, and on
/// Unix device and inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    bytes: u64,
    modified: Option<SystemTime>,
    #[cfg(unix)]
    inode: (u64, u64),
}

impl FileIdentity {
    /// That of a file with this metadata.
    pub fn of(meta: &Metadata) -> Self {
        Self {
            bytes: meta.len(),
            modified: meta.modified().ok(),
            #[cfg(unix)]
            inode: {
                use std::os::unix::fs::MetadataExt as _;
                (meta.dev(), meta.ino())
            },
        }
    }

    /// The file's size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// When it was last changed.
    pub fn modified(&self) -> Option<SystemTime> {
        self.modified
    }

    /// That the file at `path` is still this one.
    ///
    /// # Errors
    /// [`FileError::Replaced`], or [`FileError::Io`] if it is gone.
    pub fn check(&self, path: &Path) -> Result<(), FileError> {
        if identity_of(path)? == *self { Ok(()) } else { Err(FileError::Replaced { path: path.to_owned() }) }
    }
}

/// The identity of the file at `path`.
///
/// # Errors
/// [`FileError::Io`].
pub fn identity_of(path: &Path) -> Result<FileIdentity, FileError> {
    match fs::metadata(path) {
        Ok(meta) => Ok(FileIdentity::of(&meta)),
        Err(error) => Err(FileError::Io { path: path.to_owned(), action: "open", error }),
    }
}

/// Writes a new file beside the one at `path` (if there is one), flushes it to the disk and puts it in its
/// place, so that no reader sees half of it. Its mode is that of any new file.
///
/// A symbolic link at `path` is followed, and stays. A device, a pipe or a socket there is written into.
///
/// # Errors
/// Those of the system and of `write`; nothing is left then, and the old file is what it was.
pub fn replace<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<(), E> {
    let path = &linked(path)?;
    if is_special(path) {
        let mut out = BufWriter::with_capacity(1 << 16, OpenOptions::new().write(true).open(path)?);
        write(&mut out)?;
        return Ok(out.flush()?);
    }
    #[cfg_attr(not(unix), expect(unused_mut, reason = "permissions are Unix's"))]
    let mut builder = unfinished();
    // Temporary files are for their owner alone otherwise.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    finish(path, &builder, write)
}

/// [`replace`], with a file that only its owner reads and writes. It replaces a symbolic link.
///
/// # Errors
/// As [`replace`].
pub fn replace_private<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<(), E> {
    finish(path, &unfinished(), write)
}

/// The directory that a file lies in.
pub fn directory(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where symbolic links at `path` lead to. There need not be a file.
fn linked(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    // As many as Linux follows.
    for _ in 0..40 {
        match fs::read_link(&path) {
            Ok(target) => path = directory(&path).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

fn unfinished() -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(UNFINISHED.0).suffix(UNFINISHED.1);
    builder
}

/// The unfinished files and directories of this process.
static PENDING: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn pending() -> MutexGuard<'static, Vec<PathBuf>> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An unfinished file or directory in [`PENDING`].
#[derive(Debug)]
struct Pending(PathBuf);

impl Pending {
    /// Makes one. It can't be discarded before it is in the list.
    fn make<T>(
        make: impl FnOnce() -> io::Result<T>,
        path: impl FnOnce(&T) -> &Path,
    ) -> io::Result<(T, Self)> {
        let mut pending = pending();
        let made = make()?;
        let path = path(&made).to_owned();
        pending.push(path.clone());
        Ok((made, Self(path)))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        pending().retain(|path| *path != self.0);
    }
}

/// Removes what this process is writing and has not finished, for a process that a signal ends. Threads that write wait
/// from then on, for the end of the process.
pub fn discard_unfinished() {
    let pending = pending();
    for path in pending.iter() {
        // A thread may put a file into a directory while it is emptied.
        for _ in 0..10 {
            let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            if removed.is_ok() || !path.exists() {
                break;
            }
        }
    }
    // Nothing new begins.
    std::mem::forget(pending);
}

/// A directory in which something is written that gets its name when it is complete. Dropped, it is removed. What
/// a killed process leaves of it, the next one that writes beside it removes.
#[derive(Debug)]
pub struct UnfinishedDirectory {
    directory: TempDir,
    _pending: Pending,
    /// Held while the process lives. Where directories have no locks, leftovers stay.
    _lock: Option<File>,
}

impl UnfinishedDirectory {
    /// An empty directory in `parent`.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new(parent: &Path) -> io::Result<Self> {
        remove_leftovers(parent);
        loop {
            let (directory, pending) = Pending::make(|| unfinished().tempdir_in(parent), TempDir::path)?;
            let lock = File::open(directory.path()).and_then(|file| file.lock().map(|()| file)).ok();
            // Between its creation and its lock, another process may have removed it.
            if lock.is_none() || directory.path().exists() {
                return Ok(Self { directory, _pending: pending, _lock: lock });
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Gives it its name, at which there is nothing yet.
    ///
    /// # Errors
    /// Those of the system; it is removed then.
    pub fn rename(self, path: &Path) -> io::Result<()> {
        fs::rename(self.path(), path)?;
        let _ = self.directory.keep();
        Ok(())
    }
}

/// Flushes a directory to the disk, so that new names in it outlive a power cut. Does nothing on systems that cannot.
///
/// # Errors
/// Those of the system. Some network file systems refuse it; the files are complete all the same.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

/// Moves a finished file to its name, where [`replace`] would have written it: links are followed, and devices and pipes
/// are written into.
///
/// # Errors
/// Those of the system.
pub fn move_to(from: &Path, path: &Path) -> io::Result<()> {
    let path = &linked(path)?;
    if !is_special(path) {
        match fs::rename(from, path) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
            result => return result,
        }
    }
    replace(path, |out| io::copy(&mut File::open(from)?, out).map(drop))
}

/// Whether there is something that is neither a file nor a directory.
fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| !meta.is_file() && !meta.is_dir())
}

fn finish<E: From<io::Error>>(
    path: &Path,
    builder: &Builder,
    write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<(), E> {
    remove_leftovers(directory(path));
    let (mut temporary, _pending) = locked_file(builder, directory(path))?;
    let mut out = BufWriter::with_capacity(1 << 16, temporary.as_file_mut());
    write(&mut out)?;
    out.flush()?;
    drop(out);
    temporary.as_file().sync_all()?;
    temporary.persist(path).map_err(|error| error.error)?;
    let _ = sync_directory(directory(path));
    Ok(())
}

/// A temporary file, locked until it is closed: while its process lives, no other one takes it for a leftover.
fn locked_file(builder: &Builder, dir: &Path) -> io::Result<(NamedTempFile, Pending)> {
    loop {
        let (file, pending) = Pending::make(|| builder.tempfile_in(dir), NamedTempFile::path)?;
        // A file system without locks keeps leftovers, too.
        let locked = file.as_file().lock().is_ok();
        // Between its creation and its lock, another process may have removed it.
        if !locked || file.path().exists() {
            return Ok((file, pending));
        }
    }
}

/// Removes the unfinished files and directories in a directory whose writers were killed: those that are not locked.
pub fn remove_leftovers(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(UNFINISHED.0) || !name.ends_with(UNFINISHED.1) {
            continue;
        }
        let path = entry.path();
        // A link or a pipe is not ours, and opening a pipe may wait.
        let Ok(kind) = entry.file_type() else { continue };
        if !kind.is_file() && !kind.is_dir() {
            continue;
        }
        let Ok(file) = File::open(&path) else { continue };
        // Locked until it is removed: `locked_file` and `UnfinishedDirectory` rely on it.
        if file.try_lock().is_ok() {
            // What cannot be removed disturbs nothing else.
            let _ = if kind.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace(&path, |out| out.write_all(b"old")).unwrap();
        let fail = |out: &mut dyn Write| {
            out.write_all(b"half")?;
            Err(io::Error::other("no more"))
        };
        assert_eq!(replace(&path, fail).unwrap_err().to_string(), "no more");
        assert_eq!(replace_private(&path, fail).unwrap_err().to_string(), "no more");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        replace_private(&path, |out| out.write_all(b"new")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn private_files_are_their_owners() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace_private(&path, |out| out.write_all(b"mine")).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn unfinished_files_of_killed_writers_are_removed_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in [".bitnet-killed.part", ".bitnet-running.part", "bitnet.part"] {
            std::fs::write(path(name), "half").unwrap();
        }
        let running = std::fs::File::open(path(".bitnet-running.part")).unwrap();
        running.lock().unwrap();
        std::fs::create_dir_all(path(".bitnet-killed-directory.part/sub")).unwrap();
        let unfinished = UnfinishedDirectory::new(dir.path()).unwrap();
        replace(&path("file"), |out| {
            // Another writer's cleaning leaves what is being written.
            replace_private(&path("other"), |out| out.write_all(b"other"))?;
            out.write_all(b"new")
        })
        .unwrap();
        assert!(unfinished.path().exists());
        let at = unfinished.path().to_owned();
        drop(unfinished);
        assert!(!at.exists());
        let names = |entry: io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(names).collect();
        left.sort();
        assert_eq!(left, [".bitnet-running.part", "bitnet.part", "file", "other"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_pipes_are_written_into() {
        use std::os::unix::fs::{FileTypeExt as _, symlink};
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("sub")).unwrap();
        symlink("sub/second", path("first")).unwrap();
        symlink("file", path("sub/second")).unwrap();
        // The file need not be there yet.
        for content in ["one", "two"] {
            replace(&path("first"), |out| out.write_all(content.as_bytes())).unwrap();
            assert_eq!(std::fs::read_to_string(path("sub/file")).unwrap(), content);
            assert!(path("first").is_symlink() && path("sub/second").is_symlink());
        }
        symlink("around", path("around")).unwrap();
        let around = replace(&path("around"), |out| out.write_all(b"x")).unwrap_err();
        assert!(around.to_string().contains("links"), "{around}");

        let pipe = path("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::read(pipe).unwrap()
        });
        replace(&pipe, |out| out.write_all(b"through")).unwrap();
        assert_eq!(reader.join().unwrap(), b"through");
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::read(pipe).unwrap()
        });
        move_to(&path("sub/file"), &pipe).unwrap();
        assert_eq!(reader.join().unwrap(), b"two");
        move_to(&path("sub/file"), &path("moved")).unwrap();
        assert!(path("moved").is_file() && !path("sub/file").exists());
        assert!(std::fs::metadata(&pipe).unwrap().file_type().is_fifo());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5);
    }
}
