//! What this crate knows about a dense format.

use crate::FormatError;
use crate::random::SplitMix64;
use half::f16;
use safetensors::Dtype;

/// How rows of ternary blocks are read and written. All lengths fit.
pub(crate) struct Ternary {
    /// The weights of a row of whole blocks, and the scale of each. (Code 3 is weight 2.)
    pub(crate) read: fn(&[u8], &mut [i8], &mut [f32]),
    /// The row of weights that are -1, 0 or 1, with the scale of each block.
    pub(crate) write: fn(&[i8], &[f16], &mut [u8]),
    /// The row that comes nearest to values.
    pub(crate) write_nearest: fn(&[f32], &mut [u8]) -> Result<(), FormatError>,
}

/// A dense format. Each has one of these in a file of its own, and a line in the list of
/// [`DenseFormat`](super::DenseFormat).
pub(crate) struct Facts {
    /// The name that GGUF tools use.
    pub(crate) name: &'static str,
    /// The number of the type in GGUF.
    pub(crate) gguf_type: u32,
    /// The type in safetensors files, where they have it.
    pub(crate) dtype: Option<Dtype>,
    /// Weights in a block: 1 for the floats.
    pub(crate) block_len: usize,
    /// Bytes in a block.
    pub(crate) block_bytes: usize,
    /// Where the blocks are ternary.
    pub(crate) ternary: Option<Ternary>,
    /// The values of a row of whole blocks. Both lengths fit.
    pub(crate) decode: fn(&[u8], &mut [f32]),
    /// The row of these values. Both lengths fit.
    pub(crate) encode: fn(&[f32], &mut [u8]) -> Result<(), FormatError>,
    /// Appends a block of random values of this standard deviation.
    pub(crate) random: fn(f32, &mut SplitMix64, &mut Vec<u8>),
}
