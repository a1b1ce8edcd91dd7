//! Reading: the header is parsed and checked as a whole when the file is opened; data is viewed.

use super::types::I2_S_TAIL;
use super::value::decode;
use super::{DEFAULT_ALIGNMENT, TensorType, Value, ValueType};
use crate::checkpoint::{Content, LoadError};
use bytes::Bytes;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Limits on what the format itself leaves open: far above any model.
mod limit {
    pub const KEYS: u64 = 1 << 16;
    pub const TENSORS: u64 = 1 << 18;
    /// The specification's limit for keys; generous for tensors' names (llama.cpp takes 63 bytes).
    pub const NAME_BYTES: u64 = 65_535;
    pub const DIMENSIONS: u64 = 4;
    /// Arrays within arrays.
    pub const ARRAY_DEPTH: usize = 4;
}

/// A tensor of a file: where it is and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name.
    pub name: String,
    /// Its dimensions, fastest first: for a matrix [columns, rows]. One to four, none of them zero.
    pub dims: Vec<u64>,
    /// Its type.
    pub tensor_type: TensorType,
    /// Where it begins, from the start of the data section.
    pub offset: u64,
    /// Its size: for I2_S with the scale behind the codes.
    pub bytes: u64,
}

impl GgufTensor {
    /// (rows, columns), further dimensions counted as rows; a vector is one row.
    pub fn matrix(&self) -> (u64, u64) {
        let columns = self.dims.first().copied().unwrap_or(0);
        (self.dims.iter().skip(1).product(), columns)
    }

    /// The dimensions rows first, as everybody but GGUF writes them.
    pub fn shape(&self) -> Vec<u64> {
        self.dims.iter().rev().copied().collect()
    }
}

/// An open GGUF file.
pub struct GgufFile {
    path: PathBuf,
    map: Bytes,
    /// What `map` is a view of, if it is a file's.
    file_map: Option<FileMap>,
    version: u32,
    alignment: u64,
    data_start: usize,
    metadata: Vec<(String, Value)>,
    keys: HashMap<String, usize>,
    tensors: Vec<GgufTensor>,
    names: HashMap<String, usize>,
}

/// A file in memory, whose pages can be given back.
#[derive(Clone)]
pub(crate) struct FileMap(Arc<memmap2::Mmap>);

