//! JSON files of sensible size.

use crate::error::FileError;
use serde::de::DeserializeOwned;
use std::io::Read;
use std::path::Path;

/// Largest JSON file and safetensors header that are read: a hundred times what large models have.
pub(crate) const MAX_JSON_BYTES: u64 = 16 << 20;

/// Reads a JSON file of at most 16 MiB.
///
/// # Errors
/// [`FileError::Io`], [`FileError::Limit`], or [`FileError::Json`] where it is not what `T` expects.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let io = |action| move |error| FileError::Io { path: path.to_owned(), action, error };
    let file = std::fs::File::open(path).map_err(io("open"))?;
    let size = file.metadata().map_err(io("open"))?.len();
    if size > MAX_JSON_BYTES {
        return Err(FileError::Limit {
            path: path.to_owned(),
            what: "the size of the file in bytes".into(),
            found: size,
            limit: MAX_JSON_BYTES,
        });
    }
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES).read_to_end(&mut bytes).map_err(io("read"))?;
    serde_json::from_slice(&bytes).map_err(|e| FileError::Json {
        path: path.to_owned(),
        problem: format!("not the JSON that was expected: {e}"),
    })
}
