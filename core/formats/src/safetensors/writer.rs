//! Writing a safetensors file, without holding its tensors in memory.

use crate::error::WriteError;
use crate::exact::{Exact, Progress};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

fn io_error(path: &Path, action: &str) -> impl FnOnce(io::Error) -> WriteError {
    move |error| WriteError::Io { path: path.to_owned(), action: action.to_owned(), error }
}

type Producer<'a> = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + 'a>;

struct Pending<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: usize,
    produce: Producer<'a>,
}

/// A safetensors file to be written. A tensor is given as a function that writes its bytes when their turn
/// comes, so that a model need never be in memory as a whole.
#[derive(Default)]
pub struct SafetensorsWriter<'a> {
    tensors: Vec<Pending<'a>>,
}

impl<'a> SafetensorsWriter<'a> {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor, its shape rows first, and a function that writes exactly the bytes that it takes.
    ///
    /// # Errors
    /// [`WriteError::TooLarge`].
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        produce: impl FnOnce(&mut dyn Write) -> io::Result<()> + 'a,
    ) -> Result<(), WriteError> {
        let name = name.into();
        let elements = shape.iter().try_fold(dtype.bitsize() / 8, |n, &d| n.checked_mul(d));
        let Some(bytes) = elements else {
            return Err(WriteError::TooLarge { tensor: name, shape: shape.to_vec() });
        };
        self.tensors.push(Pending { name, dtype, shape: shape.to_vec(), bytes, produce: Box::new(produce) });
        Ok(())
    }

    /// Bytes of all tensors.
    pub fn data_size(&self) -> u64 {
        self.tensors.iter().fold(0u64, |sum, t| sum.saturating_add(t.bytes as u64))
    }

    /// Writes the file and flushes it to the disk. An existing file of that name is replaced. `progress` gets
    /// the bytes of each write.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn write(mut self, path: &Path, progress: &mut Progress<'_>) -> Result<(), WriteError> {
        // The widest types first, as the safetensors crate does: every tensor is then aligned to its type.
        self.tensors.sort_by_key(|t| Reverse(t.dtype));
        let mut end = 0;
        let infos = self.tensors.iter().map(|t| {
            let start = end;
            end += t.bytes;
            let info = TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets: (start, end) };
            (t.name.clone(), info)
        });
        // transformers refuses a file that does not say which framework wrote it.
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let header = Metadata::new(Some(format), infos.collect()).map_err(io::Error::other);
        let header = header.and_then(|header| Ok(serde_json::to_vec(&header)?));
        let mut header = header.map_err(io_error(path, "make the header"))?;
        header.resize(header.len().next_multiple_of(8), b' ');

        let file = File::create(path).map_err(io_error(path, "create it"))?;
        let mut out = BufWriter::with_capacity(1 << 20, &file);
        let length = (header.len() as u64).to_le_bytes();
        let result = out.write_all(&length).and_then(|()| out.write_all(&header));
        result.map_err(io_error(path, "write the header"))?;
        for t in self.tensors {
            let action = format!("write tensor `{}`", t.name);
            Exact::write(&mut out, t.bytes as u64, &mut |n| progress(n), t.produce)
                .map_err(io_error(path, &action))?;
        }
        out.flush().map_err(io_error(path, "write"))?;
        drop(out);
        file.sync_all().map_err(io_error(path, "flush to the disk"))
    }
}
