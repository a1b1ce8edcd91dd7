//! The host's side of the plugin ABI: loads a library, and believes nothing that its descriptor says
//! before it was checked.

use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bitnet_burn_plugin::abi::{
    self, ABI_MAJOR, ABI_MINOR, ENTRY_SYMBOL, EntryFn, Gpu as RawGpu, KERNEL_SIZE_1_0, Kernel as RawKernel,
    MAX_WEIGHT_ALIGNMENT, Message, OPERATION_TERNARY_MATMUL, Plugin as RawPlugin, STATUS_OK, Signature,
    Status, TARGET_CPU, TARGET_CUBECL, TARGET_CUDA, TARGET_WGSL,
};

use crate::gate::{GateError, Refusal, Stage};
use bitnet_burn_formats::files;

/// Why a plugin was refused.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// The file can't be read.
    #[error("plugin {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no library that this system can load.
    #[error("plugin {}: not a loadable library: {source}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        source: libloading::Error,
    },
    /// The library does not export the entry point.
    #[error(
        "plugin {}: it does not export `{ENTRY_SYMBOL}`, so it is no bitnet-burn plugin \
         (Rust: `export_plugin!`; C: see bitnet_plugin.h)", path.display()
    )]
    NoEntry {
        /// The file.
        path: PathBuf,
    },
    /// Built for another major version of the ABI.
    #[error(
        "plugin {origin}: built for ABI {major}.{minor}, and this host speaks ABI \
         {ABI_MAJOR}.{ABI_MINOR}; rebuild it against bitnet-burn-plugin {ABI_MAJOR}"
    )]
    Version {
        /// Where it came from.
        origin: String,
        /// Its major version.
        major: u32,
        /// Its minor version.
        minor: u32,
    },
    /// The descriptor breaks the ABI.
    #[error("plugin {origin}: its descriptor is invalid: {reason}")]
    Descriptor {
        /// Where it came from.
        origin: String,
        /// What is wrong.
        reason: String,
    },
    /// Another plugin of the same name is there already.
    #[error(
        "plugin {origin}: version {version} of a plugin named `{name}`, and version {other_version} of \
         `{name}` is in use already ({other}); the first one stays, so name the one that you want first, or \
         give it a name of its own"
    )]
    Duplicate {
        /// Where it came from.
        origin: String,
        /// The name.
        name: String,
        /// Its version.
        version: String,
        /// Where the other one came from.
        other: String,
        /// The other one's version.
        other_version: String,
    },
    /// Plugins from files are switched off.
    #[error("plugin {}: plugins are switched off (BITNET_PLUGINS=off)", path.display())]
    Off {
        /// The file.
        path: PathBuf,
    },
    /// The host is linked statically. A library would bring a second C library, in which threads and panics crash.
    #[error(
        "plugin {}: this program is linked statically and loads no plugins; build it without \
         `-C target-feature=+crt-static`", path.display()
    )]
    StaticHost {
        /// The file.
        path: PathBuf,
    },
    /// Others could have put the file there.
    #[error("plugin {}: {reason}", path.display())]
    Policy {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Pins are in force, and the file is not among them.
    #[error(
        "plugin {}: its SHA-256 {sha256} is not in {}; `bitnet plugins trust` adds it", path.display(),
        pins.display()
    )]
    NotPinned {
        /// The file.
        path: PathBuf,
        /// Its hash.
        sha256: String,
        /// The file of pins.
        pins: PathBuf,
    },
    /// The pins can't be read, so nothing is loaded.
    #[error("the pins of plugins, {}: {reason}", path.display())]
    Pins {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no place for the copy that is checked and run.
    #[error("plugin {}: a copy of it can't be kept: {source}", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It was never checked on this machine, and nobody is there to do it.
    #[error(
        "plugin {}: the gate has not tried it on this machine, and no helper program is configured that \
         could; `bitnet plugins verify` does it", path.display()
    )]
    Unverified {
        /// The file.
        path: PathBuf,
    },
    /// The gate could not be run.
    #[error("plugin {}: {source}", path.display())]
    Gate {
        /// The file.
        path: PathBuf,
        /// Why.
        source: GateError,
    },
    /// The gate found it wrong.
    #[error("plugin {}: {}: {refusal}", path.display(), match refusal.stage {
        Stage::Before => "the gate refuses it",
        Stage::FirstUse | Stage::InUse => "quarantined, since it was wrong in use",
    })]
    Refused {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        refusal: Refusal,
    },
}

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

