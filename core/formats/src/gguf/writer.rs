//! Writing GGUF v3: to a temporary file beside the target, which it replaces when complete.

use super::types::I2_S_TAIL;
use super::value::encode_str;
use super::{DEFAULT_ALIGNMENT, TensorType, Value};
use crate::error::WriteError;
use crate::exact::{Exact, Progress};
use crate::files;
use crate::{DenseFormat, DenseTensor, TernaryTensor};
use std::io::{self, BufWriter, Write};
use std::path::Path;

type Producer<'a> = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + 'a>;

struct Pending<'a> {
    name: String,
    dims: Vec<u64>,
    tensor_type: TensorType,
    bytes: u64,
    produce: Producer<'a>,
}

/// A GGUF file to be written: keys and tensors in the order in which they were given.
///
/// A tensor is given as a function that writes its bytes when their turn comes, so that a model need never
/// be in memory as a whole.
///
/// ```
/// use bitnet_burn_formats::DenseFormat;
/// use bitnet_burn_formats::gguf::{GgufFile, GgufWriter, Value};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("tiny.gguf");
/// let mut writer = GgufWriter::new();
/// writer.set("general.architecture", "bitnet-b1.58")?;
/// writer.tensor("output_norm.weight", &[4], DenseFormat::F32, |out| {
///     [1.0f32, 2.0, 3.0, 4.0].iter().try_for_each(|v| out.write_all(&v.to_le_bytes()))
/// })?;
/// writer.write(&path)?;
///
/// let file = GgufFile::open(&path)?;
/// assert_eq!(file.value("general.architecture"), Some(&Value::from("bitnet-b1.58")));
/// assert_eq!(file.tensor_bytes("output_norm.weight")?.len(), 16);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Default)]
pub struct GgufWriter<'a> {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Pending<'a>>,
}

impl<'a> GgufWriter<'a> {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key. `general.alignment` is not needed: files are aligned to 32 bytes, the default.
    ///
    /// # Errors
    /// [`WriteError::Duplicate`].
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Result<&mut Self, WriteError> {
        let key = key.into();
        if self.metadata.iter().any(|(k, _)| *k == key) {
            return Err(WriteError::Duplicate { what: "key", name: key });
        }
        self.metadata.push((key, value.into()));
        Ok(self)
    }

