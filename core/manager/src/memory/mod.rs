//! Memory: buffers of pages for weights and caches, and activations as kernels read them.

mod activations;
mod pages;

pub use self::activations::{Activations, ActivationsMut, AlignedBytes};
pub use self::pages::{PageArena, PageBuffer};