/// A plugin whose descriptor was checked. Its library stays loaded for the rest of the process.
#[derive(Debug)]
pub struct Plugin {
    name: String,
    version: String,
    /// ABI that it was built for.
    abi: (u32, u32),
    origin: Origin,
    kernels: Vec<Declared>,
}

/// A kernel of a checked descriptor.
#[derive(Debug)]
struct Declared {
    name: String,
    layout: Option<String>,
    features: Vec<String>,
    gpu: Option<Arc<GpuSource>>,
    /// As much of the descriptor as plugin and host both know; zeros behind that.
    raw: RawKernel,
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

/// The text of a kernel for a GPU. [`abi::Gpu`] says which buffers it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// with one that the gate has not passed.
    pub(crate) fn load_as(library: &Path, origin: &Path) -> Result<Self, PluginError> {
        let path = || origin.to_owned();
        let bytes = std::fs::read(library).map_err(|source| PluginError::Read { path: path(), source })?;
        let sha256 = files::sha256(&bytes);
        drop(bytes);
        // SAFETY: loading runs foreign code; the caller decided to (documented above).
        let library = unsafe { libloading::Library::new(library) }
            .map_err(|source| PluginError::Load { path: path(), source })?;
        // SAFETY: the symbol has this type in every plugin (ABI).
        let entry = unsafe { library.get::<EntryFn>(ENTRY_SYMBOL.as_bytes()) }
            .map(|symbol| *symbol)
            .map_err(|_| PluginError::NoEntry { path: path() })?;
        // SAFETY: the entry point takes nothing and returns the descriptor (ABI).
        let descriptor = unsafe { entry() };
        // The descriptor lives in the library, and other libraries may have been told about it.
        std::mem::forget(library);
        // SAFETY: what the library returned; `from_descriptor` reads it step by step.
        unsafe { Self::from_descriptor(descriptor, Origin::File { path: path(), sha256 }) }
    }

    /// Checks a descriptor.
    ///
    /// # Safety
    /// `descriptor` is null or points to the beginning of a descriptor of any version, which lives as
    /// long as the process, and whose pointers are null or valid.
    pub unsafe fn from_descriptor(descriptor: *const RawPlugin, origin: Origin) -> Result<Self, PluginError> {
        let invalid = |reason: String| PluginError::Descriptor { origin: origin.to_string(), reason };
        if descriptor.is_null() || !descriptor.is_aligned() {
            return Err(invalid("the entry point returned no descriptor".into()));
        }
        // SAFETY: these three fields keep their places in every version.
        let (size, major, minor) = unsafe {
            (
                (&raw const (*descriptor).struct_size).read(),
                (&raw const (*descriptor).abi_major).read(),
                (&raw const (*descriptor).abi_minor).read(),
            )
        };
        if major != ABI_MAJOR {
            return Err(PluginError::Version { origin: origin.to_string(), major, minor });
        }
        if size < size_of::<RawPlugin>() as u64 || size > 1 << 16 {
            return Err(invalid(format!(
                "struct_size of the plugin is {size}, ABI {ABI_MAJOR}.0 has {}",
                size_of::<RawPlugin>()
            )));
        }
        // SAFETY: same major version, and at least as long as version 1.0.
        let raw = unsafe { &*descriptor };
        let name = name(raw.name, "the plugin's name").map_err(&invalid)?;
        let version = text(raw.version, 63)
            .filter(|v| !v.is_empty())
            .ok_or_else(|| invalid("the plugin has no version".into()))?;
        if raw.kernels.is_null() || !raw.kernels.is_aligned() || !(1..=256).contains(&raw.kernel_count) {
            return Err(invalid(format!("it claims {} kernels", raw.kernel_count)));
        }
        // SAFETY: the caller's promise: a non-null pointer is valid, here to `kernel_count` pointers.
        let pointers = unsafe { std::slice::from_raw_parts(raw.kernels, raw.kernel_count as usize) };
        let mut kernels: Vec<Declared> = Vec::with_capacity(pointers.len());
        for (i, &pointer) in pointers.iter().enumerate() {
            if pointer.is_null() || !pointer.is_aligned() {
                return Err(invalid(format!("kernel {i} is null")));
            }
            // SAFETY: a non-null pointer is valid (the caller's promise).
            let kernel = unsafe { check_kernel(i, pointer) }.map_err(&invalid)?;
            if kernels.iter().any(|k| k.name == kernel.name) {
                return Err(invalid(format!("two kernels are named `{}`", kernel.name)));
            }
            kernels.push(kernel);
        }
        Ok(Self { name, version, abi: (major, minor), origin, kernels })
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
            .map(|declared| Kernel {
                id: format!("{}/{}", self.name, declared.name),
                layout: declared.layout.as_ref().map(|layout| format!("{}/{layout}", self.name)),
                features: declared.features.clone(),
                gpu: declared.gpu.clone(),
                plugin: self.clone(),
                raw: declared.raw,
                sizes: Mutex::default(),
            })
            .collect()
    }
}

