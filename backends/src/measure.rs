//! How long things take on a GPU. A launch returns before it is computed, and waiting for it takes longer than a small
//! kernel. Many launches are timed together, between two waits for the device.

use burn::tensor::Device;

pub use crate::effort::{Effort, KernelTime};

/// All kernels that the process's [manager](crate::manager::manager) has for a ternary multiplication on a GPU. Each is
/// compared with the CPU's first: every output, within 2 ulp, which no two sums have in common (they are integers far
/// below 2^22). A kernel that is wrong is in quarantine from then on.
///
/// # Errors
/// If the device is not one of CubeCL's, or fails.
pub fn matmul(
    device: &Device,
    (m, n, k): (usize, usize, usize),
    effort: &Effort,
) -> Result<Vec<KernelTime>, String> {
    #[cfg(feature = "cube")]
    if let Some(device) = crate::devices::cube(device) {
        return crate::gpu::measure::matmul(&device, (m, n, k), effort);
    }
    let _ = (device, m, n, k, effort);
    Err(NO_GPU.into())
}

/// Seconds that quantising activations [M, K] to int8 takes, one figure a repetition.
///
/// # Errors
/// As [`matmul`].
pub fn quantise(device: &Device, (m, k): (usize, usize), effort: &Effort) -> Result<Vec<f64>, String> {
    #[cfg(feature = "cube")]
    if let Some(device) = crate::devices::cube(device) {
        return crate::gpu::measure::quantise(&device, (m, k), effort);
    }
    let _ = (device, m, k, effort);
    Err(NO_GPU.into())
}

/// 10^9 bytes a second that a GPU reads from a buffer of `bytes` bytes, by CubeCL's probe: a kernel that reads and stores
/// nothing, in the shape of launch that is the fastest there.
///
/// # Errors
/// As [`matmul`].
pub fn read_gb_per_s(device: &Device, bytes: u64) -> Result<f64, String> {
    #[cfg(feature = "cube")]
    if let Some(device) = crate::devices::cube(device) {
        return crate::gpu::measure::read_gb_per_s(&device, bytes);
    }
    let _ = (device, bytes);
    Err(NO_GPU.into())
}

const NO_GPU: &str = "this is no GPU, or this build computes on none";
