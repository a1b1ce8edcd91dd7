//! Files of logits that other programs wrote: NumPy's `.npy`, and safetensors.
//!
//! NumPy's format: the magic `\x93NUMPY`, two bytes of version, the length of the header (u16 in version 1, u32 in versions 2
//! and 3), the header (a Python dictionary with `descr`, `fortran_order` and `shape`), the values
//! (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).

use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bitnet_burn_formats::safetensors::{Dtype, open_file};
use bitnet_burn_formats::{FileMap, map_file};
use bytes::Bytes;

use super::CompareError;

const MAGIC: &[u8] = b"\x93NUMPY";
/// The longest header of a `.npy` file that is read; NumPy's own have at most a few hundred bytes for one array.
const MAX_HEADER: usize = 64 << 10;
/// Separates the name of a tensor from its file.
const TENSOR: &str = ".safetensors:";

/// A matrix of logits in a file: [positions, vocabulary].
pub struct LogitsFile {
    path: PathBuf,
    /// The tensor's name in a safetensors file.
    tensor: Option<String>,
    kind: Kind,
    shape: [usize; 2],
    data: Bytes,
    map: Option<FileMap>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    F16,
    BF16,
    F32,
    F64,
}

impl Kind {
    fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

impl LogitsFile {
    /// Whether this names a file of logits, not a model: by the extension `.npy` or `.safetensors`, a tensor's name behind
    /// it, or the first bytes.
    pub fn recognises(path: &Path) -> bool {
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("npy" | "safetensors")) || with_tensor(path).is_some() {
            return !path.is_dir();
        }
        let begins = |mut file: File| {
            let mut magic = [0; MAGIC.len()];
            file.read_exact(&mut magic).is_ok() && magic == MAGIC
        };
        path.is_file() && File::open(path).is_ok_and(begins)
    }

    /// Opens a `.npy` file, or a tensor of a safetensors file: `FILE.safetensors:NAME`, or without a name `logits`, or the only
    /// tensor there is. The values are F16, BF16, F32 or F64, [positions, vocabulary] or [1, positions, vocabulary], row
    /// by row.
    ///
    /// # Errors
    /// If the file can't be read, or holds something else.
    pub fn open(path: &Path) -> Result<Self, CompareError> {
        let file = match with_tensor(path) {
            Some((file, name)) => Self::safetensors(&file, Some(&name)),
            None if path.extension().is_some_and(|extension| extension == "safetensors") => {
                Self::safetensors(path, None)
            }
            None => Self::npy(path),
        }?;
        match file.shape {
            [0, _] | [_, 0] => Err(file.error(format!("it is empty: its shape is {:?}", file.shape))),
            _ => Ok(file),
        }
    }

    fn npy(path: &Path) -> Result<Self, CompareError> {
        let (data, map) = map_file(path)?;
        let invalid = |problem| CompareError::Logits { file: path.display().to_string(), problem };
        let (kind, shape, start) = npy_header(&data).map_err(invalid)?;
        let shape = matrix(&shape).map_err(invalid)?;
        let file = Self { path: path.to_owned(), tensor: None, kind, shape, data: data.slice(start..), map };
        file.checked()
    }

    fn safetensors(path: &Path, name: Option<&str>) -> Result<Self, CompareError> {
        let mut shards = open_file(path)?;
        let invalid = |problem| CompareError::Logits { file: path.display().to_string(), problem };
        let only = || match shards.tensors.len() {
            1 => shards.tensors.keys().next().map(String::as_str),
            _ => None,
        };
        let name = name.or_else(|| shards.tensors.contains_key("logits").then_some("logits")).or_else(only);
        let listed = || {
            let names: Vec<&str> = shards.tensors.keys().take(10).map(String::as_str).collect();
            let more = if shards.tensors.len() > names.len() { " ..." } else { "" };
            format!("its tensors are {}{more}; name one as FILE.safetensors:NAME", names.join(", "))
        };
        let Some(name) = name.map(str::to_owned) else { return Err(invalid(listed())) };
        if !shards.tensors.contains_key(&name) {
            return Err(invalid(format!("there is no tensor `{name}`: {}", listed())));
        }
        let tensor = shards.tensors.remove(&name).expect("it contains the key");
        let kind = match tensor.dtype {
            Dtype::F16 => Kind::F16,
            Dtype::BF16 => Kind::BF16,
            Dtype::F32 => Kind::F32,
            Dtype::F64 => Kind::F64,
            other => {
                return Err(invalid(format!(
                    "tensor `{name}` has the type {other}, not F16, BF16, F32 or F64"
                )));
            }
        };
        let shape = matrix(&tensor.shape).map_err(invalid)?;
        let map = shards.maps.pop();
        Self { path: path.to_owned(), tensor: Some(name), kind, shape, data: tensor.data, map }.checked()
    }

