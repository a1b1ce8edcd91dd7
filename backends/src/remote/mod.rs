//! Devices of other machines: a [`Worker`] serves one, and a client computes on it as on its own, over Burn's
//! remote backend (`burn-remote`, WebSocket).
//!
//! Tensors live on the worker. Each of BitNet's operations that inference needs goes over as one custom operation,
//! which the worker's own backend computes with its own kernels (`client` writes them down, `worker` reads
//! them); everything else goes over in Burn's operations, one by one. Operations are not answered, so what goes
//! wrong shows where a tensor is read: [`devices::read`](crate::devices::read).
//!
//! Only a `gate` leads to Burn's server; it asks for a `handshake`. `link` is a client's end of that.
//! Nothing is encrypted, and a client that knows the secret is trusted: see docs/devices.md.

mod client;
mod gate;
mod handshake;
mod link;
// Without a backend of this machine, a worker refuses every device.
#[cfg_attr(
    not(any(feature = "flex", feature = "ndarray", feature = "cube")),
    allow(dead_code, unreachable_code, unused_imports, unused_variables)
)]
mod worker;

use std::time::Duration;

use burn::backend::{DispatchDevice, RemoteDevice};
use burn::tensor::Device;

pub use gate::Limits;
pub use handshake::Secret;
pub(crate) use link::{address, read};
pub use link::{computes_in_host_memory, open, open_within, use_secret};
pub use worker::{Worker, WorkerError};

/// What both sides have to agree on: the operations below and their arguments belong to a version.
fn version() -> String {
    format!("bitnet-burn {}, operations 5", env!("CARGO_PKG_VERSION"))
}

/// The most bytes of a record between a client and a worker.
const RECORD: usize = 1 << 16;

/// How often one side gives the other a sign of life, which waits for it for so long.
fn beat(timeout: Duration) -> Duration {
    (timeout / 5).clamp(Duration::from_millis(10), Duration::from_secs(1))
}

/// The operations' names.
mod name {
    pub const BIT_LINEAR: &str = "bitnet_burn::bit_linear";
    pub const RMS_NORM: &str = "bitnet_burn::rms_norm";
    pub const ROPE: &str = "bitnet_burn::rope";
    pub const CACHE_APPEND: &str = "bitnet_burn::cache_append";
    pub const ATTENTION: &str = "bitnet_burn::attention";
    pub const CACHED_ATTENTION: &str = "bitnet_burn::cached_attention";
    pub const DELTA_NET: &str = "bitnet_burn::delta_net";
    pub const GATED: &str = "bitnet_burn::gated";
    pub const DENSE_LINEAR: &str = "bitnet_burn::dense_linear";
    pub const DENSE_ROWS: &str = "bitnet_burn::dense_rows";
    /// The name of the worker's device, as [text](super::TEXT).
    pub const DEVICE: &str = "bitnet_burn::device";
    /// The first error that an operation of the session left behind, which is gone then, as text.
    pub const ERROR: &str = "bitnet_burn::error";
}

/// Text is a tensor `[TEXT]` of its UTF-8 bytes as floats, which every backend has, and zeros.
const TEXT: usize = 1024;

/// The device on a worker that a device is.
fn remote(device: &Device) -> Option<RemoteDevice> {
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Remote(device) => Some(device.clone()),
        #[allow(unreachable_patterns, reason = "without another backend there is only this")]
        _ => None,
    }
}
