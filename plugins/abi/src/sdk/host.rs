//! The host, as a plugin gets to know it, and a descriptor that is built for this machine.

use std::ffi::{CStr, CString, c_char};
use std::panic::catch_unwind;

use super::read;
use crate::abi::{self, Host, Kernel, Plugin};

/// The host. What it refers to lives as long as the process.
#[derive(Clone, Copy, Debug)]
pub struct HostRef {
    raw: Host,
    /// What its function gets.
    this: *const Host,
}

/// How much a line of the log matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Level {
    /// Something failed.
    Error = abi::LOG_ERROR,
    /// Something that a user should know.
    Warning = abi::LOG_WARNING,
    /// What happens.
    Info = abi::LOG_INFO,
    /// For the plugin's author.
    Debug = abi::LOG_DEBUG,
}

/// Writes lines to the host's log, on any thread, as long as the process lives.
#[derive(Clone, Copy, Debug)]
pub struct Logger(HostRef);

// SAFETY: the host's function may be called on any thread, and its pointers live as long as the process (ABI).
unsafe impl Send for Logger {}
// SAFETY: as above.
unsafe impl Sync for Logger {}

impl Logger {
    /// Writes a line.
    pub fn log(&self, level: Level, text: &str) {
        let Some(log) = self.0.raw.log else { return };
        // A NUL ends the text.
        let text = text.split('\0').next().unwrap_or_default();
        if let Ok(text) = CString::new(text) {
            // SAFETY: the host's function with its own pointer and a string (ABI).
            unsafe { log(self.0.this, level as u32, text.as_ptr()) }
        }
    }
}

impl HostRef {
    /// Major and minor version of the ABI that it speaks.
    pub fn abi(&self) -> (u32, u32) {
        (self.raw.abi_major, self.raw.abi_minor)
    }

    /// Version of bitnet-burn: "0.1.0".
    pub fn version(&self) -> &'static str {
        text(self.raw.version)
    }

    /// What the user configured for plugins. All plugins get the same text.
    pub fn configuration(&self) -> &'static str {
        text(self.raw.configuration)
    }

    /// The value of `name.key` in a [configuration](Self::configuration) of the form `name.key=value;name.other=value`.
    pub fn setting(&self, name: &str, key: &str) -> Option<&'static str> {
        let entries = self.configuration().split([';', '\n']);
        entries.filter_map(|entry| entry.split_once('=')).find_map(|(place, value)| {
            let (plugin, setting) = place.trim().split_once('.')?;
            (plugin == name && setting == key).then(|| value.trim())
        })
    }

    /// The features of this CPU.
    pub fn cpu_features(&self) -> impl Iterator<Item = &'static str> + use<> {
        text(self.raw.cpu_features).split(',')
    }

    /// Its log.
    pub fn logger(&self) -> Logger {
        Logger(*self)
    }
}

/// A string of the host's; empty if it is null or no UTF-8.
fn text(pointer: *const c_char) -> &'static str {
    if pointer.is_null() {
        return "";
    }
    // SAFETY: a string of the host's, which ends with NUL and lives as long as the process (ABI).
    unsafe { CStr::from_ptr(pointer) }.to_str().unwrap_or_default()
}

/// A descriptor of kernels that are not known before the plugin runs. It is never freed, as the ABI asks.
///
/// ```
/// use bitnet_burn_plugin::sdk::*;
/// # struct Plain;
/// # impl TernaryKernel for Plain {
/// #     const NAME: &'static std::ffi::CStr = c"plain";
/// #     fn run(_: &WeightsRef, _: &ActivationsRef, _: &[u8], _: &mut OutputTile) -> KernelResult { Ok(()) }
/// # }
/// fn build(host: HostRef) -> &'static bitnet_burn_plugin::abi::Plugin {
///     host.logger().log(Level::Debug, "for this machine");
///     build_plugin(c"mine", c"0.1.0", vec![kernel::<Plain>()])
/// }
/// # assert_eq!(build_plugin(c"mine", c"0.1.0", vec![kernel::<Plain>()]).kernel_count, 1);
/// ```
pub fn build_plugin(name: &'static CStr, version: &'static CStr, kernels: Vec<Kernel>) -> &'static Plugin {
    let kernels: Vec<&'static Kernel> =
        kernels.into_iter().map(|kernel| &*Box::leak(Box::new(kernel))).collect();
    let kernels: &'static [&'static Kernel] = kernels.leak();
    Box::leak(Box::new(Plugin {
        struct_size: size_of::<Plugin>() as u64,
        abi_major: abi::ABI_MAJOR,
        abi_minor: abi::ABI_MINOR,
        name: name.as_ptr(),
        version: version.as_ptr(),
        kernels: kernels.as_ptr().cast(),
        kernel_count: kernels.len() as u64,
    }))
}

/// What `build` returns for a host; null if it panics. For [`export_plugin!`](crate::export_plugin).
///
/// # Safety
/// `host` is null, or the host's own, filled.
pub unsafe fn plugin_for_host(host: *const Host, build: fn(HostRef) -> &'static Plugin) -> *const Plugin {
    if host.is_null() {
        return std::ptr::null();
    }
    // SAFETY: the caller's promise.
    let host = HostRef { raw: unsafe { read(host) }, this: host };
    catch_unwind(std::panic::AssertUnwindSafe(|| build(host))).map_or(std::ptr::null(), std::ptr::from_ref)
}
