//! Writing a kernel in Rust: implement [`TernaryKernel`], or [`GpuKernel`] for one that is GPU source text,
//! name it in [`plugin!`](crate::plugin), and export the plugin from a `cdylib` with
//! [`export_plugin!`](crate::export_plugin). Panics are caught at the boundary and become a status.

mod host;
mod operands;

use std::ffi::{CStr, CString, c_char};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use self::host::{HostRef, Level, Logger, build_plugin, plugin_for_host};
pub use self::operands::{
    ActivationsRef, OutputTile, Scales, WeightsRef, f16_value, group_length, groups, groups_fit, scale_count,
};
pub use crate::abi::Signature;
use crate::abi::{
    self, Activations, Gpu, Kernel, Message, Output, STATUS_FAILED, STATUS_INVALID_ARGUMENT, STATUS_OK,
    STATUS_PANICKED, STATUS_UNSUPPORTED, Status, Tile, Weights,
};
use crate::canonical;

/// Why a kernel did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelError {
    /// `STATUS_*`, never `STATUS_OK`.
    pub status: Status,
    /// For the person who reads the report.
    pub message: String,
}

impl KernelError {
    /// The kernel failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { status: STATUS_FAILED, message: message.into() }
    }

    /// The kernel can't do this shape.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self { status: STATUS_UNSUPPORTED, message: message.into() }
    }

    /// An argument breaks the contract.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self { status: STATUS_INVALID_ARGUMENT, message: message.into() }
    }
}

/// Result of a kernel's functions.
pub type KernelResult = Result<(), KernelError>;

/// A ternary matmul kernel. One type per kernel, without state; see the [crate] for the arithmetic.
pub trait TernaryKernel: Send + Sync + 'static {
    /// Name, unique within the plugin: `[A-Za-z0-9._-]{1,63}`.
    const NAME: &'static CStr;
    /// Name of the private packing, or `None` for a kernel that reads canonical weights in place. For a
    /// [public layout](crate::layouts) the host packs, and `granule_bytes`, `pack` and `unpack` are not asked.
    const LAYOUT: Option<&'static CStr> = None;
    /// CPU features that it needs, in Rust's names, separated by commas; empty for none.
    const FEATURES: &'static CStr = c"";
    /// Ranges of output features begin at multiples of this.
    const ROW_GRANULE: usize = 1;
    /// Alignment of the private packing in bytes.
    const WEIGHT_ALIGNMENT: usize = 64;
    /// `OPERATION_*`: what it computes.
    const OPERATION: u32 = abi::OPERATION_TERNARY_MATMUL;

    /// Whether it can compute this. For a [public layout](crate::layouts), the answer may depend on `m`: a kernel may be for
    /// decode alone, or for prompts.
    fn supports(_signature: &Signature) -> bool {
        true
    }

    /// Why it can't, in a few words, for the reports of people who expected it to.
    fn why_not(_signature: &Signature) -> Option<String> {
        None
    }

    /// Bytes that [`Self::ROW_GRANULE`] rows of `k` weights take in the private packing.
    fn granule_bytes(_k: usize) -> usize {
        0
    }

    /// Packs `rows` (whole granules; the last may be cut off at n) into `out`, which is as long as
    /// those granules. Rows behind n must be packed so that `run` stays right.
    fn pack(_canonical: &WeightsRef, _rows: Range<usize>, _out: &mut [u8]) -> KernelResult {
        Err(KernelError::unsupported("reads the canonical layout; there is nothing to pack"))
    }

    /// The inverse of [`pack`](Self::pack): `out` holds the canonical bytes of `rows`.
    fn unpack(_packed: &WeightsRef, _rows: Range<usize>, _out: &mut [u8]) -> KernelResult {
        Err(KernelError::unsupported("reads the canonical layout; there is nothing to unpack"))
    }

    /// Bytes of workspace for `m` rows of `k` activations. Weights that share activations share it.
    fn workspace_size(_m: usize, _k: usize) -> usize {
        0
    }

    /// Bytes of scratch that each thread has in [`run`](Self::run), by [`OutputTile::with_scratch`], for `m` rows of activations and
    /// weights [n, k].
    fn scratch_size(_m: usize, _n: usize, _k: usize) -> usize {
        0
    }

    /// Fills the workspace from the activations, once a matmul.
    fn prepare(_x: &ActivationsRef, _workspace: &mut [u8]) -> KernelResult {
        Ok(())
    }

    /// Computes the tile.
    fn run(w: &WeightsRef, x: &ActivationsRef, workspace: &[u8], y: &mut OutputTile) -> KernelResult;
}

