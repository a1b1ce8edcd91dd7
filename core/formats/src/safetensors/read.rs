//! Reading: headers are checked when the files are opened; data is viewed.

use super::{INDEX, SINGLE};
use crate::error::FileError;
use crate::files::{FileIdentity, identity_of};
use crate::json::{MAX_JSON_BYTES, read_json};
use crate::map::{FileMap, map_file};
use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// A tensor of a safetensors file: a view of its map.
#[derive(Clone, Debug)]
pub struct SafeTensor {
    /// Its type.
    pub dtype: Dtype,
    /// Its shape, rows first.
    pub shape: Vec<usize>,
    /// As many bytes as type and shape say.
    pub data: Bytes,
}

/// The weights of a directory, in one safetensors file or in several.
#[derive(Default)]
pub struct Shards {
    /// All tensors by name.
    pub tensors: BTreeMap<String, SafeTensor>,
    /// What the tensors are views of.
    pub maps: Vec<FileMap>,
    /// The files, and the index before them where there is one.
    pub files: Vec<(PathBuf, FileIdentity)>,
}

/// Maps all weights of a directory: [`SINGLE`], or the files that [`INDEX`] names.
///
/// # Errors
/// [`FileError`] for whatever is wrong with the files.
pub fn open_directory(dir: &Path) -> Result<Shards, FileError> {
    let single = dir.join(SINGLE);
    if single.exists() {
        return open_file(&single);
    }
    let index_path = dir.join(INDEX);
    if !index_path.exists() {
        return Err(FileError::NoModel {
            path: dir.to_owned(),
            problem: format!(
                "the directory has neither {SINGLE} nor {INDEX} (PyTorch's .bin files are not read)"
            ),
        });
    }
    let identity = identity_of(&index_path)?;
    let index: Index = read_json(&index_path)?;
    let shards: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    let mut all = Shards { files: vec![(index_path.clone(), identity)], ..Shards::default() };
    let mut shard_of = BTreeMap::new();
    for shard in shards {
        if !is_plain_file_name(shard) {
            return Err(FileError::ShardEscapes { path: index_path, shard: shard.to_owned() });
        }
        let of_shard = open_file(&dir.join(shard))?;
        all.maps.extend(of_shard.maps);
        all.files.extend(of_shard.files);
        for (name, tensor) in of_shard.tensors {
            if all.tensors.insert(name.clone(), tensor).is_some() {
                return Err(FileError::Duplicate { path: dir.to_owned(), what: "tensor", name });
            }
            shard_of.insert(name, shard);
        }
    }
    for (name, shard) in &index.weight_map {
        if shard_of.get(name).copied() != Some(shard) {
            let help = format!(" from {shard}, where {INDEX} says that it is");
            return Err(FileError::MissingTensor { path: dir.to_owned(), tensor: name.clone(), help });
        }
    }
    Ok(all)
}

/// Whether a name stays in its directory, on any system.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':', '\0'])
        && name.ends_with(".safetensors")
}

/// Maps one safetensors file. Its header is checked by the safetensors crate: lengths, that the tensors
/// cover the data exactly, and that each is as long as its type and shape say.
///
/// # Errors
/// [`FileError`] for whatever is wrong with it.
pub fn open_file(path: &Path) -> Result<Shards, FileError> {
    let (map, file_map) = map_file(path)?;
    let invalid = |problem: String| FileError::Safetensors { path: path.to_owned(), problem };
    let size = map.len() as u64;
    let truncated = |what: &str, at, needed| FileError::Truncated {
        path: path.to_owned(),
        what: what.to_owned(),
        at,
        needed,
        size,
    };
    let Some(length) = map.first_chunk::<8>().map(|l| u64::from_le_bytes(*l)) else {
        return Err(truncated("the length of the header", 0, 8));
    };
    if length > MAX_JSON_BYTES {
        return Err(FileError::Limit {
            path: path.to_owned(),
            what: "the length of the header (perhaps this is no safetensors file)".into(),
            found: length,
            limit: MAX_JSON_BYTES,
        });
    }
    if length > size - 8 {
        return Err(truncated("the header", 8, length));
    }
    let data_start = 8 + length as usize;

    // The crate adds up offsets without checking for overflow, so none may be larger than the file.
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&map[8..data_start])
        .map_err(|e| invalid(format!("its header is not JSON: {e}")))?;
    let mut end = 0;
    for (name, info) in &header {
        for offset in info.get("data_offsets").and_then(Value::as_array).into_iter().flatten() {
            let offset = offset.as_u64().unwrap_or(u64::MAX);
            if offset > size {
                return Err(invalid(format!(
                    "tensor `{name}` has an offset of {offset} in a file of {size} bytes"
                )));
            }
            end = end.max(offset);
        }
    }
    let data_size = size - data_start as u64;
    if end > data_size {
        let problem = format!(
            "its tensors need {end} bytes behind the header, and there are {data_size}: truncated; download it \
             again"
        );
        return Err(invalid(problem));
    }
    let (_, metadata) = SafeTensors::read_metadata(&map).map_err(|e| invalid(e.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets; // covered by the data, which the crate has checked
        let data = map.slice(data_start + start..data_start + end);
        tensors.insert(name, SafeTensor { dtype: info.dtype, shape: info.shape.clone(), data });
    }
    // An empty file has no header, so there is a map.
    let files = file_map.iter().map(|map| (path.to_owned(), map.identity().clone())).collect();
    Ok(Shards { tensors, maps: file_map.into_iter().collect(), files })
}
