//! BitNet layers as Burn modules, in the habits of `burn-nn`.

mod attention;
mod bit_linear;
mod block;
mod cache;
mod dense;
mod feed_forward;
mod rotary;

pub use attention::{BitAttention, BitAttentionConfig};
pub use bit_linear::{BitLinear, BitLinearConfig, BitLinearWeight, PackedWeight};
pub use block::{BitBlock, BitBlockConfig};
pub use burn::nn::{RmsNorm, RmsNormConfig};
pub use cache::{CacheError, CacheType, KvCache, SequenceId};
pub use dense::{DenseMatrix, DenseWeight};
pub use feed_forward::{BitFeedForward, BitFeedForwardConfig};
pub use rotary::{RotaryEncoding, RotaryEncodingConfig};

pub use bitnet_burn_backends::GatedActivation;