/// The language of a [`GpuKernel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// The WebGPU shading language.
    Wgsl,
    /// CUDA C++, which NVRTC compiles.
    Cuda,
    /// A function of the host's own CubeCL. Not for libraries that are loaded from files.
    CubeCl,
}

impl Language {
    const fn target(self) -> u32 {
        match self {
            Language::Wgsl => abi::TARGET_WGSL,
            Language::Cuda => abi::TARGET_CUDA,
            Language::CubeCl => abi::TARGET_CUBECL,
        }
    }
}

/// Text that ends with a NUL, as [`GpuKernel::SOURCE`] takes it:
///
/// ```
/// # use bitnet_burn_plugin::sdk::source;
/// const SOURCE: &std::ffi::CStr = source(concat!("const ROWS = 1u;\n", "fn more() {}", "\0"));
/// # assert!(SOURCE.to_str().unwrap().ends_with("}"));
/// ```
///
/// # Panics
/// While compiling, if it does not end with a NUL, or holds another one.
pub const fn source(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("a text must end with its only NUL: concat!(include_str!(\"...\"), \"\\0\")"),
    }
}

/// A ternary matmul kernel as source text, which the host compiles and launches on the device that a model is on.
/// [`abi::Gpu`] says which buffers the text gets, and in which order. What runs on the host is packing.
pub trait GpuKernel: Send + Sync + 'static {
    /// Name, unique within the plugin: `[A-Za-z0-9._-]{1,63}`.
    const NAME: &'static CStr;
    /// Language of the text.
    const LANGUAGE: Language;
    /// The text.
    const SOURCE: &'static CStr;
    /// Name of the entry point in it.
    const ENTRY: &'static CStr;
    /// Threads of a workgroup by dimension, as the text declares them.
    const WORKGROUP: [u32; 3];
    /// Output features, and rows of activations, that one workgroup computes.
    const TILE: [u32; 2];
    /// Device features that it needs, separated by commas ("subgroups", of at least 8 threads, "shader-f16"); empty for none.
    const FEATURES: &'static CStr = c"";
    /// Name of the private packing, or `None` for a kernel that reads canonical weights.
    const LAYOUT: Option<&'static CStr> = None;
    /// `pack` and `unpack` get ranges of output features that begin at multiples of this.
    const ROW_GRANULE: usize = 1;

    /// Whether it can compute this. For a [public layout](crate::layouts), the answer may depend on `m`: a kernel may be for
    /// decode alone, or for prompts.
    fn supports(_signature: &Signature) -> bool {
        true
    }

    /// Why it can't, in a few words, for the reports of people who expected it to.
    fn why_not(_signature: &Signature) -> Option<String> {
        None
    }

    /// Bytes that [`Self::ROW_GRANULE`] rows of `k` weights take in the private packing.
    fn granule_bytes(_k: usize) -> usize {
        0
    }

    /// As [`TernaryKernel::pack`].
    fn pack(_canonical: &WeightsRef, _rows: Range<usize>, _out: &mut [u8]) -> KernelResult {
        Err(KernelError::unsupported("reads the canonical layout; there is nothing to pack"))
    }

    /// As [`TernaryKernel::unpack`].
    fn unpack(_packed: &WeightsRef, _rows: Range<usize>, _out: &mut [u8]) -> KernelResult {
        Err(KernelError::unsupported("reads the canonical layout; there is nothing to unpack"))
    }
}

/// What both kinds of kernels do on the host.
pub(crate) trait Packing {
    const ROW_GRANULE: usize;
    fn supports(signature: &Signature) -> bool;
    fn why_not(signature: &Signature) -> Option<String>;
    fn granule_bytes(k: usize) -> usize;
    fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult;
    fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult;
}

struct OnCpu<K>(std::marker::PhantomData<K>);
struct OnGpu<K>(std::marker::PhantomData<K>);

macro_rules! packing {
    ($type:ident, $trait:ident) => {
        impl<K: $trait> Packing for $type<K> {
            const ROW_GRANULE: usize = K::ROW_GRANULE;

            fn supports(signature: &Signature) -> bool {
                K::supports(signature)
            }

            fn why_not(signature: &Signature) -> Option<String> {
                K::why_not(signature)
            }

            fn granule_bytes(k: usize) -> usize {
                K::granule_bytes(k)
            }

            fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
                K::pack(canonical, rows, out)
            }

            fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
                K::unpack(packed, rows, out)
            }
        }
    };
}

