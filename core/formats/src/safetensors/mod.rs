//! safetensors, the format of Hugging Face's weights.
//!
//! Specification: <https://github.com/huggingface/safetensors#format>: a u64 with the length of the header, the
//! header in JSON, the data. The crate of that name parses the header; what it leaves open is checked here.

mod read;
mod writer;

pub use ::safetensors::Dtype;
pub use read::{SafeTensor, Shards, open_directory, open_file};
pub use writer::SafetensorsWriter;

use crate::DenseFormat;

/// The weights of a directory, where they are in one file.
pub const SINGLE: &str = "model.safetensors";
/// Which shard of a directory holds which tensor, where they are in several.
pub const INDEX: &str = "model.safetensors.index.json";

/// The dense format of tensors of this type, if there is one.
pub fn dense_format(dtype: Dtype) -> Option<DenseFormat> {
    DenseFormat::ALL.into_iter().find(|format| format.dtype() == Some(dtype))
}
