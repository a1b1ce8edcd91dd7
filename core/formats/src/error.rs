//! What can be wrong with the files that hold a model, and with the writing of them.

use crate::gguf::TensorType;
use std::io;
use std::path::PathBuf;

/// What can be wrong with a model's files, whatever model they hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        error: io::Error,
    },
    /// The file was truncated while it was mapped.
    #[error(
        "{}: the file became shorter while it was in use, and what was computed since is wrong; restore it and start \
         again", path.display()
    )]
    Shrank {
        /// The file.
        path: PathBuf,
    },
    /// The file is not the one that was opened.
    #[error(
        "{}: the file was replaced or changed while it was in use: it is not the one that computed; run again",
        path.display()
    )]
    Replaced {
        /// The file.
        path: PathBuf,
    },
    /// The path leads to nothing that can be opened as a model.
    #[error(
        "{}: {problem}; a model is a GGUF file, or a directory with config.json and model.safetensors",
        path.display()
    )]
    NoModel {
        /// The path.
        path: PathBuf,
        /// What is there instead.
        problem: String,
    },
    /// The file is not GGUF.
    #[error("{}: not a GGUF file: it begins with {found}, not with \"GGUF\"", path.display())]
    WrongMagic {
        /// The file.
        path: PathBuf,
        /// The first bytes, printable, with a guess at what they are.
        found: String,
    },
    /// The file was written for big-endian machines.
    #[error(
        "{}: a big-endian GGUF file (version {version}, byte-swapped); only little-endian files are supported: \
         convert it with gguf-py's gguf_convert_endian", path.display()
    )]
    BigEndian {
        /// The file.
        path: PathBuf,
        /// Its version, in the right byte order.
        version: u32,
    },
    /// A version of GGUF that is not read.
    #[error("{}: GGUF version {version}; versions 2 and 3 are supported", path.display())]
    GgufVersion {
        /// The file.
        path: PathBuf,
        /// The version found.
        version: u32,
    },
    /// The file ends too early, or a length in it is wrong.
    #[error(
        "{}: {what} needs {needed} bytes at offset {at}, but the file has {size}: truncated or corrupt; \
         download it again", path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
        /// Where it begins.
        at: u64,
        /// How many bytes it needs.
        needed: u64,
        /// Size of the file.
        size: u64,
    },
    /// A count or length that no model needs.
    #[error("{}: {what} is {found}; at most {limit} is supported", path.display())]
    Limit {
        /// The file.
        path: PathBuf,
        /// The count or length.
        what: String,
        /// Its value.
        found: u64,
        /// The largest value accepted.
        limit: u64,
    },
    /// Text that is not UTF-8.
    #[error("{}: {what} at offset {at} is not valid UTF-8", path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// The text.
        what: String,
        /// Where it is.
        at: u64,
    },
    /// A metadata key or a tensor occurs twice.
    #[error("{}: {what} `{name}` occurs twice", path.display())]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// `key` or `tensor`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A metadata value whose encoding is unknown or invalid.
    #[error("{}: the value of key `{key}` {problem}", path.display())]
    InvalidValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A metadata key has a value of another type or out of range.
    #[error("{}: key `{key}` is {found}; expected {expected}", path.display())]
    WrongValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A JSON file that is not what it should be.
    #[error("{}: {problem}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column where the parser knows them.
        problem: String,
    },
    /// A safetensors header that the format forbids.
    #[error("{}: not a valid safetensors file: {problem}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// An index names a file outside the model's directory.
    #[error(
        "{}: the index names the shard {shard:?}; a shard must be a plain file name in the same directory",
        path.display()
    )]
    ShardEscapes {
        /// The index.
        path: PathBuf,
        /// The name in it.
        shard: String,
    },
    /// A tensor whose type is not read: not even its size is known.
    #[error(
        "{}: tensor `{tensor}` has type {found}; supported: {}{help}", path.display(), TensorType::supported()
    )]
    UnknownTensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type, as name and number.
        found: String,
        /// What to do about it; begins with punctuation, or is empty.
        help: &'static str,
        /// `general.architecture` of the file: it may be what matters more than the type.
        architecture: Option<Box<str>>,
    },
    /// A known type that cannot play this part.
    #[error("{}: tensor `{tensor}` is {found}; {role} must be one of {supported}", path.display())]
    UnsupportedTensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
        /// The part that it plays.
        role: &'static str,
        /// The types that can.
        supported: String,
    },
    /// Dimensions that the format or the tensor's type forbids.
    #[error("{}: tensor `{tensor}` with dimensions {dims:?}: {problem}", path.display())]
    InvalidShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dimensions as the file lists them.
        dims: Vec<u64>,
        /// What is wrong.
        problem: String,
    },
    /// A tensor whose data does not begin on the file's alignment.
    #[error("{}: tensor `{tensor}` at offset {offset} is not aligned to {alignment} bytes", path.display())]
    Misaligned {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its offset within the data section.
        offset: u64,
        /// `general.alignment`.
        alignment: u64,
    },
    /// A tensor whose data lies outside the file.
    #[error(
        "{}: tensor `{tensor}` needs {bytes} bytes at offset {offset} of a data section of {available}: \
         truncated or corrupt; download it again", path.display()
    )]
    OutOfBounds {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its offset within the data section.
        offset: u64,
        /// Its size.
        bytes: u64,
        /// Size of the data section.
        available: u64,
    },
    /// A tensor of type Q2_0 with 34 bytes for 128 weights, which is PQ2_0: Prism ML's first files have that layout
    /// under Q2_0's number.
    #[error(
        "{}: tensor `{tensor}` has type Q2_0 (42), which takes {bytes} bytes, but the file has {found} there, as the \
         earlier layout of Prism ML with groups of 128 takes. That layout's own type is PQ2_0 (142): download the \
         model again from its publisher, or convert it again", path.display()
    )]
    GroupsOf128 {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The bytes that Q2_0 takes.
        bytes: u64,
        /// The bytes up to the next tensor, or to the end of the file.
        found: u64,
    },
    /// A GGUF file in parts of which one is missing or does not belong to the others.
    #[error("{}: {problem}", path.display())]
    Part {
        /// The part, or the file that asks for it.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Two tensors share bytes.
    #[error(
        "{}: tensors `{first}` (ends at {first_end}) and `{second}` (begins at {second_start}) overlap",
        path.display()
    )]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The tensor that begins first.
        first: String,
        /// Where it ends.
        first_end: u64,
        /// The other one.
        second: String,
        /// Where that begins.
        second_start: u64,
    },
    /// A tensor that the model needs is not there.
    #[error("{}: tensor `{tensor}` is missing{help}", path.display())]
    MissingTensor {
        /// The file or directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What it is for, or what is there instead; begins with punctuation, or is empty.
        help: String,
    },
}

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The operating system refused, or a tensor's producer failed.
    #[error("{}: cannot {action}: {error}", path.display())]
    Io {
        /// The file that was to be written.
        path: PathBuf,
        /// What was attempted.
        action: String,
        /// The answer.
        error: io::Error,
    },
    /// A tensor that GGUF cannot hold.
    #[error("tensor `{tensor}` with dimensions {dims:?} cannot be written as {tensor_type}: {problem}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// Its dimensions, fastest first.
        dims: Vec<u64>,
        /// The type.
        tensor_type: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A tensor whose size overflows.
    #[error("tensor `{tensor}` of shape {shape:?} is too large")]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// Its shape, rows first.
        shape: Vec<usize>,
    },
    /// A key or a tensor was given twice.
    #[error("{what} `{name}` was given twice")]
    Duplicate {
        /// `key` or `tensor`.
        what: &'static str,
        /// Its name.
        name: String,
    },
}
