//! BitNet (1.58-bit, ternary-weight) neural networks on [Burn](https://burn.dev).
//!
//! - [`nn`]: layers for your own models, [`nn::BitLinear`] first of all.
//! - [`bitnet`]: the BitNet b1.58 model; [`checkpoint`] opens GGUF files and Hugging Face directories.
//! - [`generate`]: prompts in, tokens out.
//! - [`plan`]: where a model should run, and how fast it will be.
//! - [`export`]: checkpoints from one format to another.
//!
//! The ternary matmuls run on kernels that [`bitnet_burn_manager::manager`] checks against an exact
//! reference, measures on this machine and selects; third parties can bring their own as plugins.

pub mod bench;
pub mod bitnet;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod device_bench;
#[cfg(feature = "default-model")]
pub mod embedded;
mod exact;
pub mod export;
pub mod generate;
pub mod gguf;
pub mod hf;
pub mod nn;
pub mod plan;
pub mod plausible;
pub mod prepack;
pub mod receipt;
pub mod report;
pub mod sampling;
pub mod synth;
pub mod tokenizer;
pub mod train;

pub use bitnet_burn_backends as backends;
pub use bitnet_burn_formats as formats;
pub use bitnet_burn_manager as manager;
