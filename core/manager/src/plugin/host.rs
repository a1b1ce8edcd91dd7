//! The host, as plugins get to know it: its version, the user's configuration for them, and a log.

use std::ffi::{CStr, CString, c_char};
use std::path::Path;
use std::sync::OnceLock;

use bitnet_burn_plugin::abi::{ABI_MAJOR, ABI_MINOR, Host, LOG_DEBUG, LOG_ERROR, LOG_INFO, LOG_WARNING};

use super::shown;
use crate::cpu;

/// Bytes of a line in the log at most, without its end.
const MAX_LINE: usize = 4095;

/// A host that knows which plugin it was made for.
#[repr(C)]
struct Described {
    /// First: the plugin gives back what it got.
    host: Host,
    plugin: String,
}

/// How much a line of a plugin's matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogLevel {
    Error,
    Warning,
    Info,
    Debug,
}

impl std::fmt::Display for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
            Self::Debug => "debug",
        })
    }
}

type Sink = Box<dyn Fn(LogLevel, &str) + Send + Sync>;

/// Where lines go instead of this process's log.
static SINK: OnceLock<Sink> = OnceLock::new();

/// Sends the lines of all plugins of this process to `sink`, from the first call on.
pub(crate) fn log_to(sink: impl Fn(LogLevel, &str) + Send + Sync + 'static) {
    // The first one stays.
    let _ = SINK.set(Box::new(sink));
}

/// A host for one plugin. It stays as long as the process, as the ABI promises.
pub(super) fn describe(plugin: &Path, configuration: &str) -> *const Host {
    let text = |text: &str| {
        let text = text.split('\0').next().unwrap_or_default();
        CString::new(text).unwrap_or_default().into_raw().cast_const()
    };
    let host = Host {
        struct_size: size_of::<Host>() as u64,
        abi_major: ABI_MAJOR,
        abi_minor: ABI_MINOR,
        version: text(env!("CARGO_PKG_VERSION")),
        configuration: text(configuration),
        cpu_features: text(&cpu::features().join(",")),
        log: Some(log),
    };
    let described: &'static Described =
        Box::leak(Box::new(Described { host, plugin: plugin.display().to_string() }));
    std::ptr::from_ref(described).cast()
}

unsafe extern "C" fn log(host: *const Host, level: u32, text: *const c_char) {
    if host.is_null() || text.is_null() {
        return;
    }
    // SAFETY: the plugin gives back what `describe` made, and a string that ends with NUL (ABI).
    let (plugin, text) = unsafe { (&(*host.cast::<Described>()).plugin, CStr::from_ptr(text)) };
    let bytes = text.to_bytes();
    let text = shown(&String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_LINE)]));
    let level = match level {
        LOG_ERROR => LogLevel::Error,
        LOG_WARNING => LogLevel::Warning,
        LOG_INFO => LogLevel::Info,
        LOG_DEBUG => LogLevel::Debug,
        // Of a later version.
        _ => LogLevel::Debug,
    };
    match (SINK.get(), level) {
        (Some(sink), _) => sink(level, &text),
        (None, LogLevel::Error) => tracing::error!(plugin, "{text}"),
        (None, LogLevel::Warning) => tracing::warn!(plugin, "{text}"),
        (None, LogLevel::Info) => tracing::info!(plugin, "{text}"),
        (None, LogLevel::Debug) => tracing::debug!(plugin, "{text}"),
    }
}