    /// The same, if the data is exactly as long as type and shape say.
    fn checked(self) -> Result<Self, CompareError> {
        let [rows, columns] = self.shape;
        let needed = rows.checked_mul(columns).and_then(|values| values.checked_mul(self.kind.size()));
        match needed {
            Some(needed) if needed == self.data.len() => Ok(self),
            _ => {
                let needed = needed.map_or("more bytes than there can be".into(), |n| format!("{n} bytes"));
                Err(self.error(format!(
                    "{:?} of {:?} needs {needed} behind the header, and there are {}: truncated, or not finished",
                    self.shape,
                    self.kind,
                    self.data.len()
                )))
            }
        }
    }

    fn error(&self, problem: String) -> CompareError {
        CompareError::Logits { file: self.name(), problem }
    }

    /// The file, with the tensor's name.
    pub fn name(&self) -> String {
        match &self.tensor {
            None => self.path.display().to_string(),
            Some(tensor) => format!("{}:{tensor}", self.path.display()),
        }
    }

    /// [positions, vocabulary].
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The logits of some positions, row by row.
    ///
    /// # Errors
    /// If the file was truncated since it was opened.
    ///
    /// # Panics
    /// If there are not as many positions.
    pub fn rows(&self, positions: Range<usize>) -> Result<Vec<f32>, CompareError> {
        let (columns, size) = (self.shape[1], self.kind.size());
        let bytes = &self.data[positions.start * columns * size..positions.end * columns * size];
        let values = bytes.chunks_exact(size).map(|value| match *value {
            [a, b] if self.kind == Kind::F16 => half::f16::from_le_bytes([a, b]).to_f32(),
            [a, b] => half::bf16::from_le_bytes([a, b]).to_f32(),
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            [a, b, c, d, e, f, g, h] => f64::from_le_bytes([a, b, c, d, e, f, g, h]) as f32,
            _ => unreachable!("values have 2, 4 or 8 bytes"),
        });
        let values = values.collect();
        if let Some(map) = &self.map {
            map.intact()?;
        }
        Ok(values)
    }
}

/// The file and the tensor in `FILE.safetensors:NAME`.
fn with_tensor(path: &Path) -> Option<(PathBuf, String)> {
    let text = path.to_str()?;
    let at = text.rfind(TENSOR)? + TENSOR.len();
    Some((text[..at - 1].into(), text[at..].into()))
}

/// [positions, vocabulary] of a shape, which may have a batch of 1 in front.
fn matrix(shape: &[usize]) -> Result<[usize; 2], String> {
    match *shape {
        [rows, columns] | [1, rows, columns] => Ok([rows, columns]),
        _ => Err(format!(
            "its shape is {shape:?}; logits are [positions, vocabulary] or [1, positions, vocabulary]"
        )),
    }
}

/// Type, shape, and where the data begins.
fn npy_header(bytes: &[u8]) -> Result<(Kind, Vec<usize>, usize), String> {
    let short = || "it ends within its header".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or("it is no NumPy file: it does not begin with \\x93NUMPY")?;
    let (start, length) = match *rest {
        [1, _, a, b, ..] => (10, u16::from_le_bytes([a, b]) as usize),
        [2 | 3, _, a, b, c, d, ..] => (12, u32::from_le_bytes([a, b, c, d]) as usize),
        [version, minor, ..] if !(1..=3).contains(&version) => {
            return Err(format!("it has version {version}.{minor} of NumPy's format; 1, 2 and 3 are read"));
        }
        _ => return Err(short()),
    };
    if length > MAX_HEADER {
        return Err(format!("its header has {length} bytes; at most {MAX_HEADER} are read"));
    }
    let header = bytes.get(start..start + length).ok_or_else(short)?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is no text")?;
    let kind = match quoted(value(header, "descr")?)? {
        "<f2" => Kind::F16,
        "<f4" => Kind::F32,
        "<f8" => Kind::F64,
        other => {
            return Err(format!("its type is `{other}`; `<f2`, `<f4` and `<f8` are read (`.astype('<f4')`)"));
        }
    };
    let order = value(header, "fortran_order")?;
    if !order.starts_with("False") {
        return Err(
            "its values are not row by row (fortran_order); save `numpy.ascontiguousarray(...)`".into()
        );
    }
    let shape = value(header, "shape")?;
    let numbers = shape.strip_prefix('(').and_then(|rest| rest.split_once(')')).map(|(numbers, _)| numbers);
    let number = |text: &str| {
        text.parse()
            .map_err(|_| format!("its header has the shape `{}`", shape.chars().take(60).collect::<String>()))
    };
    let numbers = numbers.ok_or("its header has a shape that is no tuple")?.split(',').map(str::trim);
    let shape = numbers.filter(|text| !text.is_empty()).map(number).collect::<Result<_, _>>()?;
    Ok((kind, shape, start + length))
}

