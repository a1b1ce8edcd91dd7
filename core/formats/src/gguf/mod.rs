//! GGUF, the single-file format of llama.cpp and of BitNet's published models.
//!
//! Specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. All little-endian:
//!
//! ```text
//! "GGUF"  u32 version  u64 n_tensors  u64 n_keys
//! n_keys    x  string key, u32 value type, value
//! n_tensors x  string name, u32 n_dims, n_dims x u64 (fastest first), u32 type, u64 offset
//! padding to general.alignment (32 by default): the data section, which the offsets count from
//! string = u64 length, bytes (UTF-8);  array = u32 element type, u64 count, elements
//! ```
//!
//! [`GgufFile`] reads: cap, check, then view. Nothing is allocated by a number from the file that has not
//! been compared with the file's size, and arrays stay where they are, in the memory map.
//! [`GgufWriter`] writes, atomically and without holding the model in memory.

mod file;
mod header;
mod others;
mod parts;
mod ternary;
mod types;
mod value;
mod writer;

pub use file::GgufFile;
pub use header::GgufTensor;
pub use parts::{first_part, part_of};
pub use ternary::TernaryType;
pub use types::TensorType;
pub use value::{Array, Value, ValueType};
pub use writer::{GgufWriter, write_i2_s};

/// `general.alignment` of a file that has no such key.
pub const DEFAULT_ALIGNMENT: u64 = 32;