/// The fields that a struct of `size` bytes has, and zeros for the others.
///
/// # Safety
/// `pointer` is valid for reading `size` bytes, and all zeros are a valid `T`.
unsafe fn known_fields<T: Copy>(pointer: *const T, size: u64) -> T {
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    let count = size_of::<T>().min(size as usize);
    // SAFETY: `count` bytes are readable (the caller's promise) and fit; what is not copied stays zero, which
    // is valid.
    unsafe {
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), count);
        value.assume_init()
    }
}

/// # Safety
/// `pointer` points to the beginning of a kernel of any minor version, whose pointers are null or valid.
unsafe fn check_kernel(i: usize, pointer: *const RawKernel) -> Result<Declared, String> {
    // SAFETY: the first field of every version.
    let size = unsafe { (&raw const (*pointer).struct_size).read() };
    if size < KERNEL_SIZE_1_0 as u64 || size > 1 << 16 {
        return Err(format!("struct_size of kernel {i} is {size}, ABI {ABI_MAJOR}.0 has {KERNEL_SIZE_1_0}"));
    }
    // Half of a later version's fields are none.
    let size = if size < size_of::<RawKernel>() as u64 { KERNEL_SIZE_1_0 as u64 } else { size };
    // SAFETY: it says that it has so many bytes; null pointers, absent functions and zeros are valid.
    let mut kernel = unsafe { known_fields(pointer, size) };
    let name = name(kernel.name, &format!("the name of kernel {i}"))?;
    let layout = match kernel.layout.is_null() {
        true => None,
        false => Some(self::name(kernel.layout, &format!("the layout of kernel `{name}`"))?),
    };
    if layout.is_some() && (kernel.packed_size.is_none() || kernel.pack.is_none() || kernel.unpack.is_none())
    {
        return Err(format!("kernel `{name}` has a private layout but not packed_size, pack and unpack"));
    }
    if layout.is_none() {
        // Canonical weights have their own size.
        kernel.packed_size = None;
    }
    let features = match kernel.features.is_null() {
        true => String::new(),
        false => text(kernel.features, 255)
            .ok_or_else(|| format!("the features of kernel `{name}` are no text of at most 255 bytes"))?,
    };
    if kernel.operation != OPERATION_TERNARY_MATMUL {
        return Err(format!(
            "kernel `{name}` has operation {}; ABI {ABI_MAJOR}.{ABI_MINOR} knows operation \
             {OPERATION_TERNARY_MATMUL} (ternary matmul)",
            kernel.operation
        ));
    }
    if !kernel.weight_alignment.is_power_of_two() || kernel.weight_alignment > MAX_WEIGHT_ALIGNMENT {
        return Err(format!(
            "kernel `{name}` asks for weights aligned to {}; it must be a power of two up to \
             {MAX_WEIGHT_ALIGNMENT}",
            kernel.weight_alignment
        ));
    }
    if !(1..=4096).contains(&kernel.row_granule) {
        return Err(format!(
            "kernel `{name}` has a row granule of {}; 1 to 4096 are possible",
            kernel.row_granule
        ));
    }
    if kernel.supports.is_none() || (kernel.target == TARGET_CPU && kernel.run.is_none()) {
        return Err(format!("kernel `{name}` lacks `supports` or `run`"));
    }
    if kernel.workspace_size.is_none() && kernel.prepare.is_some() {
        return Err(format!("kernel `{name}` prepares a workspace but has no workspace_size"));
    }
    let gpu = match kernel.target {
        // SAFETY: null, or valid (the caller's promise).
        TARGET_WGSL | TARGET_CUDA | TARGET_CUBECL => Some(Arc::new(unsafe { check_gpu(&name, kernel.gpu) }?)),
        _ => None,
    };
    let features = features.split(',').map(|f| f.trim().to_owned()).filter(|f| !f.is_empty()).collect();
    Ok(Declared { name, layout, features, gpu, raw: kernel })
}

