//! Reading: the header is parsed and checked as a whole when the file is opened; data is viewed.

use super::header::{Cursor, GgufTensor};
use super::types::I2_S_TAIL;
use super::value::Value;
use super::{DEFAULT_ALIGNMENT, TensorType};
use crate::DenseFormat;
use crate::error::FileError;
use crate::map::{FileMap, map_file};
use bytes::Bytes;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// An open GGUF file, with all its parts where it has several.
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
    /// The other parts of a file in parts, in their order. Their tensors stand behind those of this one.
    others: Vec<GgufFile>,
}

impl GgufFile {
    /// Opens a file: maps it, and reads and checks its whole header. A file in parts (`-00001-of-00003.gguf`) is
    /// opened by its first part.
    ///
    /// # Errors
    /// [`FileError`] for whatever is wrong with it. No panic and no allocation larger than a small multiple
    /// of the header is reachable from any content.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let mut file = Self::map(path)?;
        file.open_parts()?;
        Ok(file)
    }

    /// One file, whatever it is a part of.
    pub(super) fn map(path: &Path) -> Result<Self, FileError> {
        let (bytes, file_map) = map_file(path)?;
        Ok(Self { file_map, ..Self::parse_one(path.to_owned(), bytes)? })
    }

    /// Takes the other parts' tensors in; their names must be new.
    pub(super) fn add_part(&mut self, part: Self) -> Result<(), FileError> {
        for tensor in &part.tensors {
            if self.names.insert(tensor.name.clone(), self.tensors.len()).is_some() {
                let (path, name) = (part.path.clone(), tensor.name.clone());
                return Err(FileError::Duplicate { path, what: "tensor", name });
            }
            self.tensors.push(tensor.clone());
        }
        self.others.push(part);
        Ok(())
    }

    /// This file, and the other parts of a file in parts, in their order.
    pub fn parts(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.others)
    }

    /// The map, where the file is on the disk. Each of the [`parts`](Self::parts) has its own.
    pub fn file_map(&self) -> Option<&FileMap> {
        self.file_map.as_ref()
    }

    /// All bytes of the file: a view of the memory map where it is on the disk. Each of the [`parts`](Self::parts)
    /// has its own.
    pub fn contents(&self) -> &Bytes {
        &self.map
    }

    /// Reads a file that is in memory already; `path` is for messages.
    ///
    /// # Errors
    /// As [`GgufFile::open`].
    pub fn parse(path: PathBuf, map: Bytes) -> Result<Self, FileError> {
        let file = Self::parse_one(path, map)?;
        file.refuse_parts()?;
        Ok(file)
    }

    fn parse_one(path: PathBuf, map: Bytes) -> Result<Self, FileError> {
        let mut cursor = Cursor::new(&path, &map);
        let (version, n_tensors, n_keys) = cursor.header()?;

        let mut metadata = Vec::new();
        let mut keys = HashMap::new();
        for i in 0..n_keys {
            let key = cursor.name(format_args!("the name of key {} of {n_keys}", i + 1))?;
            let value = cursor.value(&key)?;
            if keys.insert(key.clone(), metadata.len()).is_some() {
                return Err(FileError::Duplicate { path, what: "key", name: key });
            }
            metadata.push((key, value));
        }
        let alignment = match keys.get("general.alignment").map(|&i| &metadata[i].1) {
            None => DEFAULT_ALIGNMENT,
            Some(value) => match value.as_u64() {
                Some(v) if v.is_power_of_two() && v <= u64::from(u32::MAX) => v,
                _ => {
                    return Err(FileError::WrongValue {
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
        let mut unread = None;
        for i in 0..n_tensors {
            let tensor = match cursor.tensor(i, n_tensors) {
                Ok(tensor) => tensor,
                Err(FileError::UnknownTensorType { path, tensor, found, help, .. }) => {
                    let value = keys.get("general.architecture").map(|&i| &metadata[i].1);
                    let architecture = value.and_then(Value::as_str).map(Into::into);
                    let of_layer = tensor.starts_with("blk.");
                    let error = FileError::UnknownTensorType { path, tensor, found, help, architecture };
                    // One of a layer says more about the model than the embedding's, which often comes first.
                    if of_layer {
                        return Err(error);
                    }
                    unread = unread.or(Some(error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            if names.insert(tensor.name.clone(), tensors.len()).is_some() {
                return Err(FileError::Duplicate { path, what: "tensor", name: tensor.name });
            }
            tensors.push(tensor);
        }
        if let Some(error) = unread {
            return Err(error);
        }

        // The header ends here; the data begins at the next multiple of the alignment. A file without
        // tensors may end before that.
        let data_start = (cursor.position() as u64).next_multiple_of(alignment).min(map.len() as u64);
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
            others: Vec::new(),
            map: map.clone(),
        };
        file.check_data()?;
        Ok(file)
    }

    /// Checks that every tensor is aligned, lies within the file, and overlaps with no other.
    fn check_data(&self) -> Result<(), FileError> {
        let available = (self.map.len() - self.data_start) as u64;
        let mut order: Vec<&GgufTensor> = self.tensors.iter().collect();
        order.sort_by_key(|t| t.offset);
        for (i, t) in order.iter().enumerate() {
            let end = order.get(i + 1).map_or(available, |next| next.offset.min(available));
            self.check_groups(t, end.saturating_sub(t.offset))?;
        }
        for t in &self.tensors {
            if !t.offset.is_multiple_of(self.alignment) {
                return Err(FileError::Misaligned {
                    path: self.path.clone(),
                    tensor: t.name.clone(),
                    offset: t.offset,
                    alignment: self.alignment,
                });
            }
            if t.offset.checked_add(t.bytes).is_none_or(|end| end > available) {
                return Err(FileError::OutOfBounds {
                    path: self.path.clone(),
                    tensor: t.name.clone(),
                    offset: t.offset,
                    bytes: t.bytes,
                    available,
                });
            }
        }
        for pair in order.windows(2) {
            let [first, second] = [pair[0], pair[1]];
            let first_end = first.offset + first.bytes; // both within the file, as checked above
            if second.offset < first_end {
                return Err(FileError::Overlap {
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

    /// Refuses a tensor of type Q2_0 that has the bytes of PQ2_0. (Where it is so small that alignment hides the
    /// difference, a larger one of the file shows it.)
    fn check_groups(&self, t: &GgufTensor, found: u64) -> Result<(), FileError> {
        const GROUPS: TensorType = TensorType::Dense(DenseFormat::PQ2_0);
        if t.tensor_type != TensorType::Dense(DenseFormat::Q2_0) || found >= t.bytes {
            return Ok(());
        }
        let whole = t.dims.first().is_some_and(|k| k.is_multiple_of(GROUPS.block_size()));
        let Some(bytes) = GROUPS.bytes(&t.dims).filter(|_| whole) else { return Ok(()) };
        if (bytes..bytes.saturating_add(self.alignment)).contains(&found) {
            return Err(FileError::GroupsOf128 {
                path: self.path.clone(),
                tensor: t.name.clone(),
                bytes: t.bytes,
                found,
            });
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

    /// All tensors, in the order of the file and of its parts.
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
    /// [`FileError::MissingTensor`].
    pub fn tensor_bytes(&self, name: &str) -> Result<Bytes, FileError> {
        let missing = || FileError::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            help: String::new(),
        };
        if let Some(part) = self.others.iter().find(|part| part.names.contains_key(name)) {
            return part.tensor_bytes(name);
        }
        let tensor = self.tensor(name).ok_or_else(missing)?;
        let start = self.data_start + tensor.offset as usize; // within the file: checked when it was opened
        Ok(self.map.slice(start..start + tensor.bytes as usize))
    }

    /// The codes (rows of the canonical layout) and the scale of an I2_S tensor; the codes are a view.
    ///
    /// # Errors
    /// [`FileError::MissingTensor`], or [`FileError::UnsupportedTensorType`] for one of another type.
    pub fn i2_s(&self, name: &str) -> Result<(Bytes, f32), FileError> {
        let data = self.tensor_bytes(name)?;
        let found = self.tensor(name).map(|t| t.tensor_type);
        let (Some(TensorType::I2_S), Some(codes)) = (found, data.len().checked_sub(I2_S_TAIL as usize))
        else {
            return Err(FileError::UnsupportedTensorType {
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

impl std::fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (keys, tensors) = (self.metadata.len(), self.tensors.len());
        write!(f, "GgufFile({:?}, version {}, {keys} keys, {tensors} tensors)", self.path, self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufWriter;

    /// A file of two matrices of `format`, where the tensors' type is then replaced by `id`.
    fn renamed(format: DenseFormat, id: u32) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let mut writer = GgufWriter::new();
        let size = format.row_bytes(256).unwrap() * 320;
        for name in ["token_embd.weight", "output.weight"] {
            writer.tensor(name, &[256, 320], format, move |out| out.write_all(&vec![0x55; size])).unwrap();
        }
        writer.write(&path).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        for name in ["token_embd.weight", "output.weight"] {
            let at = bytes.windows(name.len()).position(|part| part == name.as_bytes()).unwrap();
            // The name, the number of dimensions, and two of them.
            let at = at + name.len() + 4 + 16;
            assert_eq!(bytes[at..at + 4], TensorType::from(format).id().to_le_bytes());
            bytes[at..at + 4].copy_from_slice(&id.to_le_bytes());
        }
        bytes
    }

    fn parse(bytes: Vec<u8>) -> Result<GgufFile, FileError> {
        GgufFile::parse("a.gguf".into(), bytes.into())
    }

    #[test]
    fn groups_of_128_under_the_number_of_q2_0_are_refused_by_name() {
        for (format, id) in [(DenseFormat::Q2_0, 42), (DenseFormat::PQ2_0, 142)] {
            assert!(parse(renamed(format, id)).is_ok());
        }
        let legacy = renamed(DenseFormat::PQ2_0, 42);
        let error = parse(legacy.clone()).unwrap_err();
        // 34 bytes for 128 weights, where 36 are due.
        assert!(
            matches!(&error, FileError::GroupsOf128 { tensor, bytes: 23_040, found: 21_760, .. }
                if tensor == "token_embd.weight"),
            "{error}"
        );
        assert!(error.to_string().contains("PQ2_0 (142)"), "{error}");
        // A file that was cut off is just that.
        let cut = renamed(DenseFormat::Q2_0, 42);
        let cut = cut[..cut.len() - 1000].to_vec();
        assert!(matches!(parse(cut), Err(FileError::OutOfBounds { .. })));
        assert!(matches!(parse(legacy[..legacy.len() - 1000].to_vec()), Err(FileError::GroupsOf128 { .. })));
    }
}
