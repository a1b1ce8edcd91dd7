//! The part of bitnet-burn that knows nothing of Burn: ternary formats and quantisers, the exact
//! reference, the host of kernel plugins, and the manager that checks, measures and selects them.
//!
//! Notation everywhere: M rows of activations (tokens), N output features, K input features.

pub mod cpu;
pub mod files;
pub mod formats;
pub mod gate;
pub mod gpu;
pub mod manager;
pub mod memory;
pub mod plugin;
pub mod pool;
pub mod quant;
pub mod random;
pub mod reference;
pub mod store;

pub use manager::{KernelManager, ManagerConfig, ManagerError};