/// Bytes that the text of a GPU kernel may have.
const MAX_SOURCE: usize = 1 << 20;
/// Threads that a workgroup may have on any device that there is.
const MAX_WORKGROUP: u32 = 1024;

/// # Safety
/// `pointer` is null, or points to the beginning of the GPU part of a kernel of any minor version, whose
/// pointers are null or valid.
unsafe fn check_gpu(kernel: &str, pointer: *const RawGpu) -> Result<GpuSource, String> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(format!("kernel `{kernel}` is for a GPU, and its `gpu` is null"));
    }
    // SAFETY: the first field of every version.
    let size = unsafe { (&raw const (*pointer).struct_size).read() };
    if size < size_of::<RawGpu>() as u64 || size > 1 << 16 {
        return Err(format!(
            "struct_size of the GPU part of kernel `{kernel}` is {size}, ABI {ABI_MAJOR}.1 has {}",
            size_of::<RawGpu>()
        ));
    }
    // SAFETY: it says that it has so many bytes; null pointers and zeros are valid.
    let gpu = unsafe { known_fields(pointer, size) };
    let source = text(gpu.source, MAX_SOURCE).filter(|text| !text.is_empty());
    let source = source.ok_or_else(|| {
        format!("the source of kernel `{kernel}` is no UTF-8 text of 1 to {MAX_SOURCE} bytes")
    })?;
    let entry = text(gpu.entry, 127).filter(|name| {
        name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !name.starts_with(|c: char| c.is_ascii_digit())
    });
    let entry = entry.filter(|name| !name.is_empty()).ok_or_else(|| {
        format!("the entry point of kernel `{kernel}` is no identifier of 1 to 127 characters")
    })?;
    let [x, y, z] = gpu.workgroup;
    let threads = x.checked_mul(y).and_then(|xy| xy.checked_mul(z));
    if !threads.is_some_and(|threads| (1..=MAX_WORKGROUP).contains(&threads)) {
        return Err(format!(
            "kernel `{kernel}` has workgroups of {x} x {y} x {z} threads; 1 to {MAX_WORKGROUP} are possible"
        ));
    }
    if gpu.tile_n == 0 || gpu.tile_m == 0 {
        return Err(format!(
            "a workgroup of kernel `{kernel}` computes {} x {} outputs; it must be at least 1 x 1",
            gpu.tile_n, gpu.tile_m
        ));
    }
    Ok(GpuSource { text: source, entry, workgroup: gpu.workgroup, tile_n: gpu.tile_n, tile_m: gpu.tile_m })
}

/// Text of at most `limit` bytes behind a pointer that is null or NUL-terminated.
fn text(pointer: *const c_char, limit: usize) -> Option<String> {
    if pointer.is_null() {
        return None;
    }
    let mut length = 0;
    // SAFETY: a descriptor's string is NUL-terminated (ABI); no byte behind the NUL is read, and at
    // most `limit` + 1 bytes are.
    while unsafe { *pointer.add(length) } != 0 {
        length += 1;
        if length > limit {
            return None;
        }
    }
    // SAFETY: the loop above found `length` bytes before the NUL.
    let bytes = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), length) };
    std::str::from_utf8(bytes).ok().map(str::to_owned)
}

fn name(pointer: *const c_char, what: &str) -> Result<String, String> {
    text(pointer, 63)
        .filter(|name| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        })
        .ok_or_else(|| format!("{what} is not 1 to 63 of A-Z, a-z, 0-9, '.', '_', '-'"))
}