    /// Adds a tensor: its dimensions fastest first (for a matrix [columns, rows]), and a function that writes
    /// exactly the bytes that its type takes.
    ///
    /// # Errors
    /// [`WriteError::Tensor`] where the type cannot hold these dimensions, [`WriteError::Duplicate`].
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dims: &[u64],
        tensor_type: impl Into<TensorType>,
        produce: impl FnOnce(&mut dyn Write) -> io::Result<()> + 'a,
    ) -> Result<&mut Self, WriteError> {
        let (name, tensor_type) = (name.into(), tensor_type.into());
        if self.tensors.iter().any(|t| t.name == name) {
            return Err(WriteError::Duplicate { what: "tensor", name });
        }
        let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let block = tensor_type.block_size();
        let problem = match dims {
            _ if !(1..=4).contains(&dims.len()) => "one to four dimensions are possible".to_owned(),
            _ if dims.contains(&0) => "a dimension is zero".to_owned(),
            [k, ..] if !k.is_multiple_of(block) => {
                format!("rows must be a multiple of {block}")
            }
            _ => String::new(),
        };
        let bytes = elements.and(tensor_type.bytes(dims)).filter(|_| problem.is_empty());
        let Some(bytes) = bytes else {
            let problem = if problem.is_empty() { "its size overflows".into() } else { problem };
            return Err(WriteError::Tensor {
                tensor: name,
                dims: dims.to_vec(),
                tensor_type: tensor_type.name(),
                problem,
            });
        };
        self.tensors.push(Pending {
            name,
            dims: dims.to_vec(),
            tensor_type,
            bytes,
            produce: Box::new(produce),
        });
        Ok(self)
    }

    /// Adds a ternary matrix as I2_S under `name`.
    ///
    /// # Errors
    /// [`WriteError::Tensor`] where K is no multiple of 128, or the codes are not `n` canonical rows;
    /// [`WriteError::Duplicate`].
    pub fn i2_s(&mut self, name: impl Into<String>, tensor: TernaryTensor) -> Result<&mut Self, WriteError> {
        let (name, dims) = (name.into(), [tensor.k as u64, tensor.n as u64]);
        let TernaryTensor { codes, scale, .. } = tensor;
        let expected = TensorType::I2_S.bytes(&dims).map(|b| b - I2_S_TAIL);
        if dims[0].is_multiple_of(TensorType::I2_S.block_size()) && Some(codes.len() as u64) != expected {
            let problem = format!("the codes take {} bytes", codes.len());
            let tensor_type = TensorType::I2_S.name();
            return Err(WriteError::Tensor { tensor: name, dims: dims.to_vec(), tensor_type, problem });
        }
        self.tensor(name, &dims, TensorType::I2_S, move |out| write_i2_s(out, &codes, scale))
    }

    /// Adds a dense matrix under `name`, as it is stored.
    ///
    /// # Errors
    /// As [`GgufWriter::tensor`].
    pub fn dense(&mut self, name: impl Into<String>, tensor: DenseTensor) -> Result<&mut Self, WriteError> {
        let dims = [tensor.k as u64, tensor.n as u64];
        self.tensor(name, &dims, tensor.format, move |out| out.write_all(&tensor.data))
    }

    /// Adds a vector of f32 under `name`.
    ///
    /// # Errors
    /// As [`GgufWriter::tensor`].
    pub fn vector(&mut self, name: impl Into<String>, values: Vec<f32>) -> Result<&mut Self, WriteError> {
        let dims = [values.len() as u64];
        self.tensor(name, &dims, DenseFormat::F32, move |out| write_floats(out, &values))
    }

    /// Size of the file, in bytes.
    pub fn file_size(&self) -> u64 {
        self.tensors.iter().fold(self.header().len() as u64, |at, t| at.saturating_add(padded(t.bytes)))
    }

    /// Writes the file: under a temporary name in the same directory, flushed to the disk, then renamed.
    ///
    /// # Errors
    /// [`WriteError::Io`]; an existing file of that name is then untouched.
    pub fn write(self, path: &Path) -> Result<(), WriteError> {
        self.write_with(path, &mut |_| Ok(()))
    }

    /// [`write`](Self::write), saying how far it is.
    pub fn write_with(self, path: &Path, progress: &mut Progress<'_>) -> Result<(), WriteError> {
        struct Failure(String, io::Error);
        impl From<io::Error> for Failure {
            fn from(error: io::Error) -> Self {
                Self("write".into(), error)
            }
        }
        let header = self.header();
        files::replace(path, |out| {
            let mut out = BufWriter::with_capacity(1 << 20, out);
            out.write_all(&header)?;
            for t in self.tensors {
                Exact::write(&mut out, t.bytes, &mut |n| progress(n), t.produce)
                    .and_then(|()| out.write_all(&[0; 32][..(padded(t.bytes) - t.bytes) as usize]))
                    .map_err(|error| Failure(format!("write tensor `{}`", t.name), error))?;
            }
            Ok(out.flush()?)
        })
        .map_err(|Failure(action, error)| WriteError::Io { path: path.to_owned(), action, error })
    }

    /// Everything before the data section, padded.
    fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            encode_str(key, &mut out);
            out.extend((value.value_type() as u32).to_le_bytes());
            value.encode(&mut out);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            encode_str(&t.name, &mut out);
            out.extend((t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.tensor_type.id().to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = offset.saturating_add(padded(t.bytes));
        }
        out.resize(padded(out.len() as u64) as usize, 0);
        out
    }
}

fn padded(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(DEFAULT_ALIGNMENT).unwrap_or(u64::MAX)
}

/// Writes the bytes of an I2_S tensor: the codes, the scale, and zeros up to 32 bytes.
///
/// # Errors
/// Those of `out`.
pub fn write_i2_s(out: &mut dyn Write, codes: &[u8], scale: f32) -> io::Result<()> {
    out.write_all(codes)?;
    let mut tail = [0u8; I2_S_TAIL as usize];
    tail[..4].copy_from_slice(&scale.to_le_bytes());
    out.write_all(&tail)
}

