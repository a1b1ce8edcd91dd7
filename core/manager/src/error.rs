//! What the manager can't do.

use crate::strict::Strict;

/// What the manager can't do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManagerError {
    /// An environment variable is wrong.
    #[error("{name}={value}: expected {expected}")]
    Config {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// The forced kernel does not exist.
    #[error("no kernel is named `{name}`; there are: {known}")]
    UnknownKernel {
        /// The name.
        name: String,
        /// All kernels.
        known: String,
    },
    /// Strict mode, and no kernel for this.
    #[error(
        "strict mode ({strict}): no kernel can compute the ternary matmul [{m}, {k}] x [{n}, {k}]ᵀ here, and \
         the reference is not allowed. {missing}"
    )]
    NoKernel {
        /// What is strict.
        strict: Strict,
        /// Rows of activations.
        m: usize,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Each kernel, why not, and what would help.
        missing: String,
    },
    /// A kernel failed, and a fallback is forbidden.
    #[error(
        "kernel {kernel} failed at the ternary matmul [{m}, {k}] x [{n}, {k}]ᵀ: {reason}. {forbids} forbids \
         a fallback: remove the kernel's plugin, or force another kernel"
    )]
    NoFallback {
        /// The kernel.
        kernel: String,
        /// Rows of activations.
        m: usize,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Status and message, or what was wrong.
        reason: String,
        /// What forbids it.
        forbids: &'static str,
    },
    /// A kernel wrote where it may only read: what it wrote over is lost.
    #[error(
        "kernel {kernel} wrote into {what} in a ternary matmul with weights [{n}, {k}]. Its plugin is in quarantine. \
         What it read can't be restored: load the model again"
    )]
    Damaged {
        /// The kernel.
        kernel: String,
        /// "its weights", which nothing computes with any more, or "the activations".
        what: &'static str,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
    },
    /// Strict mode, and a plugin was wrong in use after callers had got results of it that nothing compared.
    #[error(
        "strict mode (gated-plugins): kernel {kernel} was wrong ({reason}), and {unchecked} earlier results of its plugin \
         were not compared and may be wrong, too: compute them again. The plugin is in quarantine"
    )]
    Doubtful {
        /// The kernel.
        kernel: String,
        /// What was wrong.
        reason: String,
        /// Matmuls of all kernels of the plugin.
        unchecked: u64,
    },
    /// Operands that do not fit together.
    #[error("ternary matmul: {0}")]
    Operands(String),
    /// A GPU failed, or its buffers can't be read back.
    #[error("the GPU failed: {0}")]
    Device(String),
    /// No memory or no threads.
    #[error("{what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Weights can't be packed.
    #[error("kernel {kernel} can't pack weights [{n}, {k}]: {reason}")]
    Pack {
        /// The kernel.
        kernel: String,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Why.
        reason: String,
    },
    /// Private weights can't be read back.
    #[error("kernel {kernel} can't unpack its weights [{n}, {k}]: {reason}")]
    Unpack {
        /// The kernel.
        kernel: String,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Why.
        reason: String,
    },
}
