//! The host's side of the plugin ABI: loads a library, and believes nothing that its descriptor says
//! before it was checked.

mod describe;
mod descriptor;
mod elf;
mod error;
mod host;
mod kernel;
mod text;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitnet_burn_plugin::abi::{
    ENTRY_SYMBOL, EntryFn, HOST_ENTRY_SYMBOL, HostEntryFn, Kernel as RawKernel, Plugin as RawPlugin,
};
use bitnet_burn_plugin::layouts::PublicLayout;
use serde::{Deserialize, Serialize};

pub(crate) use self::describe::Described;
pub(crate) use self::elf::shared_statics;
pub use self::error::PluginError;
pub(crate) use self::host::log_to;
pub use self::kernel::Kernel;
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) use self::kernel::check_packed_size;
pub(crate) use self::kernel::{KernelFailure, max_workspace};
pub(crate) use self::text::shown;
use crate::contained::Contained;
use crate::float::FloatControl;
use bitnet_burn_formats::files;

/// Where a plugin came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Linked into the program.
    BuiltIn,
    /// Loaded from a file.
    File {
        /// The file.
        path: PathBuf,
        /// SHA-256 of its bytes, in hexadecimal.
        sha256: String,
    },
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::BuiltIn => write!(f, "built in"),
            Self::File { path, .. } => write!(f, "{}", path.display()),
        }
    }
}

/// A plugin whose descriptor was checked. Its library stays loaded for the rest of the process, or is in another one.
#[derive(Debug)]
pub struct Plugin {
    name: String,
    version: String,
    /// ABI that it was built for.
    abi: (u32, u32),
    origin: Origin,
    kernels: Vec<Declared>,
    /// The process that holds its library, if that is not this one.
    contained: Option<Arc<Contained>>,
}

/// A kernel of a checked descriptor.
#[derive(Debug)]
struct Declared {
    name: String,
    layout: Layout,
    features: Vec<String>,
    gpu: Option<Arc<GpuSource>>,
    /// As much of the descriptor as plugin and host both know; zeros behind that.
    raw: RawKernel,
}

/// How a kernel's weights lie.
#[derive(Clone, Debug)]
enum Layout {
    /// Canonical, in place.
    Canonical,
    /// `plugin/name`: a packing of the plugin's own.
    Private(String),
    /// One that every plugin may read, and the host packs.
    Public(&'static PublicLayout),
    /// A public one of a later version.
    Unknown(String),
}

impl Layout {
    fn name(&self) -> Option<&str> {
        match self {
            Self::Canonical => None,
            Self::Private(name) | Self::Unknown(name) => Some(name),
            Self::Public(public) => Some(public.name),
        }
    }
}

/// Where a kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The host's CPU.
    Cpu,
    /// A GPU whose driver takes WGSL text.
    Wgsl,
    /// A GPU that NVRTC compiles CUDA C++ for.
    Cuda,
    /// Any GPU: a function of the host's own CubeCL.
    CubeCl,
    /// Something that a later minor version of the ABI knows.
    Unknown(u32),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Wgsl => f.write_str("wgsl"),
            Self::Cuda => f.write_str("cuda"),
            Self::CubeCl => f.write_str("cubecl"),
            Self::Unknown(number) => write!(f, "target {number}"),
        }
    }
}

/// The text of a kernel for a GPU. [`Gpu`](bitnet_burn_plugin::abi::Gpu) says which buffers it gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuSource {
    /// The text.
    pub text: String,
    /// Name of the entry point.
    pub entry: String,
    /// Threads of a workgroup, by dimension.
    pub workgroup: [u32; 3],
    /// Output features that a workgroup computes.
    pub tile_n: u32,
    /// Rows of activations that a workgroup computes.
    pub tile_m: u32,
}

impl GpuSource {
    /// Workgroups of an [m, n] output, by dimension.
    pub fn grid(&self, m: usize, n: usize) -> [usize; 3] {
        [n.div_ceil(self.tile_n as usize), m.div_ceil(self.tile_m as usize), 1]
    }
}