/// Bytes of workspace that a kernel may ask for, for `m` rows of activations `stride` bytes apart.
pub(crate) fn max_workspace(m: usize, stride: usize) -> usize {
    64 * (m + 64) * (stride + 4096)
}

/// A kernel of a checked plugin, callable without `unsafe`.
#[derive(Debug)]
pub struct Kernel {
    id: String,
    layout: Option<String>,
    features: Vec<String>,
    gpu: Option<Arc<GpuSource>>,
    plugin: Arc<Plugin>,
    raw: RawKernel,
    /// What it has said of the size of its packing, by [n, k].
    sizes: Mutex<HashMap<(usize, usize), Option<usize>>>,
}

/// A status other than OK, with the kernel's message; or OK, where the host found the result wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFailure {
    /// `STATUS_*`.
    pub status: Status,
    /// The kernel's words, or the host's.
    pub message: String,
}

impl std::error::Error for KernelFailure {}

impl std::fmt::Display for KernelFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { status, message } = self;
        match (*status, message.as_str()) {
            (STATUS_OK, message) => write!(f, "wrong result: {message}"),
            (status, "") => write!(f, "status {status} ({})", status_name(status)),
            (status, message) => write!(f, "status {status} ({}): {message}", status_name(status)),
        }
    }
}

fn status_name(status: Status) -> &'static str {
    match status {
        abi::STATUS_UNSUPPORTED => "unsupported",
        abi::STATUS_INVALID_ARGUMENT => "invalid argument",
        abi::STATUS_FAILED => "failed",
        abi::STATUS_PANICKED => "panicked",
        _ => "unknown",
    }
}

/// Calls `f` with a message buffer and turns its status into a result.
fn call(f: impl FnOnce(*const Message) -> Status) -> Result<(), KernelFailure> {
    let mut buffer = [0 as c_char; 256];
    let message = Message {
        struct_size: size_of::<Message>() as u64,
        text: buffer.as_mut_ptr(),
        capacity: buffer.len() as u64,
    };
    let status = f(&raw const message);
    if status == STATUS_OK {
        return Ok(());
    }
    buffer[buffer.len() - 1] = 0;
    // SAFETY: the last byte is NUL.
    let message = unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned();
    Err(KernelFailure { status, message })
}

impl Kernel {
    /// `plugin/kernel`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it runs.
    pub fn target(&self) -> Target {
        match self.raw.target {
            TARGET_CPU => Target::Cpu,
            TARGET_WGSL => Target::Wgsl,
            TARGET_CUDA => Target::Cuda,
            TARGET_CUBECL => Target::CubeCl,
            other => Target::Unknown(other),
        }
    }

    /// Its text, if it is for a GPU.
    pub fn gpu(&self) -> Option<&GpuSource> {
        self.gpu.as_deref()
    }

    /// `plugin/layout` of its private packing; `None` for the canonical layout.
    pub fn layout(&self) -> Option<&str> {
        self.layout.as_deref()
    }

    /// Features that it needs, of the CPU or of the GPU.
    pub fn features(&self) -> &[String] {
        &self.features
    }

    /// The plugin that brought it.
    pub fn plugin(&self) -> &Arc<Plugin> {
        &self.plugin
    }

    /// Ranges of output features begin at multiples of this.
    pub fn row_granule(&self) -> usize {
        self.raw.row_granule as usize
    }

    /// Alignment of its weights in bytes.
    pub fn weight_alignment(&self) -> usize {
        match self.layout {
            Some(_) => self.raw.weight_alignment as usize,
            None => abi::CANONICAL_ALIGNMENT,
        }
    }

    /// Whether it claims this.
    pub fn supports(&self, signature: &Signature) -> bool {
        let supports = self.raw.supports.expect("checked");
        // SAFETY: a filled signature (ABI).
        unsafe { supports(signature) == 1 }
    }

