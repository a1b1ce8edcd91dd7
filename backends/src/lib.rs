//! BitNet's operations as an extension of Burn's backends.
//!
//! [`TernaryBackend`] is a backend-extension trait. Each of its operations has a default body in
//! plain Burn operations, which is its specification and works on every backend; Flex and NdArray,
//! whose tensors lie in host memory, have fast bodies that run the kernels of
//! [`manager`](manager::manager) without copying weights; GPUs have CubeCL kernels, and `bit_linear` runs those of
//! plugins that are GPU source, where they are faster. The functions in [`ops`] are the same
//! operations over Burn's `Tensor`.

// Burn deprecates NdArray in favour of Flex, and still supports it; so do we, also in what macros generate.
#![cfg_attr(feature = "ndarray", allow(deprecated))]

#[cfg(all(feature = "fusion", feature = "remote"))]
compile_error!(
    "the features fusion and remote exclude each other: with fusion, Burn's tensors on workers are others"
);

// Packed codes and raw weights are files' little-endian bytes, seen as u32 words.
const _: () = assert!(cfg!(target_endian = "little"), "bitnet-burn needs a little-endian machine");

mod default;
pub mod devices;
pub(crate) mod effort;
// Without a backend, Burn's macro makes operations that don't read their arguments.
#[cfg_attr(
    not(any(feature = "flex", feature = "ndarray", feature = "cube", feature = "remote")),
    allow(unused_variables)
)]
mod extension;
#[cfg(feature = "cube")]
pub mod gpu;
#[cfg(any(feature = "flex", feature = "ndarray"))]
mod host;
pub mod manager;
pub mod measure;
pub mod ops;
#[cfg(feature = "remote")]
pub mod remote;

pub use bitnet_burn_cpu::peak;

pub use extension::{
    AttentionArgs, BitLinearArgs, CacheTensor, CacheType, CachedAttention, DeltaNetArgs, DeltaNetOutput,
    DeltaNetShape, DeltaNetTensors, DeltaNetWeights, DenseArgs, GatedActivation, HostKernels, InputNorm,
    Matrix, MatrixKernels, NoInt8, SelfAttentionArgs, TernaryBackend, TernaryWeight, WeightGroup,
};
