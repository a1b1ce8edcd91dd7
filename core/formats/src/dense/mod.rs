//! The dense formats: what embeddings, the lm_head and norms are stored in.
//!
//! | format | a block | value |
//! | --- | --- | --- |
//! | F32, F16, BF16 | one number | |
//! | Q8_0 | 32 weights in 34 bytes: f16 d, 32 x i8 q | d * q |
//! | Q4_0 | 32 weights in 18 bytes: f16 d, 16 bytes; byte i holds the weights i (low nibble) and 16+i | d * (q - 8) |
//! | Q5_0 | 32 weights in 22 bytes, see [`q5_0_block`] | d * (q - 16) |
//! | Q4_1, Q5_1 | 32 weights in 20 or 24 bytes, see [`q4_1_block`], [`q5_1_block`] | d * q + m |
//! | IQ4_NL | 32 weights in 18 bytes, see [`iq4_nl_block`] | d * one of 16 numbers |
//! | Q6_K | 256 weights in 210 bytes, see [`q6_k_block`] | d * scale * (q - 32) |
//! | Q4_K, Q5_K | 256 weights in 144 or 176 bytes, see [`q4_k_block`], [`q5_k_block`] | d * scale * q - dmin * min |
//! | Q2_0, PQ2_0 | 64 weights in 18 bytes, 128 in 34: f16 d, 2 bits a weight in order | d * (q - 1) |
//! | PTQ1_0 | 128 weights in 28 bytes: base 3, f16 d | d * (q - 1) |
//! | TQ1_0, TQ2_0 | 256 weights, see [`tq1_0`](crate::tq1_0), [`tq2_0`](crate::tq2_0) | d * (q - 1) |
//!
//! Each format is one file with its `Facts` and a line in the list below: how it is stored, decoded and encoded, and
//! what GGUF and safetensors files call it.
//!
//! Decoding gives bit for bit what ggml's `dequantize_row_*` gives: products in f32, in ggml's order.
//! Encoding follows ggml's reference quantisers (`quantize_row_*_ref` in `ggml-quants.c`), for Q4_K, Q5_K, Q6_K
//! and IQ4_NL with a simpler choice of scales.

mod blocks;
pub(crate) mod facts;
mod floats;
mod iq4_nl;
mod ptq1_0;
mod q2_0;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod requantise;
mod ternary;
#[cfg(test)]
mod tests;

pub use blocks::QK;
pub use iq4_nl::{IQ4_NL_BYTES, IQ4_NL_NUMBERS, iq4_nl_block};
pub use ptq1_0::PTQ1_0_BYTES;
pub use q2_0::{PQ2_0_BYTES, Q2_0_BYTES};
pub use q4_0::{Q4_0_BYTES, q4_0_block, q4_0_codes};
pub use q4_1::{Q4_1_BYTES, q4_1_block};
pub use q4_k::{Q4_K_BYTES, q4_k_block};
pub use q5_0::{Q5_0_BYTES, q5_0_block};
pub use q5_1::{Q5_1_BYTES, q5_1_block};
pub use q5_k::{Q5_K_BYTES, q5_k_block};
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
    /// 4 bits, an f16 scale and an f16 minimum per 32.
    Q4_1 = q4_1::FACTS,
    /// 5 bits and an f16 scale per 32.
    Q5_0 = q5_0::FACTS,
    /// 5 bits, an f16 scale and an f16 minimum per 32.
    Q5_1 = q5_1::FACTS,
    /// 4 bits, a 6-bit scale and minimum per 32, and an f16 for both per 256.
    Q4_K = q4_k::FACTS,
    /// 5 bits, a 6-bit scale and minimum per 32, and an f16 for both per 256.
    Q5_K = q5_k::FACTS,
    /// 4 bits that stand for 16 numbers, and an f16 scale per 32.
    IQ4_NL = iq4_nl::FACTS,
    /// Ternary: 2 bits, and an f16 scale per 64.
    Q2_0 = q2_0::Q2_0,
    /// Ternary: 2 bits, and an f16 scale per 128 (Prism ML's).
    PQ2_0 = q2_0::PQ2_0,
    /// Ternary: base 3, and an f16 scale per 128 (Prism ML's).
    PTQ1_0 = ptq1_0::FACTS,
    /// Ternary: base 3, and an f16 scale per 256.
    TQ1_0 = crate::tq1_0::FACTS,
    /// Ternary: 2 bits, and an f16 scale per 256.
    TQ2_0 = crate::tq2_0::FACTS,
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

    /// Whether it has ternary weights and a scale for each block.
    pub const fn is_ternary(self) -> bool {
        self.facts().ternary.is_some()
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
    /// The floats are rounded to nearest even. Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and the ternary formats are byte for
    /// byte ggml's reference quantisers. Q4_K, Q5_K, Q6_K and IQ4_NL take their scales from the largest values,
    /// where ggml searches for the scales with the least squared error; their blocks are as valid, the error
    /// somewhat larger.
    ///
    /// # Errors
    /// [`FormatError::NotAMultiple`] or [`Length`](FormatError::Length) where the two lengths don't
    /// fit; for the block formats [`NotFinite`](FormatError::NotFinite) (row 0) and
    /// [`ScaleOverflow`](FormatError::ScaleOverflow), `row` then being unspecified.
    pub fn encode_row(&self, x: &[f32], row: &mut [u8]) -> Result<(), FormatError> {
        self.check_row(x.len(), row.len())?;
        (self.facts().encode)(x, row)
    }

    /// Whether a row of these values comes back exactly.
    pub fn holds(self, x: &[f32]) -> bool {
        let mut row = vec![0; self.row_bytes(x.len()).unwrap_or(0)];
        let mut back = vec![0.0; x.len()];
        let same = |back: &[f32]| back.iter().zip(x).all(|(a, b)| a == b);
        self.encode_row(x, &mut row).and_then(|()| self.decode_row(&row, &mut back)).is_ok() && same(&back)
    }

    /// Appends a row of `blocks` blocks of random values with mean 0 and this standard deviation: floats close to
    /// normal, integers uniform.
    pub fn random_row(self, blocks: usize, deviation: f32, random: &mut SplitMix64, out: &mut Vec<u8>) {
        for _ in 0..blocks {
            (self.facts().random)(deviation, random, out);
        }
    }
}
