//! What plugins could do to the process.
#![allow(unsafe_code, reason = "descriptors of the process")]

use std::fs::File;
use std::io;

/// Takes stdout away from everything else in the process: what is returned writes to it, and what plugins print goes to
/// stderr.
///
/// # Errors
/// If the process has no stdout, or no descriptor is left.
#[cfg(unix)]
pub fn take_stdout() -> io::Result<File> {
    use std::os::fd::FromRawFd as _;

    let check = |result: libc::c_int| match result {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    };
    // SAFETY: system calls on descriptors of this process; the duplicate belongs to the file from here on.
    unsafe {
        let out = File::from_raw_fd(check(libc::fcntl(libc::STDOUT_FILENO, libc::F_DUPFD_CLOEXEC, 3))?);
        check(libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO))?;
        Ok(out)
    }
}

/// A duplicate of stdout. On this system, plugins that print write to stdout, too.
///
/// # Errors
/// If the process has no stdout.
#[cfg(not(unix))]
pub fn take_stdout() -> io::Result<File> {
    use std::os::windows::io::{AsHandle as _, OwnedHandle};

    let handle: OwnedHandle = io::stdout().as_handle().try_clone_to_owned()?;
    Ok(File::from(handle))
}
