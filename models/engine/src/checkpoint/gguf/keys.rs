//! Keys of a GGUF file by the type that they must have.

use super::super::error::LoadError;
use bitnet_burn_formats::FileError;
use bitnet_burn_formats::gguf::{GgufFile, Value};

pub(super) fn wrong_value(file: &GgufFile, key: String, value: &Value, expected: &str) -> LoadError {
    FileError::WrongValue {
        path: file.path().to_owned(),
        key,
        found: format!("{value} ({})", value.value_type()),
        expected: expected.to_owned(),
    }
    .into()
}

pub(super) fn string(file: &GgufFile, key: &str) -> Result<Option<String>, LoadError> {
    match file.value(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(value) => Err(wrong_value(file, key.to_owned(), value, "a string")),
    }
}

/// A token's id; some writers put -1 for "none".
pub(super) fn token(file: &GgufFile, key: &str) -> Result<Option<u32>, LoadError> {
    match file.value(key) {
        None | Some(Value::U32(u32::MAX) | Value::I32(-1) | Value::I64(-1)) => Ok(None),
        Some(value) => match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(wrong_value(file, key.to_owned(), value, "a token's id")),
        },
    }
}