packing!(OnCpu, TernaryKernel);
packing!(OnGpu, GpuKernel);

/// The descriptor of a kernel for the CPU, as far as its packing fills it.
const fn descriptor<P: Packing>(name: &'static CStr, layout: Option<&'static CStr>) -> Kernel {
    let private = match layout {
        Some(name) => !is_public(name),
        None => false,
    };
    Kernel {
        struct_size: size_of::<Kernel>() as u64,
        name: name.as_ptr(),
        layout: match layout {
            Some(name) => name.as_ptr(),
            None => std::ptr::null(),
        },
        features: std::ptr::null(),
        operation: abi::OPERATION_TERNARY_MATMUL,
        target: abi::TARGET_CPU,
        weight_alignment: abi::CANONICAL_ALIGNMENT as u64,
        row_granule: P::ROW_GRANULE as u64,
        supports: Some(supports::<P>),
        packed_size: if private { Some(packed_size::<P>) } else { None },
        pack: if private { Some(pack::<P>) } else { None },
        unpack: if private { Some(unpack::<P>) } else { None },
        workspace_size: None,
        prepare: None,
        run: None,
        gpu: std::ptr::null(),
        context: std::ptr::null(),
        packed_size_of: None,
        scratch_size: None,
    }
}

/// Whether a layout's name is that of a public one: only those have a slash.
const fn is_public(name: &CStr) -> bool {
    let bytes = name.to_bytes();
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i] == b'/' {
            return true;
        }
        i += 1;
    }
    false
}

/// The descriptor of a kernel type. Used by [`plugin!`](crate::plugin).
pub const fn kernel<K: TernaryKernel>() -> Kernel {
    let private = K::LAYOUT.is_some();
    Kernel {
        features: K::FEATURES.as_ptr(),
        operation: K::OPERATION,
        weight_alignment: if private { K::WEIGHT_ALIGNMENT as u64 } else { abi::CANONICAL_ALIGNMENT as u64 },
        workspace_size: Some(workspace_size::<K>),
        scratch_size: Some(scratch_size::<K>),
        prepare: Some(prepare::<K>),
        run: Some(run::<K>),
        ..descriptor::<OnCpu<K>>(K::NAME, K::LAYOUT)
    }
}

impl<K: GpuKernel> OnGpu<K> {
    const GPU: &'static Gpu = &Gpu {
        struct_size: size_of::<Gpu>() as u64,
        source: K::SOURCE.as_ptr(),
        entry: K::ENTRY.as_ptr(),
        workgroup: K::WORKGROUP,
        tile_n: K::TILE[0],
        tile_m: K::TILE[1],
        reserved: 0,
    };
}

/// The descriptor of a GPU kernel's type. Used by [`plugin!`](crate::plugin).
pub const fn gpu_kernel<K: GpuKernel>() -> Kernel {
    Kernel {
        features: K::FEATURES.as_ptr(),
        target: K::LANGUAGE.target(),
        gpu: OnGpu::<K>::GPU,
        ..descriptor::<OnGpu<K>>(K::NAME, K::LAYOUT)
    }
}

/// The same for a text that is written at run time: the name, the language, the text and its entry point instead of those of
/// `K`. For [`build_plugin`]. It is never freed, as the ABI asks.
pub fn gpu_kernel_in<K: GpuKernel>(
    name: CString,
    language: Language,
    source: CString,
    entry: CString,
) -> Kernel {
    let leak = |text: CString| Box::leak(text.into_boxed_c_str()).as_ptr();
    let gpu: &Gpu = OnGpu::<K>::GPU;
    Kernel {
        name: leak(name),
        target: language.target(),
        gpu: Box::leak(Box::new(Gpu { source: leak(source), entry: leak(entry), ..*gpu })),
        ..gpu_kernel::<K>()
    }
}

/// A struct of the host's, whose first field is its size: fields that an older host does not have are zero.
///
/// # Safety
/// `T` is one of the ABI's structs, which may be zero, and the host has filled it.
unsafe fn read<T: Copy>(from: *const T) -> T {
    let mut copy = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: every struct begins with its size in bytes; no more than that is read, and no more than there is room for
    // written. Zero is a value of every field (the caller's promise).
    unsafe {
        let size = (from.cast::<u64>().read() as usize).min(size_of::<T>());
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), copy.as_mut_ptr().cast::<u8>(), size);
        copy.assume_init()
    }
}

