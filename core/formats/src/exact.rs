//! What the writers of model files share: a tensor's producer may not write more or less than its size, and
//! whoever waits is told how far it is.

use std::io::{self, Write};

/// Called with the bytes of each write; an error ends the writing.
pub type Progress<'p> = dyn FnMut(u64) -> io::Result<()> + 'p;

/// Lets no more than the stated number of bytes through.
pub(crate) struct Exact<'p, W> {
    out: W,
    left: u64,
    progress: &'p mut Progress<'p>,
}

impl<'p, W: Write> Exact<'p, W> {
    /// Calls `produce`, which has to write `bytes` bytes.
    pub(crate) fn write(
        out: W,
        bytes: u64,
        progress: &'p mut Progress<'p>,
        produce: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut exact = Exact { out, left: bytes, progress };
        produce(&mut exact)?;
        match exact.left {
            0 => Ok(()),
            left => Err(io::Error::other(format!("{left} of {bytes} bytes were not produced"))),
        }
    }
}

impl<W: Write> Write for Exact<'_, W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() as u64 > self.left {
            let problem = format!("{} bytes too many were produced", data.len() as u64 - self.left);
            return Err(io::Error::other(problem));
        }
        let n = self.out.write(data)?;
        self.left -= n as u64;
        (self.progress)(n as u64)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