    /// Bytes of its packing of an [n, k] matrix, of the canonical layout if it has none of its own;
    /// `None` if it can't pack it.
    pub fn weight_bytes(&self, n: usize, k: usize) -> Option<usize> {
        let Some(packed_size) = self.raw.packed_size else {
            return bitnet_burn_plugin::canonical::matrix_bytes(n, k);
        };
        // Asked once: buffers are sized, filled and read by the same answer.
        let mut sizes = self.sizes.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: takes two numbers (ABI).
        *sizes.entry((n, k)).or_insert_with(|| match unsafe { packed_size(n as u64, k as u64) } {
            0 => None,
            // More than 16 bits a weight, plus padding, is no packing but a mistake.
            size if size > (n as u64 + 4096) * (k as u64 + 4096) * 2 => None,
            size => usize::try_from(size).ok(),
        })
    }

    /// Packs rows `rows` of a canonical matrix. Concurrent calls take disjoint ranges that begin at
    /// multiples of [`row_granule`](Self::row_granule).
    ///
    /// # Safety
    /// `packed` has [`weight_bytes`](Self::weight_bytes) writable bytes, aligned as the kernel asks,
    /// and no other access overlaps these rows' part of them.
    pub(crate) unsafe fn pack(
        &self,
        canonical: &abi::Weights,
        packed: *mut u8,
        rows: std::ops::Range<usize>,
    ) -> Result<(), KernelFailure> {
        let pack = self.raw.pack.expect("checked with the layout");
        // SAFETY: the caller's promise, and filled weights.
        call(|message| unsafe { pack(canonical, packed, rows.start as u64, rows.end as u64, message) })
    }

    /// Unpacks rows `rows` to the canonical layout. Concurrent calls take disjoint ranges that begin at
    /// multiples of [`row_granule`](Self::row_granule).
    ///
    /// # Safety
    /// `packed` is filled, `canonical` has room for the whole matrix, and no other access overlaps these
    /// rows' part of it.
    pub(crate) unsafe fn unpack(
        &self,
        packed: &abi::Weights,
        canonical: *mut u8,
        rows: std::ops::Range<usize>,
    ) -> Result<(), KernelFailure> {
        let unpack = self.raw.unpack.expect("checked with the layout");
        // SAFETY: the caller's promise.
        call(|message| unsafe { unpack(packed, canonical, rows.start as u64, rows.end as u64, message) })
    }

    pub(crate) fn workspace_size(&self, signature: &Signature) -> usize {
        // SAFETY: a filled signature (ABI).
        self.raw.workspace_size.map_or(0, |size| unsafe { size(signature) } as usize)
    }

    /// # Safety
    /// Filled activations, and a workspace of [`workspace_size`](Self::workspace_size) bytes.
    pub(crate) unsafe fn prepare(
        &self,
        x: &abi::Activations,
        workspace: *mut u8,
    ) -> Result<(), KernelFailure> {
        match self.raw.prepare {
            None => Ok(()),
            // SAFETY: the caller's promise.
            Some(prepare) => call(|message| unsafe { prepare(x, workspace, message) }),
        }
    }

    /// # Safety
    /// Filled structs whose buffers are as the ABI says, a workspace that `prepare` filled, and a
    /// tile of the output that nobody else accesses.
    pub(crate) unsafe fn run(
        &self,
        weights: &abi::Weights,
        x: &abi::Activations,
        workspace: *const u8,
        y: &abi::Output,
        tile: &abi::Tile,
    ) -> Result<(), KernelFailure> {
        let run = self.raw.run.expect("checked: it is for the CPU");
        // SAFETY: the caller's promise.
        call(|message| unsafe { run(weights, x, workspace, y, tile, message) })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use proptest::prelude::*;

    use super::*;

    unsafe extern "C" fn supports(_: *const Signature) -> i32 {
        1
    }

    unsafe extern "C" fn packed_size(n: u64, k: u64) -> u64 {
        n.wrapping_mul(k)
    }

    /// A string for a descriptor, which must live as long as it: null, valid, or anything.
    fn string() -> impl Strategy<Value = Option<CString>> {
        prop_oneof![
            1 => Just(None),
            6 => "[A-Za-z0-9._-]{1,63}".prop_map(|text| CString::new(text).ok()),
            1 => prop::collection::vec(1u8..=255, 0..300).prop_map(|bytes| CString::new(bytes).ok()),
        ]
    }

    fn number(valid: u64) -> impl Strategy<Value = u64> {
        prop_oneof![12 => Just(valid), 1 => any::<u64>(), 1 => 0..5000u64]
    }

    fn pointer(text: &Option<CString>) -> *const c_char {
        text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr())
    }

