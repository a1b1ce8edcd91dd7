//! The header: counts, keys and tensors, each checked against the size of the file before it is believed.

use super::value::decode;
use super::{TensorType, Value, ValueType, others};
use crate::error::FileError;
use bytes::Bytes;
use std::path::Path;

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

/// A position in the header.
pub(super) struct Cursor<'a> {
    path: &'a Path,
    map: &'a Bytes,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// At the beginning of a file; `path` is for messages.
    pub(super) fn new(path: &'a Path, map: &'a Bytes) -> Self {
        Self { path, map, at: 0 }
    }

    /// How many bytes have been read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    fn remaining(&self) -> u64 {
        (self.map.len() - self.at) as u64
    }

    fn truncated(&self, what: impl ToString, needed: u64) -> FileError {
        FileError::Truncated {
            path: self.path.to_owned(),
            what: what.to_string(),
            at: self.at as u64,
            needed,
            size: self.map.len() as u64,
        }
    }

    /// The next `n` bytes, if the file has them.
    fn take(&mut self, n: u64, what: impl ToString) -> Result<&[u8], FileError> {
        if n > self.remaining() {
            return Err(self.truncated(what, n));
        }
        let start = self.at;
        self.at += n as usize; // no more than the file's length, as just checked
        Ok(&self.map[start..self.at])
    }

    fn u32(&mut self, what: impl ToString) -> Result<u32, FileError> {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(self.take(4, what)?);
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self, what: impl ToString) -> Result<u64, FileError> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8, what)?);
        Ok(u64::from_le_bytes(bytes))
    }

    /// Magic, version and counts; the counts are small enough for the file.
    pub(super) fn header(&mut self) -> Result<(u32, u64, u64), FileError> {
        let path = || self.path.to_owned();
        if self.map.is_empty() {
            return Err(FileError::WrongMagic { path: path(), found: "nothing (the file is empty)".into() });
        }
        let magic = &self.map[..self.map.len().min(4)];
        if magic == b"FUGG" {
            let version = self.map.get(4..8).map_or(0, |v| u32::from_be_bytes([v[0], v[1], v[2], v[3]]));
            return Err(FileError::BigEndian { path: path(), version });
        }
        if !b"GGUF".starts_with(magic) {
            return Err(FileError::WrongMagic { path: path(), found: describe_magic(self.map) });
        }
        self.take(4, "the magic \"GGUF\"")?;
        let version = self.u32("the version")?;
        match version {
            2 | 3 => {}
            _ if matches!(version.swap_bytes(), 1..=0xffff) && version & 0xffff == 0 => {
                return Err(FileError::BigEndian {
                    path: self.path.to_owned(),
                    version: version.swap_bytes(),
                });
            }
            _ => return Err(FileError::GgufVersion { path: self.path.to_owned(), version }),
        }
        let n_tensors = self.u64("the number of tensors")?;
        let n_keys = self.u64("the number of keys")?;
        // Key: name's length, type, one byte. Tensor: name's length, n_dims, a dimension, type, offset.
        for (what, count, limit, least) in [
            ("the number of keys", n_keys, limit::KEYS, 13),
            ("the number of tensors", n_tensors, limit::TENSORS, 32),
        ] {
            if count > limit {
                return Err(FileError::Limit {
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
    pub(super) fn name(&mut self, what: std::fmt::Arguments<'_>) -> Result<String, FileError> {
        let len = self.u64(what)?;
        if len == 0 || len > limit::NAME_BYTES {
            return Err(FileError::Limit {
                path: self.path.to_owned(),
                what: format!("the length of {what} (at least 1)"),
                found: len,
                limit: limit::NAME_BYTES,
            });
        }
        self.text(len, what).map(str::to_owned)
    }

    /// `len` bytes of UTF-8.
    fn text(&mut self, len: u64, what: impl ToString) -> Result<&str, FileError> {
        let (path, at) = (self.path, self.at as u64);
        let what = what.to_string();
        match std::str::from_utf8(self.take(len, &what)?) {
            Ok(text) => Ok(text),
            Err(e) => {
                Err(FileError::InvalidUtf8 { path: path.to_owned(), what, at: at + e.valid_up_to() as u64 })
            }
        }
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, FileError> {
        let id = self.u32(format_args!("the type of key `{key}`"))?;
        ValueType::from_id(id).ok_or_else(|| FileError::InvalidValue {
            path: self.path.to_owned(),
            key: key.to_owned(),
            problem: format!("has the unknown type {id}; GGUF has types 0 to 12"),
        })
    }

    /// The value of `key`: checked where it stands, then decoded.
    pub(super) fn value(&mut self, key: &str) -> Result<Value, FileError> {
        let kind = self.value_type(key)?;
        let start = self.at;
        self.check_value(key, kind, 0)?;
        let mut rest = &self.map[start..self.at];
        decode(kind, self.map, &mut rest).ok_or_else(|| FileError::InvalidValue {
            path: self.path.to_owned(),
            key: key.to_owned(),
            problem: format!("is not a valid {kind}"),
        })
    }

    /// Steps over a value, checking every length, all text and all truth values in it.
    fn check_value(&mut self, key: &str, kind: ValueType, depth: usize) -> Result<(), FileError> {
        let invalid = |path: &Path, problem| FileError::InvalidValue {
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
    fn check_string(&mut self, key: &str) -> Result<(), FileError> {
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
            return Err(FileError::InvalidUtf8 {
                path: self.path.to_owned(),
                what: format!("a string in the value of key `{key}`"),
                at: (self.at + e.valid_up_to()) as u64,
            });
        }
        self.at += bytes.len();
        Ok(())
    }

    /// The description of one tensor, with everything checked that needs no other tensor.
    pub(super) fn tensor(&mut self, index: u64, n_tensors: u64) -> Result<GgufTensor, FileError> {
        let name = self.name(format_args!("the name of tensor {} of {n_tensors}", index + 1))?;
        let what = format!("the description of tensor `{name}`");
        let n_dims = u64::from(self.u32(&what)?);
        if n_dims > limit::DIMENSIONS || n_dims == 0 {
            return Err(FileError::Limit {
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
            return Err(FileError::UnknownTensorType {
                path: self.path.to_owned(),
                found: TensorType::describe(type_id),
                help: others::help(type_id, &name),
                tensor: name,
                architecture: None,
            });
        };
        let block = tensor_type.block_size();
        let problem = if dims.contains(&0) {
            Some("a dimension is zero".to_owned())
        } else if !dims[0].is_multiple_of(block) {
            Some(format!("{tensor_type} needs rows of a multiple of {block}, and {} is not one", dims[0]))
        } else {
            None
        };
        // The number of elements, too, which others compute with.
        let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let bytes = elements.and(tensor_type.bytes(&dims)).filter(|&b| b <= i64::MAX as u64);
        match (problem, bytes) {
            (None, Some(bytes)) => Ok(GgufTensor { name, dims, tensor_type, offset, bytes }),
            (problem, _) => Err(FileError::InvalidShape {
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
