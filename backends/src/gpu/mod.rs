//! Kernels for GPUs, on CubeCL's runtimes: the built-in ones, which are CubeCL functions, and those of plugins.
//!
//! A plugin is a library of its own and can't share CubeCL's clients and buffers, so it brings text
//! ([`bitnet_burn_plugin::abi::Gpu`]). Either is compiled and launched here, through the client of the tensors'
//! device. The operation's default body, in Burn's operations, is what a kernel has to be faster than, and what
//! takes over where it fails.
//!
//! The [gate](bitnet_burn_core::gate) tries kernels in its child process, on the default device. In use, the first result
//! for each exact shape is read back and compared with that of the CPU's kernels, which is returned; after that one
//! call in 251 is compared in a few places. What is wrong, quarantines the plugin; what can't be run, leaves the others
//! of the ranking.

mod body;
mod choice;
#[cfg(feature = "cube")]
mod device;
mod launch;
pub(crate) mod measure;
#[cfg(all(test, feature = "wgpu"))]
mod tests;

pub(crate) use self::body::{bit_linear, bit_linear_backward};
pub use self::choice::GpuMatrix;
pub(crate) use self::choice::prepare;
#[cfg(feature = "cube")]
pub use self::device::open_gpu;