impl Plugin {
    /// A plugin that is linked into the program.
    ///
    /// # Errors
    /// If the descriptor breaks the ABI.
    pub fn built_in(descriptor: &'static RawPlugin) -> Result<Self, PluginError> {
        // SAFETY: a static reference; the pointers in it were made by `plugin!` or are the linking
        // program's own responsibility, exactly as if it called them itself.
        unsafe { Self::from_descriptor(descriptor, Origin::BuiltIn) }
    }

    /// Loads `library`, an absolute path (which keeps the system's library search out of it), a copy of the
    /// file `origin`, and checks its descriptor. This runs the library's code: only the gate's child does it
    /// with one that the gate has not passed. A plugin that asks gets the `configuration`.
    pub(crate) fn load_as(library: &Path, origin: &Path, configuration: &str) -> Result<Self, PluginError> {
        let path = || origin.to_owned();
        let bytes = std::fs::read(library).map_err(|source| PluginError::Read { path: path(), source })?;
        let sha256 = files::sha256(&bytes);
        drop(bytes);
        let loaded = FloatControl::kept_by(|| {
            let library = open(library)
                .map_err(|error| PluginError::Load { path: path(), reason: shown(&loaders_words(&error)) })?;
            // SAFETY: the symbols have these types in every plugin (ABI).
            let entries = unsafe {
                (
                    library.get::<HostEntryFn>(HOST_ENTRY_SYMBOL.as_bytes()).map(|symbol| *symbol),
                    library.get::<EntryFn>(ENTRY_SYMBOL.as_bytes()).map(|symbol| *symbol),
                )
            };
            let descriptor = match entries {
                // SAFETY: it takes a filled host that lives as long as the process, and returns the descriptor (ABI).
                (Ok(entry), _) => unsafe { entry(host::describe(origin, configuration)) },
                // SAFETY: it takes nothing, and returns the descriptor (ABI).
                (Err(_), Ok(entry)) => unsafe { entry() },
                (Err(_), Err(_)) => return Err(PluginError::NoEntry { path: path() }),
            };
            // The descriptor lives in the library, and other libraries may have been told about it.
            std::mem::forget(library);
            Ok(descriptor)
        });
        let descriptor = loaded.map_err(|reason| PluginError::Loading { path: path(), reason })??;
        // SAFETY: what the library returned; `from_descriptor` reads it step by step.
        unsafe { Self::from_descriptor(descriptor, Origin::File { path: path(), sha256 }) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its version, as its author counts.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// ABI that it was built for, as `major.minor`.
    pub fn abi(&self) -> String {
        format!("{}.{}", self.abi.0, self.abi.1)
    }

    /// Where it came from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Identifies exactly this build in caches: name, version, and the hash of a file.
    pub fn identity(&self) -> String {
        match &self.origin {
            Origin::BuiltIn => format!("{}@{}", self.name, self.version),
            Origin::File { sha256, .. } => format!("{}@{}#{}", self.name, self.version, &sha256[..16]),
        }
    }

    pub(crate) fn kernels(self: &Arc<Self>) -> Vec<Kernel> {
        self.kernels
            .iter()
            .enumerate()
            .map(|(number, declared)| Kernel::new(self, number, declared))
            .collect()
    }
}

/// Loads a library, and binds all functions that it needs now: one that is missing must be an error here, and not end the
/// process when it is called.
fn open(library: &Path) -> Result<libloading::Library, libloading::Error> {
    #[cfg(unix)]
    {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

        // SAFETY: loading runs foreign code; the caller decided to (`Plugin::load_as`).
        unsafe { Library::open(Some(library), RTLD_NOW | RTLD_LOCAL) }.map(Into::into)
    }
    // Windows binds when it loads.
    #[cfg(not(unix))]
    // SAFETY: as above.
    unsafe {
        libloading::Library::new(library)
    }
}

/// What the system's loader said: the error of `libloading` has it in its source.
fn loaders_words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}
