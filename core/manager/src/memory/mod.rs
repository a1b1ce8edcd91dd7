//! Memory: buffers of pages for weights and caches, and activations as kernels read them.

mod activations;
mod pages;

pub(crate) use self::activations::AlignedBytes;
pub use self::activations::{Activations, ActivationsMut};
pub use self::pages::{PageArena, PageBuffer};
