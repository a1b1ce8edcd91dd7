//! The kernel manager of bitnet-burn. It knows nothing of Burn: activations and weights in, floats out.
//!
//! It loads plugins, checks their kernels against the exact reference, measures them on this machine, selects the
//! fastest for each shape, and falls back where one fails.
//!
//! Notation everywhere: M rows of activations (tokens), N output features, K input features.

mod contained;
pub mod cpu;
mod error;
mod float;
pub mod gate;
pub mod gpu;
mod manager;
pub mod memory;
pub mod plugin;
pub mod pool;
mod process;
pub mod profile;
mod sandbox;
pub mod store;
mod strict;
mod temporary;
mod variables;

pub use manager::*;
pub use process::{expect_exit, guard_process, take_stdout};
pub use strict::Strict;
