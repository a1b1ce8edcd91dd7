//! What the writers of model files share: a tensor's producer may not write more or less than its size.

use std::io::{self, Write};

/// Lets no more than the stated number of bytes through.
pub(crate) struct Exact<W> {
    out: W,
    left: u64,
}

impl<W: Write> Exact<W> {
    /// Calls `produce`, which has to write `bytes` bytes.
    pub(crate) fn write(
        out: W,
        bytes: u64,
        produce: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut exact = Exact { out, left: bytes };
        produce(&mut exact)?;
        match exact.left {
            0 => Ok(()),
            left => Err(io::Error::other(format!("{left} of {bytes} bytes were not produced"))),
        }
    }
}

impl<W: Write> Write for Exact<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() as u64 > self.left {
            let problem = format!("{} bytes too many were produced", data.len() as u64 - self.left);
            return Err(io::Error::other(problem));
        }
        let n = self.out.write(data)?;
        self.left -= n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