unsafe extern "C" fn supports<P: Packing>(signature: *const Signature) -> i32 {
    // SAFETY: the host passes a filled signature.
    let signature = unsafe { read(signature) };
    let supports = catch_unwind(|| P::supports(&signature)).unwrap_or(false);
    // SAFETY: null, or a message that the host filled.
    if let Some(message) = unsafe { signature.message.as_ref() }.filter(|_| !supports) {
        let why = catch_unwind(|| P::why_not(&signature)).ok().flatten();
        why.into_iter().for_each(|why| write_message(message, &why));
    }
    supports.into()
}

fn private_size<P: Packing>(n: usize, k: usize) -> Option<usize> {
    n.div_ceil(P::ROW_GRANULE).checked_mul(P::granule_bytes(k))
}

pub(crate) unsafe extern "C" fn packed_size<P: Packing>(n: u64, k: u64) -> u64 {
    catch_unwind(|| private_size::<P>(n as usize, k as usize)).ok().flatten().unwrap_or(0) as u64
}

pub(crate) unsafe extern "C" fn pack<P: Packing>(
    canonical: *const Weights,
    packed: *mut u8,
    n0: u64,
    n1: u64,
    message: *const Message,
) -> Status {
    guarded(message, || {
        // SAFETY: the host passes filled weights.
        let w = unsafe { WeightsRef::from_abi(&read(canonical)) };
        let granule_bytes = P::granule_bytes(w.k());
        let (n0, n1) = (n0 as usize, n1 as usize);
        let (first, end) = (n0 / P::ROW_GRANULE, n1.div_ceil(P::ROW_GRANULE));
        // SAFETY: the packing is `packed_size` bytes; the granules of n0..n1 lie within it and belong
        // to this call alone.
        let out = unsafe {
            std::slice::from_raw_parts_mut(packed.add(first * granule_bytes), (end - first) * granule_bytes)
        };
        P::pack(&w, n0..n1, out)
    })
}

pub(crate) unsafe extern "C" fn unpack<P: Packing>(
    packed: *const Weights,
    canonical: *mut u8,
    n0: u64,
    n1: u64,
    message: *const Message,
) -> Status {
    guarded(message, || {
        // SAFETY: the host passes filled weights.
        let w = unsafe { WeightsRef::from_abi(&read(packed)) };
        let row = canonical::row_bytes(w.k());
        let (n0, n1) = (n0 as usize, n1 as usize);
        // SAFETY: canonical rows n0..n1 lie within the host's buffer and belong to this call alone.
        let out = unsafe { std::slice::from_raw_parts_mut(canonical.add(n0 * row), (n1 - n0) * row) };
        P::unpack(&w, n0..n1, out)
    })
}

unsafe extern "C" fn workspace_size<K: TernaryKernel>(signature: *const Signature) -> u64 {
    // SAFETY: the host passes a filled signature.
    let signature = unsafe { read(signature) };
    catch_unwind(|| K::workspace_size(signature.m as usize, signature.k as usize) as u64).unwrap_or(0)
}

unsafe extern "C" fn scratch_size<K: TernaryKernel>(signature: *const Signature) -> u64 {
    // SAFETY: the host passes a filled signature.
    let Signature { m, n, k, .. } = unsafe { read(signature) };
    catch_unwind(|| K::scratch_size(m as usize, n as usize, k as usize) as u64).unwrap_or(0)
}

unsafe extern "C" fn prepare<K: TernaryKernel>(
    x: *const Activations,
    workspace: *mut u8,
    message: *const Message,
) -> Status {
    guarded(message, || {
        // SAFETY: the host passes filled activations.
        let raw = unsafe { read(x) };
        let size = K::workspace_size(raw.m as usize, raw.k as usize);
        let workspace = match size {
            0 => &mut [][..],
            // SAFETY: the host's workspace has the size that `workspace_size` asked for; null only for 0.
            _ => unsafe { std::slice::from_raw_parts_mut(workspace, size) },
        };
        // SAFETY: the host's activations live during the call.
        let x = unsafe { ActivationsRef::from_abi(&raw) };
        K::prepare(&x, workspace)
    })
}

