//! What several tests need.

use burn::tensor::Device;

/// The host's device that is compiled in.
pub fn device() -> Device {
    #[cfg(feature = "flex")]
    return Device::flex();
    #[cfg(not(feature = "flex"))]
    #[allow(deprecated, reason = "NdArray still has users")]
    return Device::ndarray();
}