    #[derive(Debug, Clone)]
    struct Fields {
        names: [Option<CString>; 5],
        sizes: [u64; 2],
        version: (u32, u32),
        count: Option<u64>,
        null_kernel: bool,
        numbers: [u64; 4],
        functions: [bool; 3],
    }

    fn fields() -> impl Strategy<Value = Fields> {
        let sizes = [size_of::<RawPlugin>() as u64, size_of::<RawKernel>() as u64].map(number);
        (
            [string(), string(), string(), string(), string()],
            sizes,
            (prop_oneof![9 => Just(ABI_MAJOR), 1 => any::<u32>()], any::<u32>()),
            prop::option::weighted(0.1, any::<u64>().prop_filter("not one", |&n| n == 0 || n > 256)),
            prop::bool::weighted(0.05),
            [number(1), number(1), number(64), number(8)],
            [prop::bool::weighted(0.9), prop::bool::weighted(0.9), prop::bool::weighted(0.9)],
        )
            .prop_map(|(names, sizes, version, count, null_kernel, numbers, functions)| Fields {
                names,
                sizes,
                version,
                count,
                null_kernel,
                numbers,
                functions,
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever a descriptor says, it is refused or its kernels keep what the host relies on.
        #[test]
        fn a_descriptor_is_refused_or_sound(fields in fields()) {
            let Fields { names, sizes, version, count, null_kernel, numbers, functions } = fields;
            let [name, plugin_version, kernel_name, layout, features] = &names;
            let [has_supports, has_pack, has_size] = functions;
            let kernel = RawKernel {
                struct_size: sizes[1],
                name: pointer(kernel_name),
                layout: pointer(layout),
                features: pointer(features),
                operation: numbers[0] as u32,
                target: numbers[1] as u32,
                weight_alignment: numbers[2],
                row_granule: numbers[3],
                supports: has_supports.then_some(supports),
                packed_size: has_size.then_some(packed_size),
                pack: None,
                unpack: None,
                workspace_size: None,
                prepare: None,
                run: None,
                gpu: std::ptr::null(),
            };
            // Complete kernels, or none of the three: what differs between them is what is checked.
            let kernel = match has_pack {
                true => RawKernel { pack: Some(pack), unpack: Some(pack), run: Some(run), ..kernel },
                false => kernel,
            };
            let kernels = [if null_kernel { std::ptr::null() } else { &raw const kernel }];
            let plugin = RawPlugin {
                struct_size: sizes[0],
                abi_major: version.0,
                abi_minor: version.1,
                name: pointer(name),
                version: pointer(plugin_version),
                kernels: kernels.as_ptr(),
                kernel_count: count.unwrap_or(1),
            };
            // SAFETY: null or valid pointers, which live until the end of this test; counts that are not
            // that of the array are out of range, and refused before it is read.
            let checked = unsafe { Plugin::from_descriptor(&plugin, Origin::BuiltIn) };
            let alphabet = |text: &Option<CString>| {
                text.as_ref().and_then(|t| t.to_str().ok()).is_some_and(|t| {
                    (1..=63).contains(&t.len()) && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                })
            };
            match checked {
                Err(error) => prop_assert!(error.to_string().contains("built in")),
                Ok(plugin) => {
                    prop_assert!(version.0 == ABI_MAJOR && count.is_none() && !null_kernel);
                    prop_assert!(alphabet(name) && alphabet(kernel_name) && (layout.is_none() || alphabet(layout)));
                    prop_assert!(sizes[0] >= size_of::<RawPlugin>() as u64 && sizes[1] >= KERNEL_SIZE_1_0 as u64);
                    prop_assert!(has_supports && (layout.is_none() || (has_pack && has_size)));
                    let kernel = &Arc::new(plugin).kernels()[0];
                    // Without a text it is for no GPU that this host knows.
                    prop_assert!(kernel.gpu().is_none() && !matches!(kernel.target(), Target::Wgsl | Target::Cuda));
                    prop_assert!(has_pack || kernel.target() != Target::Cpu);
                    prop_assert!(kernel.weight_alignment().is_power_of_two() && kernel.weight_alignment() <= 4096);
                    prop_assert!((1..=4096).contains(&kernel.row_granule()));
                    prop_assert!(kernel.supports(&Signature::ternary(1, 1, 1, 1)));
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the GPU part of a kernel says, it is refused or what the host relies on holds.
        #[test]
        fn a_gpu_part_is_refused_or_sound(
            (source, entry) in (string(), string()),
            (size, present) in (number(size_of::<RawGpu>() as u64), prop::bool::weighted(0.9)),
            workgroup in prop::array::uniform3(prop_oneof![9 => 1..40u32, 1 => any::<u32>()]),
            (tile_n, tile_m) in (prop_oneof![0..3u32, any::<u32>()], prop_oneof![1..3u32, any::<u32>()]),
            target in TARGET_WGSL..TARGET_CUDA + 2,
            kernel_size in prop_oneof![3 => Just(size_of::<RawKernel>()), 1 => Just(KERNEL_SIZE_1_0)],
        ) {
            let gpu = RawGpu {
                struct_size: size,
                source: pointer(&source),
                entry: pointer(&entry),
                workgroup,
                tile_n,
                tile_m,
                reserved: 0,
            };
            let kernel = RawKernel {
                struct_size: kernel_size as u64,
                name: c"text".as_ptr(),
                layout: std::ptr::null(),
                features: std::ptr::null(),
                operation: OPERATION_TERNARY_MATMUL,
                target,
                weight_alignment: 4,
                row_granule: 1,
                supports: Some(supports),
                packed_size: None,
                pack: None,
                unpack: None,
                workspace_size: None,
                prepare: None,
                run: None,
                gpu: if present { &raw const gpu } else { std::ptr::null() },
            };
            // SAFETY: a kernel whose pointers are null or valid.
            let checked = unsafe { check_kernel(0, &raw const kernel) };
            let known = target != TARGET_CUDA + 1;
            match checked {
                Err(error) => prop_assert!(known && error.contains("`text`"), "{error}"),
                // Kernels of targets that nobody knows are listed, and not used.
                Ok(declared) if !known => prop_assert!(declared.gpu.is_none()),
                Ok(declared) => {
                    let gpu = declared.gpu.expect("a text");
                    prop_assert!(present && kernel_size == size_of::<RawKernel>());
                    prop_assert!(!gpu.text.is_empty() && !gpu.entry.is_empty() && gpu.tile_n > 0 && gpu.tile_m > 0);
                    prop_assert!((1..=1024).contains(&gpu.workgroup.iter().map(|&w| u64::from(w)).product::<u64>()));
                    prop_assert_eq!(gpu.grid(1, 1), [1, 1, 1]);
                }
            }
        }
    }

    unsafe extern "C" fn pack(
        _: *const abi::Weights,
        _: *mut u8,
        _: u64,
        _: u64,
        _: *const Message,
    ) -> Status {
        STATUS_OK
    }

    unsafe extern "C" fn run(
        _: *const abi::Weights,
        _: *const abi::Activations,
        _: *const u8,
        _: *const abi::Output,
        _: *const abi::Tile,
        _: *const Message,
    ) -> Status {
        STATUS_OK
    }

    #[test]
    fn messages_are_cut_and_failures_speak() {
        let say = |bytes: &[u8], status| {
            call(|message| {
                // SAFETY: `call` passes a filled message.
                let message = unsafe { &*message };
                for (i, &byte) in bytes.iter().enumerate().take(message.capacity as usize) {
                    // SAFETY: within the capacity.
                    unsafe { *message.text.add(i) = byte as c_char };
                }
                status
            })
        };
        assert_eq!(say(b"", STATUS_OK), Ok(()));
        assert_eq!(say(b"out of luck\0", 3).unwrap_err().to_string(), "status 3 (failed): out of luck");
        assert_eq!(say(b"", 77).unwrap_err().to_string(), "status 77 (unknown)");
        // Without a NUL, and no text at all.
        let long = say(&[0xff; 400], 1).unwrap_err().message;
        assert_eq!(long.chars().count(), 255);
    }
}
