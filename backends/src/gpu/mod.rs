//! Kernels for GPUs, on CubeCL's runtimes: the built-in ones, which are CubeCL functions, and those of plugins.
//!
//! A plugin is a library of its own and can't share CubeCL's clients and buffers, so it brings text
//! ([`bitnet_burn_plugin::abi::Gpu`]). Either is compiled and launched here, through the client of the tensors'
//! device. The operation's default body, in Burn's operations, is what a kernel has to be faster than, and what
//! takes over where it fails.
//!
//! The [gate](bitnet_burn_manager::gate) tries kernels in its child process, on the default device. In use, the first result
//! for each exact shape is read back and compared with that of the CPU's kernels, which is returned; after that one
//! call in 251 is compared in a few places. A wrong result quarantines the plugin; a kernel that can't be run leaves its
//! place to the next one.
//!
//! What else a model computes (norms, attention, embedding and output) are functions of
//! [`bitnet_burn_cube`], a launch or two each, with the default bodies for what those do not take.

mod attention;
mod body;
mod choice;
mod contest;
mod dense;
mod device;
mod launch;
pub(crate) mod measure;
mod rows;
#[cfg(all(test, feature = "wgpu"))]
mod tests;

pub(crate) use self::attention::{cached_attention, int8_supported};
pub(crate) use self::body::{bit_linear, bit_linear_backward};
pub use self::choice::GpuMatrix;
pub(crate) use self::choice::choose_and_pack;
pub(crate) use self::dense::{dense_linear, dense_rows};
pub use self::device::open_gpu;
pub(crate) use self::rows::{gated, rms_norm};
