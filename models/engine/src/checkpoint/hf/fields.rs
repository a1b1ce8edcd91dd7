//! Fields of `config.json` by the type that they must have.

use super::super::error::LoadError;
use bitnet_burn_formats::FileError;
use serde_json::Value;
use std::path::Path;

/// The models that are read.
const MODEL_TYPES: [&str; 9] =
    ["bitnet", "llama", MAPLE, "minicpm", "qwen2", QWEN2_MOE, "qwen3", QWEN3_5, QWEN3_MOE];
const MODEL_TYPES_TEXT: &str =
    "bitnet, llama, maple, minicpm, qwen2, qwen2_moe, qwen3, qwen3_5_text, qwen3_moe";
/// Experts, and sliding windows in some layers.
pub(super) const MAPLE: &str = "maple";
/// Gated DeltaNets in place of the attention of most layers.
pub(super) const QWEN3_5: &str = "qwen3_5_text";
/// Qwen2 with experts, and a shared one.
pub(super) const QWEN2_MOE: &str = "qwen2_moe";
/// Qwen3 with experts.
pub(super) const QWEN3_MOE: &str = "qwen3_moe";

/// The fields of a configuration file, or of an object in it.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    pub(super) json: &'a Value,
}

impl<'a> Fields<'a> {
    /// A field that is there and not null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn within(&self, key: &str) -> Option<Self> {
        Some(Self { path: self.path, json: self.get(key)? })
    }

    pub(super) fn wrong(&self, key: &str, value: &Value, expected: &str) -> LoadError {
        let mut found = value.to_string();
        if let Some((end, _)) = found.char_indices().nth(80) {
            found.truncate(end);
            found += "...";
        }
        let (path, key) = (self.path.to_owned(), key.to_owned());
        FileError::WrongValue { path, key, found, expected: expected.to_owned() }.into()
    }

    pub(super) fn missing(&self, key: &str) -> LoadError {
        LoadError::MissingKey { path: self.path.to_owned(), key: key.to_owned(), help: String::new() }
    }

    pub(super) fn unsupported(&self, key: &str, value: &Value, supported: &str) -> LoadError {
        LoadError::Unsupported {
            path: self.path.to_owned(),
            what: format!("`{key}`"),
            found: value.to_string(),
            supported: supported.to_owned(),
        }
    }

    pub(super) fn read<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, value, expected))
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        self.read(key, "a non-negative integer", |v| usize::try_from(v.as_u64()?).ok())
    }

    pub(super) fn required_size(&self, key: &str) -> Result<usize, LoadError> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.read(key, "a number", Value::as_f64)
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(super) fn str(&self, key: &str) -> Result<Option<&'a str>, LoadError> {
        self.read(key, "a string", Value::as_str)
    }

    /// A list of numbers.
    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, LoadError> {
        self.read(key, "a list of numbers", |value| {
            value.as_array()?.iter().map(|v| v.as_f64().map(|v| v as f32)).collect()
        })
    }

    /// A token, or several: both occur.
    pub(super) fn tokens(&self, key: &str) -> Result<Option<Vec<u32>>, LoadError> {
        let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
        self.read(key, "a token's id or a list of them", |value| match value {
            Value::Array(items) => items.iter().map(id).collect(),
            value => Some(vec![id(value)?]),
        })
    }

    /// Refuses models of other shapes than those implemented.
    pub(super) fn architecture(&self) -> Result<&'a str, LoadError> {
        if !self.json.is_object() {
            let problem = "a configuration is a JSON object, and this is none".into();
            return Err(FileError::Json { path: self.path.to_owned(), problem }.into());
        }
        match self.str("model_type")? {
            Some(known) if MODEL_TYPES.contains(&known) => Ok(known),
            Some(other) => Err(LoadError::Architecture {
                path: self.path.to_owned(),
                found: other.to_owned(),
                supported: MODEL_TYPES_TEXT,
                lacks: String::new(),
            }),
            None => Err(self.missing("model_type")),
        }
    }
}