impl AsRef<[u8]> for FileMap {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl FileMap {
    /// Gives the file's pages in this process back to the system, which reads them again where they are
    /// needed: what was only read to be packed should not stay beside its packing.
    pub(crate) fn release(&self) {
        #[cfg(unix)]
        // SAFETY: the map is a read-only one of a file: a page that is given back holds the same bytes when
        // it is read again.
        if let Err(error) = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) } {
            tracing::debug!(%error, "the model's pages stay in memory");
        }
    }

    /// Takes the advice of huge pages back for a part of the file, if it is one of this file's.
    pub(crate) fn read_by_parts(&self, part: &[u8]) {
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
pub(crate) fn map_file(path: &Path) -> Result<(Bytes, Option<FileMap>), LoadError> {
    let io = |action| move |error| LoadError::Io { path: path.to_owned(), action, error };
    let meta = std::fs::metadata(path).map_err(io("open"))?;
    if !meta.is_file() {
        let problem = "not a regular file".to_owned();
        return Err(LoadError::NoModel { path: path.to_owned(), problem });
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

impl GgufFile {
    /// Opens a file: maps it, and reads and checks its whole header.
    ///
    /// # Errors
    /// [`LoadError`] for whatever is wrong with it. No panic and no allocation larger than a small multiple
    /// of the header is reachable from any content.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let (bytes, file_map) = map_file(path)?;
        Ok(Self { file_map, ..Self::parse(path.to_owned(), bytes)? })
    }

    /// The map, where the file is on the disk.
    pub(crate) fn file_map(&self) -> Option<&FileMap> {
        self.file_map.as_ref()
    }

    /// The file on the disk, or the bytes where it was in memory from the start.
    pub(crate) fn content(&self) -> Content {
        match self.file_map {
            Some(_) => Content::File(self.path.clone()),
            None => Content::Memory(self.path.clone(), self.map.clone()),
        }
    }

    /// Reads a file that is in memory already; `path` is for messages.
    ///
    /// # Errors
    /// As [`GgufFile::open`].
    pub fn parse(path: PathBuf, map: Bytes) -> Result<Self, LoadError> {
        let mut cursor = Cursor { path: &path, map: &map, at: 0 };
        let (version, n_tensors, n_keys) = cursor.header()?;

        let mut metadata = Vec::new();
        let mut keys = HashMap::new();
        for i in 0..n_keys {
            let key = cursor.name(format_args!("the name of key {} of {n_keys}", i + 1))?;
            let value = cursor.value(&key)?;
            if keys.insert(key.clone(), metadata.len()).is_some() {
                return Err(LoadError::Duplicate { path, what: "key", name: key });
            }
            metadata.push((key, value));
        }
        let alignment = match keys.get("general.alignment").map(|&i| &metadata[i].1) {
            None => DEFAULT_ALIGNMENT,
            Some(value) => match value.as_u64() {
                Some(v) if v.is_power_of_two() && v <= u64::from(u32::MAX) => v,
                _ => {
                    return Err(LoadError::WrongValue {
                        path,
                        key: "general.alignment".into(),
                        found: value.to_string(),
                        expected: "a power of two".into(),
                    });
                }
            },
        };

        let mut tensors = Vec::new();
        let mut names = HashMap::new();
        for i in 0..n_tensors {
            let tensor = cursor.tensor(i, n_tensors)?;
            if names.insert(tensor.name.clone(), tensors.len()).is_some() {
                return Err(LoadError::Duplicate { path, what: "tensor", name: tensor.name });
            }
            tensors.push(tensor);
        }

        // The header ends here; the data begins at the next multiple of the alignment. A file without
        // tensors may end before that.
        let data_start = (cursor.at as u64).next_multiple_of(alignment).min(map.len() as u64);
        let file = Self {
            data_start: data_start as usize,
            file_map: None,
            path,
            version,
            alignment,
            metadata,
            keys,
            tensors,
            names,
            map: map.clone(),
        };
        file.check_data()?;
        Ok(file)
    }

    /// Checks that every tensor is aligned, lies within the file, and overlaps with no other.
    fn check_data(&self) -> Result<(), LoadError> {
        let available = (self.map.len() - self.data_start) as u64;
        for t in &self.tensors {
            if !t.offset.is_multiple_of(self.alignment) {
                return Err(LoadError::Misaligned {
                    path: self.path.clone(),
                    tensor: t.name.clone(),
                    offset: t.offset,
                    alignment: self.alignment,
                });
            }
            if t.offset.checked_add(t.bytes).is_none_or(|end| end > available) {
                return Err(LoadError::OutOfBounds {
                    path: self.path.clone(),
                    tensor: t.name.clone(),
                    offset: t.offset,
                    bytes: t.bytes,
                    available,
                });
            }
        }
        let mut order: Vec<&GgufTensor> = self.tensors.iter().collect();
        order.sort_by_key(|t| t.offset);
        for pair in order.windows(2) {
            let [first, second] = [pair[0], pair[1]];
            let first_end = first.offset + first.bytes; // both within the file, as checked above
            if second.offset < first_end {
                return Err(LoadError::Overlap {
                    path: self.path.clone(),
                    first: first.name.clone(),
                    first_end,
                    second: second.name.clone(),
                    second_start: second.offset,
                });
            }
        }
        Ok(())
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What tensors are aligned to: `general.alignment`.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// All keys with their values, in the order of the file.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&i| &self.metadata[i].1)
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.names.get(name).map(|&i| &self.tensors[i])
    }

    /// A tensor's data: a view of the memory map, [`GgufTensor::bytes`] long.
    ///
    /// # Errors
    /// [`LoadError::MissingTensor`].
    pub fn tensor_bytes(&self, name: &str) -> Result<Bytes, LoadError> {
        let missing = || LoadError::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            help: String::new(),
        };
        let tensor = self.tensor(name).ok_or_else(missing)?;
        let start = self.data_start + tensor.offset as usize; // within the file: checked when it was opened
        Ok(self.map.slice(start..start + tensor.bytes as usize))
    }

    /// The codes (rows of the canonical layout) and the scale of an I2_S tensor; the codes are a view.
    ///
    /// # Errors
    /// [`LoadError::MissingTensor`], or [`LoadError::UnsupportedTensorType`] for one of another type.
    pub fn i2_s(&self, name: &str) -> Result<(Bytes, f32), LoadError> {
        let data = self.tensor_bytes(name)?;
        let found = self.tensor(name).map(|t| t.tensor_type);
        let (Some(TensorType::I2_S), Some(codes)) = (found, data.len().checked_sub(I2_S_TAIL as usize))
        else {
            return Err(LoadError::UnsupportedTensorType {
                path: self.path.clone(),
                tensor: name.to_owned(),
                found: found.map_or("absent", TensorType::name).to_owned(),
                role: "a tensor read as I2_S",
                supported: TensorType::I2_S.name().to_owned(),
            });
        };
        let scale = f32::from_le_bytes([data[codes], data[codes + 1], data[codes + 2], data[codes + 3]]);
        Ok((data.slice(..codes), scale))
    }
}

/// A position in the header.
struct Cursor<'a> {
    path: &'a Path,
    map: &'a Bytes,
    at: usize,
}

