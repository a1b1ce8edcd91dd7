//! The dense formats: what embeddings, the lm_head and norms are stored in.
//!
//! | format | a block | value |
//! | --- | --- | --- |
//! | F32, F16, BF16 | one number | |
//! | Q8_0 | 32 weights in 34 bytes: f16 d, 32 x i8 q | d * q |
//! | Q4_0 | 32 weights in 18 bytes: f16 d, 16 bytes; byte i holds the weights i (low nibble) and 16+i | d * (q - 8) |
//! | Q6_K | 256 weights in 210 bytes, see [`q6_k_block`] | d * scale * (q - 32) |
//!
//! Each format is one file with its `Facts` and a line in the list below: how it is stored, decoded and encoded, and
//! what GGUF and safetensors files call it.
//!
//! Decoding gives bit for bit what ggml's `dequantize_row_*` gives: products in f32, in ggml's order.
//! Encoding follows ggml's reference quantisers (`quantize_row_*_ref` in `ggml-quants.c`), for Q6_K
//! with a simpler choice of scales.

mod blocks;
mod facts;
mod floats;
mod q4_0;
mod q6_k;
mod q8_0;
mod requantise;
#[cfg(test)]
mod tests;

pub use blocks::QK;
pub use q4_0::{Q4_0_BYTES, q4_0_block, q4_0_codes};
pub(crate) use q6_k::set_q6_k_codes;
pub use q6_k::{Q6_K_BYTES, QK_K, q6_k_block, q6_k_codes};
pub use q8_0::{Q8_0_BYTES, q8_0_block};
pub use requantise::requantise;

use crate::FormatError;
use crate::random::SplitMix64;
use facts::Facts;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

macro_rules! formats {
    ($($(#[$doc:meta])* $format:ident = $facts:path,)*) => {
        /// How a dense tensor stores its values.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[allow(non_camel_case_types, reason = "the names of the formats")]
        pub enum DenseFormat {
            $($(#[$doc])* $format,)*
        }

        impl DenseFormat {
            /// Every format.
            pub const ALL: [Self; [$(stringify!($format)),*].len()] = [$(Self::$format),*];

            pub(crate) const fn facts(self) -> &'static Facts {
                match self {
                    $(Self::$format => &$facts,)*
                }
            }
        }
    };
}

formats! {
    /// IEEE 754 single precision.
    F32 = floats::F32,
    /// IEEE 754 half precision.
    F16 = floats::F16,
    /// The upper half of an f32.
    BF16 = floats::BF16,
    /// 8 bits and an f16 scale per 32.
    Q8_0 = q8_0::FACTS,
    /// 6 bits, an i8 scale per 16 and an f16 scale per 256.
    Q6_K = q6_k::FACTS,
    /// 4 bits and an f16 scale per 32.
    Q4_0 = q4_0::FACTS,
}

impl DenseFormat {
    /// The name that GGUF tools use.
    pub const fn name(self) -> &'static str {
        self.facts().name
    }

    /// The names of all formats, for messages: `F32, F16, ...`.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// The type in safetensors files, where they have it.
    pub const fn dtype(self) -> Option<Dtype> {
        self.facts().dtype
    }

    /// Weights in a block: 1 for the floats.
    pub const fn block_len(self) -> usize {
        self.facts().block_len
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        self.facts().block_bytes
    }

    /// Bytes of a row of `k` weights; `None` where `k` is no whole number of blocks or the size
    /// overflows.
    pub const fn row_bytes(self, k: usize) -> Option<usize> {
        if k.is_multiple_of(self.block_len()) {
            (k / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// Bytes of a row of `k` weights, or which of the two reasons there is against it.
    pub(crate) fn checked_row_bytes(self, k: usize) -> Result<usize, FormatError> {
        let (format, of) = (self.name(), self.block_len());
        if !k.is_multiple_of(of) {
            return Err(FormatError::NotAMultiple { format, dimension: "K", value: k, of });
        }
        self.row_bytes(k).ok_or(FormatError::TooLarge { format, n: 1, k })
    }

    fn check_row(self, k: usize, bytes: usize) -> Result<(), FormatError> {
        crate::check_length(self.name(), 1, k, "bytes", self.checked_row_bytes(k)?, bytes)
    }

    /// The values of a row, as ggml's `dequantize_row_*` computes them.
    ///
    /// # Arguments
    /// * `row`: [`row_bytes`](Self::row_bytes)`(out.len())` bytes
    /// * `out`: K values
    ///
    /// # Errors
    /// [`FormatError::NotAMultiple`] or [`Length`](FormatError::Length) where the two lengths don't
    /// fit; nothing is written then.
    ///
    /// ```
    /// use bitnet_burn_formats::DenseFormat;
    ///
    /// let mut row = [0; 34];
    /// DenseFormat::Q8_0.encode_row(&[127.0; 32], &mut row)?;
    /// let mut values = [0.0; 32];
    /// DenseFormat::Q8_0.decode_row(&row, &mut values)?;
    /// assert_eq!(values, [127.0; 32]);
    /// # Ok::<(), bitnet_burn_formats::FormatError>(())
    /// ```
    pub fn decode_row(&self, row: &[u8], out: &mut [f32]) -> Result<(), FormatError> {
        self.check_row(out.len(), row.len())?;
        (self.facts().decode)(row, out);
        Ok(())
    }

    /// Writes a row of `x.len()` values as `row`.
    ///
    /// The floats are rounded to nearest even. Q8_0 and Q4_0 are byte for byte ggml's reference
    /// quantisers. Q6_K takes for each 16 weights the scale that maps the value of the largest
    /// magnitude to -32, where ggml searches for the scale with the least squared error; its blocks
    /// are as valid, the error somewhat larger.
    ///
    /// # Errors
    /// [`FormatError::NotAMultiple`] or [`Length`](FormatError::Length) where the two lengths don't
    /// fit; for the block formats [`NotFinite`](FormatError::NotFinite) (row 0) and
    /// [`ScaleOverflow`](FormatError::ScaleOverflow), `row` then being unspecified.
    pub fn encode_row(&self, x: &[f32], row: &mut [u8]) -> Result<(), FormatError> {
        self.check_row(x.len(), row.len())?;
        (self.facts().encode)(x, row)
    }

    /// Appends a row of `blocks` blocks of random values with mean 0 and this standard deviation: floats close to
    /// normal, integers uniform.
    pub fn random_row(self, blocks: usize, deviation: f32, random: &mut SplitMix64, out: &mut Vec<u8>) {
        for _ in 0..blocks {
            (self.facts().random)(deviation, random, out);
        }
    }
}
