//! BitNet (1.58-bit, ternary-weight) layers as [Burn](https://burn.dev) modules.
//!
//! [`BitLinear`] takes the place of Burn's `Linear`: it trains through the straight-through estimator, and
//! [`BitLinear::pack`] freezes it into 2 bits a weight. [`BitNet`] is a whole model of such layers.
//!
//! The ternary matmuls run on kernels that the [kernel manager](manager::KernelManager) checks against an exact
//! reference, measures on this machine and selects. Third parties can bring their own kernels as plugins.

mod attention;
mod batch;
mod bit_linear;
mod block;
mod cache;
mod config;
mod delta_net;
mod dense;
mod experts;
mod feed_forward;
mod model;
pub mod names;
mod options;
mod parts;
mod quantisation;
mod rotary;
mod rotation;
mod seen;
mod ternarise;
mod trainable;
mod try_out;

pub use attention::{Attention, BitAttention, BitAttentionConfig};
pub use batch::{Batch, History, Row};
pub use bit_linear::{BitLinear, BitLinearConfig, BitLinearWeight, ImportError, PackedWeight};
pub use block::{BitBlock, BitBlockConfig};
pub use burn::nn::{RmsNorm, RmsNormConfig};
pub use cache::{CacheError, CacheType, KvCache, SequenceId};
pub use config::{ConfigError, DecoderOptions, ModelConfig};
pub use delta_net::{BitDeltaNet, BitDeltaNetConfig, DeltaNetFloats};
pub use dense::{DenseMatrix, DenseMatrixError, DenseWeight};
pub use experts::{BitExpert, BitExperts, BitExpertsConfig, SharedExpert};
pub use feed_forward::{BitFeedForward, BitFeedForwardConfig, FeedForward};
pub use model::{BitNet, ForwardError, rms_norm};
pub use options::{DeltaNet, Experts, SlidingWindows};
pub use parts::{FloatPart, Norm, Projection};
pub use quantisation::{ActivationRule, Quantisation};
pub use rotary::{RopeScaling, RotaryEncoding, RotaryEncodingConfig};
pub use rotation::Rotation;
pub use seen::{Seen, Stage};
pub use ternarise::{Ternarise, Ternary};
pub use trainable::{Parameter, ValuesOf};

pub use bitnet_burn_backends as backends;
pub use bitnet_burn_backends::GatedActivation;
pub use bitnet_burn_formats as formats;
pub use bitnet_burn_formats::WeightScale;
pub use bitnet_burn_manager as manager;

// The example of the README runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
