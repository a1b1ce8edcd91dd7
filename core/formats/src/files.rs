//! Files that are there as a whole or not at all, and what names them.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use sha2::{Digest, Sha256};
use tempfile::{Builder, NamedTempFile};

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

/// Writes a new file beside the one at `path` (if there is one), flushes it to the disk and puts it in its
/// place, so that no reader sees half of it. Its mode is that of any new file.
///
/// # Errors
/// Those of the system and of `write`; nothing is left then, and the old file is what it was.
pub fn replace<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<(), E> {
    let mut builder = Builder::new();
    builder.prefix(".bitnet-").suffix(".part");
    // Temporary files are for their owner alone otherwise.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    finish(path, builder.tempfile_in(directory(path))?, write)
}

/// [`replace`], with a file that only its owner reads and writes. What a process that is killed meanwhile
/// leaves behind begins as [`leftover_prefix`] says.
///
/// # Errors
/// As [`replace`].
pub fn replace_private<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<(), E> {
    let prefix = leftover_prefix(path);
    finish(path, Builder::new().prefix(&prefix).suffix(".part").tempfile_in(directory(path))?, write)
}

/// How the names of [`replace_private`]'s unfinished files for a path begin.
pub fn leftover_prefix(path: &Path) -> String {
    format!(".{}-", path.file_name().unwrap_or_default().to_string_lossy())
}

/// The directory that a file lies in.
pub fn directory(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn finish<E: From<io::Error>>(
    path: &Path,
    mut temporary: NamedTempFile,
    write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<(), E> {
    let mut out = BufWriter::with_capacity(1 << 16, temporary.as_file_mut());
    write(&mut out)?;
    out.flush()?;
    drop(out);
    temporary.as_file().sync_all()?;
    temporary.persist(path).map_err(|error| error.error)?;
    Ok(())
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
}