impl Cursor<'_> {
    fn remaining(&self) -> u64 {
        (self.map.len() - self.at) as u64
    }

    fn truncated(&self, what: impl ToString, needed: u64) -> LoadError {
        LoadError::Truncated {
            path: self.path.to_owned(),
            what: what.to_string(),
            at: self.at as u64,
            needed,
            size: self.map.len() as u64,
        }
    }

    /// The next `n` bytes, if the file has them.
    fn take(&mut self, n: u64, what: impl ToString) -> Result<&[u8], LoadError> {
        if n > self.remaining() {
            return Err(self.truncated(what, n));
        }
        let start = self.at;
        self.at += n as usize; // no more than the file's length, as just checked
        Ok(&self.map[start..self.at])
    }

    fn u32(&mut self, what: impl ToString) -> Result<u32, LoadError> {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(self.take(4, what)?);
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self, what: impl ToString) -> Result<u64, LoadError> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8, what)?);
        Ok(u64::from_le_bytes(bytes))
    }

    /// Magic, version and counts; the counts are small enough for the file.
    fn header(&mut self) -> Result<(u32, u64, u64), LoadError> {
        let path = || self.path.to_owned();
        if self.map.is_empty() {
            return Err(LoadError::WrongMagic { path: path(), found: "nothing (the file is empty)".into() });
        }
        let magic = &self.map[..self.map.len().min(4)];
        if magic == b"FUGG" {
            let version = self.map.get(4..8).map_or(0, |v| u32::from_be_bytes([v[0], v[1], v[2], v[3]]));
            return Err(LoadError::BigEndian { path: path(), version });
        }
        if !b"GGUF".starts_with(magic) {
            return Err(LoadError::WrongMagic { path: path(), found: describe_magic(self.map) });
        }
        self.take(4, "the magic \"GGUF\"")?;
        let version = self.u32("the version")?;
        match version {
            2 | 3 => {}
            _ if matches!(version.swap_bytes(), 1..=0xffff) && version & 0xffff == 0 => {
                return Err(LoadError::BigEndian {
                    path: self.path.to_owned(),
                    version: version.swap_bytes(),
                });
            }
            _ => return Err(LoadError::GgufVersion { path: self.path.to_owned(), version }),
        }
        let n_tensors = self.u64("the number of tensors")?;
        let n_keys = self.u64("the number of keys")?;
        // Key: name's length, type, one byte. Tensor: name's length, n_dims, a dimension, type, offset.
        for (what, count, limit, least) in [
            ("the number of keys", n_keys, limit::KEYS, 13),
            ("the number of tensors", n_tensors, limit::TENSORS, 32),
        ] {
            if count > limit {
                return Err(LoadError::Limit {
                    path: self.path.to_owned(),
                    what: what.into(),
                    found: count,
                    limit,
                });
            }
            if count * least > self.remaining() {
                return Err(self.truncated(format!("the header, by {what} ({count}),"), count * least));
            }
        }
        Ok((version, n_tensors, n_keys))
    }

    /// A non-empty name, no longer than anything sensible.
    fn name(&mut self, what: std::fmt::Arguments<'_>) -> Result<String, LoadError> {
        let len = self.u64(what)?;
        if len == 0 || len > limit::NAME_BYTES {
            return Err(LoadError::Limit {
                path: self.path.to_owned(),
                what: format!("the length of {what} (at least 1)"),
                found: len,
                limit: limit::NAME_BYTES,
            });
        }
        self.text(len, what).map(str::to_owned)
    }

    /// `len` bytes of UTF-8.
    fn text(&mut self, len: u64, what: impl ToString) -> Result<&str, LoadError> {
        let (path, at) = (self.path, self.at as u64);
        let what = what.to_string();
        match std::str::from_utf8(self.take(len, &what)?) {
            Ok(text) => Ok(text),
            Err(e) => {
                Err(LoadError::InvalidUtf8 { path: path.to_owned(), what, at: at + e.valid_up_to() as u64 })
            }
        }
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, LoadError> {
        let id = self.u32(format_args!("the type of key `{key}`"))?;
        ValueType::from_id(id).ok_or_else(|| LoadError::InvalidValue {
            path: self.path.to_owned(),
            key: key.to_owned(),
            problem: format!("has the unknown type {id}; GGUF has types 0 to 12"),
        })
    }

    /// The value of `key`: checked where it stands, then decoded.
    fn value(&mut self, key: &str) -> Result<Value, LoadError> {
        let kind = self.value_type(key)?;
        let start = self.at;
        self.check_value(key, kind, 0)?;
        let mut rest = &self.map[start..self.at];
        decode(kind, self.map, &mut rest).ok_or_else(|| LoadError::InvalidValue {
            path: self.path.to_owned(),
            key: key.to_owned(),
            problem: format!("is not a valid {kind}"),
        })
    }

    /// Steps over a value, checking every length, all text and all truth values in it.
    fn check_value(&mut self, key: &str, kind: ValueType, depth: usize) -> Result<(), LoadError> {
        let invalid = |path: &Path, problem| LoadError::InvalidValue {
            path: path.to_owned(),
            key: key.to_owned(),
            problem,
        };
        match kind {
            ValueType::String => self.check_string(key)?,
            ValueType::Array => {
                if depth == limit::ARRAY_DEPTH {
                    let problem = format!("is nested more than {} arrays deep", limit::ARRAY_DEPTH);
                    return Err(invalid(self.path, problem));
                }
                let element = self.value_type(key)?;
                let len = self.u64(format_args!("the length of the array `{key}`"))?;
                let least = len.saturating_mul(element.min_size());
                if least > self.remaining() {
                    return Err(self.truncated(format!("the array `{key}` of {len} {element}"), least));
                }
                match element {
                    ValueType::String => (0..len).try_for_each(|_| self.check_string(key))?,
                    ValueType::Bool | ValueType::Array => {
                        (0..len).try_for_each(|_| self.check_value(key, element, depth + 1))?;
                    }
                    _ => {
                        self.take(least, "the array")?;
                    }
                }
            }
            ValueType::Bool => {
                let byte = self.take(1, format_args!("the value of key `{key}`"))?[0];
                if byte > 1 {
                    return Err(invalid(self.path, format!("is a bool of {byte}; only 0 and 1 are valid")));
                }
            }
            fixed => {
                let size = fixed.size().unwrap_or(0) as u64;
                self.take(size, format_args!("the value of key `{key}`"))?;
            }
        }
        Ok(())
    }

    /// Steps over a string. Apart from [`Cursor::text`], since it runs half a million times in a large
    /// vocabulary and should prepare no message unless there is something to say.
    fn check_string(&mut self, key: &str) -> Result<(), LoadError> {
        let len = match self.map[self.at..].first_chunk::<8>() {
            Some(len) => u64::from_le_bytes(*len),
            None => return Err(self.truncated(format!("a string in the value of key `{key}`"), 8)),
        };
        self.at += 8;
        if len > self.remaining() {
            return Err(self.truncated(format!("a string in the value of key `{key}`"), len));
        }
        let bytes = &self.map[self.at..self.at + len as usize];
        if let Err(e) = std::str::from_utf8(bytes) {
            return Err(LoadError::InvalidUtf8 {
                path: self.path.to_owned(),
                what: format!("a string in the value of key `{key}`"),
                at: (self.at + e.valid_up_to()) as u64,
            });
        }
        self.at += bytes.len();
        Ok(())
    }

    /// The description of one tensor, with everything checked that needs no other tensor.
    fn tensor(&mut self, index: u64, n_tensors: u64) -> Result<GgufTensor, LoadError> {
        let name = self.name(format_args!("the name of tensor {} of {n_tensors}", index + 1))?;
        let what = format!("the description of tensor `{name}`");
        let n_dims = u64::from(self.u32(&what)?);
        if n_dims > limit::DIMENSIONS || n_dims == 0 {
            return Err(LoadError::Limit {
                path: self.path.to_owned(),
                what: format!("the number of dimensions of tensor `{name}` (at least 1)"),
                found: n_dims,
                limit: limit::DIMENSIONS,
            });
        }
        let mut dims = Vec::with_capacity(n_dims as usize); // at most 4, as just checked
        for _ in 0..n_dims {
            dims.push(self.u64(&what)?);
        }
        let type_id = self.u32(&what)?;
        let offset = self.u64(&what)?;

        let Some(tensor_type) = TensorType::from_id(type_id) else {
            return Err(LoadError::UnknownTensorType {
                path: self.path.to_owned(),
                tensor: name,
                found: TensorType::describe(type_id),
                supported: TensorType::supported(),
            });
        };
        let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let block = tensor_type.block_size();
        let problem = if dims.contains(&0) {
            Some("a dimension is zero".to_owned())
        } else if !dims[0].is_multiple_of(block) {
            Some(format!("{tensor_type} needs rows of a multiple of {block}, and {} is not one", dims[0]))
        } else {
            None
        };
        let bytes = elements.and_then(|n| tensor_type.bytes(n)).filter(|&b| b <= i64::MAX as u64);
        match (problem, bytes) {
            (None, Some(bytes)) => Ok(GgufTensor { name, dims, tensor_type, offset, bytes }),
            (problem, _) => Err(LoadError::InvalidShape {
                path: self.path.to_owned(),
                tensor: name,
                dims,
                problem: problem.unwrap_or_else(|| "the number of bytes overflows".into()),
            }),
        }
    }
}

/// The first bytes, and what they may mean.
fn describe_magic(map: &[u8]) -> String {
    let head = &map[..map.len().min(8)];
    let bytes = format!("\"{}\"", head[..head.len().min(4)].escape_ascii());
    let guess = match head {
        [b'P', b'K', 3, 4, ..] => " (a zip archive, perhaps a PyTorch checkpoint: convert it to safetensors)",
        [b'<', ..] => " (a web page, perhaps of a failed download)",
        [b'v', b'e', b'r', b's', b'i', b'o', b'n', b' '] => " (a Git LFS pointer: fetch the file itself)",
        [b'l' | b't', b'm' | b'j' | b'g', b'g', ..] => " (the format before GGUF: convert the model again)",
        [_, _, _, _, _, _, 0, 0] => " (perhaps a safetensors file: give the directory that it is in)",
        _ => "",
    };
    format!("{bytes}{guess}")
}

impl std::fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (keys, tensors) = (self.metadata.len(), self.tensors.len());
        write!(f, "GgufFile({:?}, version {}, {keys} keys, {tensors} tensors)", self.path, self.version)
    }
}
