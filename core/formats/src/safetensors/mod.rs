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
    match dtype {
        Dtype::F32 => Some(DenseFormat::F32),
        Dtype::F16 => Some(DenseFormat::F16),
        Dtype::BF16 => Some(DenseFormat::BF16),
        _ => None,
    }
}

/// The type of tensors in this format, if safetensors files can hold it.
pub fn dtype(format: DenseFormat) -> Option<Dtype> {
    match format {
        DenseFormat::F32 => Some(Dtype::F32),
        DenseFormat::F16 => Some(Dtype::F16),
        DenseFormat::BF16 => Some(Dtype::BF16),
        DenseFormat::Q8_0 | DenseFormat::Q6_K | DenseFormat::Q4_0 => None,
    }
}