fn write_floats(out: &mut dyn Write, values: &[f32]) -> io::Result<()> {
    values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Array, GgufFile};

    fn error_of(result: Result<&mut GgufWriter<'_>, WriteError>) -> String {
        result.err().expect("an error").to_string()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let mut writer = GgufWriter::new();
        writer.set("general.architecture", "bitnet").unwrap();
        writer.set("list", Array::from_strings(["a", "ß"])).unwrap();
        writer.vector("v", vec![1.0, -2.5, 3.0]).unwrap();
        writer.tensor("q", &[32, 3], DenseFormat::Q8_0, |out| out.write_all(&[7; 102])).unwrap();
        let codes = bytes::Bytes::from(vec![0b01_10_00_01u8; 64]);
        let tensor = TernaryTensor { name: "t".into(), n: 2, k: 128, scale: 0.25, codes, stored_as: "test" };
        writer.i2_s("t", tensor.clone()).unwrap();
        let size = writer.file_size();
        writer.write(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode();
            let plain = dir.path().join("plain");
            std::fs::write(&plain, "").unwrap();
            assert_eq!(mode(&path), mode(&plain));
        }

        let file = GgufFile::open(&path).unwrap();
        assert_eq!((file.version(), file.alignment()), (3, 32));
        assert_eq!(file.value("list").unwrap().as_array().unwrap().strings().collect::<Vec<_>>(), ["a", "ß"]);
        assert_eq!(&file.tensor_bytes("v").unwrap()[4..8], (-2.5f32).to_le_bytes());
        assert_eq!(&file.tensor_bytes("q").unwrap()[..], [7; 102]);
        assert_eq!(file.tensor("q").unwrap().shape(), [3, 32]);
        let (codes, scale) = file.i2_s("t").unwrap();
        assert_eq!((codes, scale), (tensor.codes, 0.25));
        assert!(file.i2_s("q").unwrap_err().to_string().contains("is Q8_0"));
        assert!(file.i2_s("x").unwrap_err().to_string().contains("`x` is missing"));
    }

    #[test]
    fn a_failure_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        std::fs::write(&path, "precious").unwrap();
        for (produced, message) in [(3usize, "1 of 4 bytes were not produced"), (5, "1 bytes too many")] {
            let mut writer = GgufWriter::new();
            writer.tensor("x", &[1], DenseFormat::F32, move |out| out.write_all(&vec![0; produced])).unwrap();
            let error = writer.write(&path).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("`x`"), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), b"precious");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        }
        let nowhere = dir.path().join("missing").join("a.gguf");
        assert!(matches!(GgufWriter::new().write(&nowhere), Err(WriteError::Io { .. })));
    }

    #[test]
    fn impossible_tensors_are_refused() {
        let mut writer = GgufWriter::new();
        let nothing = |_: &mut dyn Write| Ok(());
        writer.set("k", 1u32).unwrap();
        assert!(error_of(writer.set("k", 2u32)).contains("`k` was given twice"));
        writer.tensor("t", &[1], DenseFormat::F32, nothing).unwrap();
        assert!(
            error_of(writer.tensor("t", &[1], DenseFormat::F32, nothing)).contains("`t` was given twice")
        );
        assert!(
            error_of(writer.tensor("a", &[200, 2], TensorType::I2_S, nothing)).contains("multiple of 128")
        );
        assert!(error_of(writer.tensor("a", &[], DenseFormat::F32, nothing)).contains("one to four"));
        assert!(error_of(writer.tensor("a", &[4, 0], DenseFormat::F32, nothing)).contains("zero"));
        assert!(
            error_of(writer.tensor("a", &[u64::MAX, 9], DenseFormat::F32, nothing)).contains("overflows")
        );
        let codes = bytes::Bytes::from(vec![0u8; 31]);
        let tensor = TernaryTensor { name: "t".into(), n: 1, k: 128, scale: 1.0, codes, stored_as: "test" };
        assert!(error_of(writer.i2_s("i", tensor)).contains("31 bytes"));
    }
}
