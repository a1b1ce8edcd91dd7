//! Plugins that compute in a process of their own, which is [confined](crate::sandbox) before it loads the library.
//!
//! The process is the gate's helper. It shares two files in memory with this one: one that it may only read, with the weights that
//! were packed for it and with the activations of the call; and one that both write, with the call and the outputs. A call is
//! written there, and a number says whose turn it is. Both sides watch the number for a while, and then sleep until it changes.
//!
//! Nothing that the process writes is believed: its description is [checked](crate::plugin::Plugin::from_descriptor) as a
//! library's is, its results are compared as those of any plugin, and sizes and places are this process's own. If it ends, or
//! does not answer in time, that is a fault of the kernel.
#![cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "nothing is confined elsewhere"))]

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod call;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod child;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod host;
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod nowhere;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod process;

use std::path::Path;
use std::time::Duration;

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(crate) use self::nowhere::{Contained, hold};
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) use self::{child::hold, host::Contained};

/// What is to be held in a process, and by what.
pub(crate) struct Held<'a> {
    /// The program that calls [`gate::child`](crate::gate::child).
    pub helper: &'a Path,
    /// The file that is loaded.
    pub library: &'a Path,
    /// The path that messages name.
    pub origin: &'a Path,
    /// What the user configured for plugins.
    pub configuration: &'a str,
    /// Threads that compute.
    pub threads: usize,
    /// Whether each stays on a core of its own.
    pub pin: bool,
    /// How long a call may take, beside the time for its size.
    pub patience: Duration,
}

/// Matrices of one call.
pub(crate) const MAX_PARTS: usize = 8;
