//! Memory: buffers of pages for weights and caches, and activations as kernels read them.

mod activations;
mod pages;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod shared;

pub(crate) use self::activations::AlignedBytes;
pub use self::activations::{Activations, ActivationsMut};
pub use self::pages::{PageArena, PageBuffer};
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) use self::shared::{SharedFile, Space};
