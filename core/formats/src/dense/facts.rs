//! What this crate knows about a dense format.

use crate::FormatError;
use crate::random::SplitMix64;
use safetensors::Dtype;

/// Reads a row of blocks into weights and scales.
pub(crate) type ReadTernary = fn(&[u8], &mut [i8], &mut [f32]);

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
    /// The weights of a row of whole blocks, and the scale of each, where the blocks are ternary. (Code 3 is weight 2.) All
    /// lengths fit.
    pub(crate) ternary: Option<ReadTernary>,
    /// The values of a row of whole blocks. Both lengths fit.
    pub(crate) decode: fn(&[u8], &mut [f32]),
    /// The row of these values. Both lengths fit.
    pub(crate) encode: fn(&[f32], &mut [u8]) -> Result<(), FormatError>,
    /// Appends a block of random values of this standard deviation.
    pub(crate) random: fn(f32, &mut SplitMix64, &mut Vec<u8>),
}
