//! SIMD on CPUs: kernels for ternary matrix multiplication, as a bitnet-burn kernel plugin, and plain functions for
//! the rest of a network.
//!
//! [`PLUGIN`] is the descriptor of the [`ternary`] kernels: the host links this crate and registers it like any other
//! plugin, or loads the same descriptor from the `cdylib` that `bitnet-burn-cpu-plugin` builds. [`peak`] is the roof
//! above their speed.
//!
//! The functions work on slices, without Burn's types: [`attention`] over a KV cache, the dense layers
//! ([`dense`]), [`delta_net`], [`rope`], [`gated`] activations, [`quantise`] (which is fused with RMSNorm), and what only
//! [`training`] needs. Their caller lends them [`Threads`]. They are written once over the vectors of [`simd`],
//! which has the instruction sets.
//!
//! All of it asks [`bitnet_burn_plugin::features`] for the CPU's features, which respects the process's mask.

pub mod attention;
pub mod delta_net;
pub mod dense;
pub mod gated;
pub mod hadamard;
pub mod peak;
pub mod quantise;
pub mod rope;
pub mod simd;
pub mod ternary;
mod threads;
pub mod training;

pub use ternary::PLUGIN;
pub use threads::Threads;