/// What stands behind a key of the header.
fn value<'a>(header: &'a str, key: &str) -> Result<&'a str, String> {
    let behind = ['\'', '"'].into_iter().find_map(|quote| {
        let (_, behind) = header.split_once(&format!("{quote}{key}{quote}"))?;
        behind.trim_start().strip_prefix(':')
    });
    behind.map(str::trim_start).ok_or_else(|| format!("its header has no `{key}`"))
}

/// A string between quotation marks.
fn quoted(text: &str) -> Result<&str, String> {
    let inner = ['\'', '"'].into_iter().find_map(|quote| text.strip_prefix(quote)?.split_once(quote));
    inner.map(|(inner, _)| inner).ok_or_else(|| "its type is no string: fields are not read".into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn npy(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([version, 0]);
        match version {
            1 => bytes.extend((header.len() as u16).to_le_bytes()),
            _ => bytes.extend((header.len() as u32).to_le_bytes()),
        }
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn header(descr: &str, order: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n")
    }

    fn open(bytes: &[u8]) -> Result<LogitsFile, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npy");
        std::fs::write(&path, bytes).unwrap();
        assert!(LogitsFile::recognises(&path));
        LogitsFile::open(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn matrices_of_every_type_and_version_are_read() {
        let values = [0.5f32, -2.0, 3.0, 1024.0, 0.0, -0.25];
        for (descr, data) in [
            ("<f4", values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()),
            ("<f8", values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect()),
            ("<f2", values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect()),
        ] {
            for (version, shape) in [(1, "(2, 3)"), (2, "(1, 2, 3)"), (3, "(2,3,)")] {
                let file = open(&npy(version, &header(descr, "False", shape), &data)).unwrap();
                assert_eq!(file.shape(), [2, 3]);
                assert_eq!(file.rows(0..2).unwrap(), values);
                assert_eq!(file.rows(1..2).unwrap(), values[3..]);
            }
        }
    }

    #[test]
    fn what_is_wrong_with_a_numpy_file_is_named() {
        let good = header("<f4", "False", "(2, 3)");
        let data = [0; 24];
        let huge = {
            let mut bytes = MAGIC.to_vec();
            bytes.extend([2, 0, 0xff, 0xff, 0xff, 0xff]);
            bytes
        };
        let mut not_text = npy(1, &good, &data);
        not_text[12] = 0xff;
        for (bytes, expected) in [
            (vec![], "does not begin with"),
            (b"GGUF1234".to_vec(), "does not begin with"),
            (MAGIC.to_vec(), "ends within its header"),
            (b"\x93NUMPY\x01\x00\x76".to_vec(), "ends within its header"),
            (npy(1, &good, &data)[..40].to_vec(), "ends within its header"),
            (npy(4, &good, &data), "version 4.0"),
            (huge, "its header has 4294967295 bytes"),
            (not_text, "no text"),
            (npy(1, &good, &data[..23]), "needs 24 bytes behind the header, and there are 23"),
            (npy(1, &good, &[0; 25]), "needs 24 bytes behind the header, and there are 25"),
            (npy(1, &header(">f4", "False", "(2, 3)"), &data), "its type is `>f4`"),
            (npy(1, &header("<i4", "False", "(2, 3)"), &data), "its type is `<i4`"),
            (npy(1, &header("<f4", "True", "(2, 3)"), &data), "fortran_order"),
            (npy(1, &header("<f4", "False", "(6,)"), &data), "its shape is [6]"),
            (npy(1, &header("<f4", "False", "(2, 2, 3)"), &data), "its shape is [2, 2, 3]"),
            (npy(1, &header("<f4", "False", "(0, 3)"), &[]), "it is empty"),
            (npy(1, &header("<f4", "False", "(2, -3)"), &data), "the shape `(2, -3)"),
            (
                npy(1, &header("<f4", "False", "(9223372036854775807, 9)"), &data),
                "more bytes than there can be",
            ),
            (npy(1, &header("<f4", "False", "6"), &data), "no tuple"),
            (
                npy(1, "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 3)}", &data),
                "no string",
            ),
            (npy(1, "{}", &data), "no `descr`"),
        ] {
            let error = open(&bytes).err().unwrap();
            assert!(error.contains(expected) && error.contains("x.npy"), "{expected}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(
            at in 0usize..100,
            new in proptest::collection::vec(any::<u8>(), 0..12),
            length in 0usize..160,
        ) {
            let mut bytes = npy(1, &header("<f4", "False", "(2, 3)"), &[0; 24]);
            let at = at.min(bytes.len());
            let end = (at + new.len()).min(bytes.len());
            bytes.splice(at..end, new);
            bytes.truncate(length);
            if let Ok((_, _, start)) = npy_header(&bytes) {
                prop_assert!(start <= bytes.len());
            }
        }
    }
}
