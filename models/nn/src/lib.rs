//! BitNet (1.58-bit, ternary-weight) layers as [Burn](https://burn.dev) modules.
//!
//! [`BitLinear`] takes the place of Burn's `Linear`: it trains through the straight-through estimator, and
//! [`BitLinear::pack`] freezes it into 2 bits a weight. [`BitNet`] is a whole model of such layers.
//!
//! ```
//! use bitnet_burn::BitLinearConfig;
//! use burn::tensor::{Device, Distribution, Tensor};
//!
//! let device = Device::flex();
//! let layer = BitLinearConfig::new(64, 10).with_norm(true).init(&device);
//! let x = Tensor::<2>::random([8, 64], Distribution::Default, &device);
//! let trained = layer.forward(x.clone());
//! let packed = layer.pack()?;
//! assert_eq!(packed.forward(x).dims(), trained.dims());
//! # Ok::<(), bitnet_burn::manager::ManagerError>(())
//! ```
//!
//! | to | use |
//! | --- | --- |
//! | train and pack layers of your own model | [`BitLinear`], [`BitAttention`], [`BitFeedForward`], [`BitBlock`] |
//! | make an existing model of Burn's layers ternary | [`Ternarise`], [`BitLinear::from_linear`] |
//! | save and load | Burn's records and stores; [`BitLinearConfig::init_packed`] to load packed layers into |
//! | run a whole language model | [`BitNet`], and the crate `bitnet-burn-engine` for files and text |
//!
//! Features choose where layers compute, each with Burn's feature of the same name: `flex` (default), `ndarray`, `wgpu`,
//! `metal`, `cuda`, `rocm`, `remote`; and `fusion`. The guide is `docs/layers.md` in the repository.
//!
//! The ternary matmuls run on kernels that the [kernel manager](manager::KernelManager) checks against an exact
//! reference, measures on this machine and selects. The first layer that is packed or computed sets it up: it starts
//! threads, measures, reads variables that begin with `BITNET_` and keeps what it measured in the user's cache directory.
//! [`configure`](backends::manager::configure) chooses otherwise. Third parties can bring their own kernels as plugins.

mod adapter;
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

pub use adapter::{Adapter, AdapterValues};
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