unsafe extern "C" fn run<K: TernaryKernel>(
    weights: *const Weights,
    x: *const Activations,
    workspace: *const u8,
    y: *const Output,
    tile: *const Tile,
    message: *const Message,
) -> Status {
    guarded(message, || {
        // SAFETY: the host passes filled structs whose buffers live during the call, and gives the
        // tile to this call alone.
        let (raw, weights, mut tile) = unsafe {
            (read(x), WeightsRef::from_abi(&read(weights)), OutputTile::from_abi(&*y, &read(tile)))
        };
        let size = K::workspace_size(raw.m as usize, raw.k as usize);
        let workspace = match size {
            0 => &[][..],
            // SAFETY: as in `prepare`; nobody writes it while tiles run.
            _ => unsafe { std::slice::from_raw_parts(workspace, size) },
        };
        // SAFETY: the host's activations live during the call.
        let x = unsafe { ActivationsRef::from_abi(&raw) };
        K::run(&weights, &x, workspace, &mut tile)
    })
}

/// Runs `f`; turns errors and panics into a status and a message.
fn guarded(message: *const Message, f: impl FnOnce() -> KernelResult) -> Status {
    let error = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => return STATUS_OK,
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".into());
            KernelError { status: STATUS_PANICKED, message: format!("panicked: {text}") }
        }
    };
    // SAFETY: the host passes null or a filled message.
    if let Some(message) = unsafe { message.as_ref() } {
        write_message(message, &error.message);
    }
    error.status
}

fn write_message(message: &Message, text: &str) {
    if message.text.is_null() || message.capacity == 0 {
        return;
    }
    let mut length = text.len().min(message.capacity as usize - 1);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    // SAFETY: the buffer has `capacity` bytes, and length < capacity.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast::<c_char>(), message.text, length);
        *message.text.add(length) = 0;
    }
}

/// Declares a plugin's descriptor as a static.
///
/// ```ignore
/// plugin! {
///     /// What it is.
///     pub static PLUGIN = { name: c"mine", version: c"1.0.0", kernels: [KernelA, KernelB] };
/// }
/// ```
///
/// Behind `kernels`, `gpu_kernels: [KernelC]` names types that implement [`GpuKernel`](crate::sdk::GpuKernel); either list
/// may be empty, but not both.
#[macro_export]
macro_rules! plugin {
    ($(#[$attribute:meta])* $visibility:vis static $ident:ident = {
        name: $name:expr, version: $version:expr, kernels: [$($kernel:ty),* $(,)?]
        $(, gpu_kernels: [$($gpu_kernel:ty),* $(,)?])? $(,)?
    };) => {
        $(#[$attribute])*
        $visibility static $ident: $crate::abi::Plugin = {
            const KERNELS: &[&$crate::abi::Kernel] = {
                &[
                    $({
                        static KERNEL: $crate::abi::Kernel = $crate::sdk::kernel::<$kernel>();
                        &KERNEL
                    },)*
                    $($({
                        static KERNEL: $crate::abi::Kernel = $crate::sdk::gpu_kernel::<$gpu_kernel>();
                        &KERNEL
                    },)*)?
                ]
            };
            $crate::abi::Plugin {
                struct_size: size_of::<$crate::abi::Plugin>() as u64,
                abi_major: $crate::abi::ABI_MAJOR,
                abi_minor: $crate::abi::ABI_MINOR,
                name: ::std::ffi::CStr::as_ptr($name),
                version: ::std::ffi::CStr::as_ptr($version),
                kernels: KERNELS.as_ptr().cast(),
                kernel_count: KERNELS.len() as u64,
            }
        };
    };
}

/// Exports a plugin's descriptor from a `cdylib`: the symbol that the host looks for.
///
/// With a function behind it (`export_plugin!(PLUGIN, for_host: build)`), hosts from 1.3 on get what that returns instead: it gets
/// a [`HostRef`](crate::sdk::HostRef) and gives the descriptor, for example by [`build_plugin`](crate::sdk::build_plugin).
#[macro_export]
macro_rules! export_plugin {
    ($plugin:path, for_host: $build:path) => {
        $crate::export_plugin!($plugin);

        /// The entry point that bitnet-burn looks for first.
        ///
        /// # Safety
        /// `host` is the host's own, filled.
        // SAFETY: the symbol is this ABI's own name, and a cdylib exports it once.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn bitnet_plugin_for_host(
            host: *const $crate::abi::Host,
        ) -> *const $crate::abi::Plugin {
            // SAFETY: the caller's promise.
            unsafe { $crate::sdk::plugin_for_host(host, $build) }
        }
    };
    ($plugin:path) => {
        /// The entry point that bitnet-burn looks for.
        // SAFETY: the symbol is this ABI's own name, and a cdylib exports it once.
        #[unsafe(no_mangle)]
        pub extern "C" fn bitnet_plugin() -> *const $crate::abi::Plugin {
            &raw const $plugin
        }
    };
}
