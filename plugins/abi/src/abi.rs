//! The C ABI, version 1.3. `include/bitnet_plugin.h` declares the same types for C; a test compiles
//! it and compares every size and offset.
//!
//! # Compatibility
//! Every struct begins with `struct_size`, which the side that fills the struct sets to
//! `sizeof` of the version it was built with. Fields are only ever appended, with a new *minor*
//! version; a reader looks at a field only if `struct_size` covers it. Anything else is a new
//! *major* version, and a host refuses a plugin of another major version.
//!
//! # Memory and threads
//! * The host owns every buffer, and every buffer outlives the call it is passed to. Nothing that
//!   one side allocates is freed by the other. A plugin keeps no pointer beyond the call.
//! * The host owns all threads and all partitioning. It calls `run` (and `pack`, `unpack`) of one
//!   kernel concurrently, on disjoint ranges. A kernel starts no threads, and leaves the
//!   floating-point environment as it found it.
//! * Inputs are never written: they may be mapped read-only. Nothing is read beyond the stated sizes.
//! * No panic and no exception crosses the boundary.
//! * A field that is marked "since 1.3" is there if `struct_size` covers it.
//! * The descriptor and everything it points to are immutable and live as long as the library is
//!   loaded; the host never unloads a library whose kernels it has used.

use std::ffi::{c_char, c_void};

/// Major version: a plugin of another major version is refused.
pub const ABI_MAJOR: u32 = 1;
/// Minor version: counts the compatible additions to the major version.
pub const ABI_MINOR: u32 = 3;

/// Name of the function that a plugin exports: [`EntryFn`].
pub const ENTRY_SYMBOL: &str = "bitnet_plugin";

/// The plugin's one exported function: returns its descriptor, the same on every call.
pub type EntryFn = unsafe extern "C" fn() -> *const Plugin;

/// Name of the function that a plugin may export besides, since 1.3: [`HostEntryFn`]. A host that knows it calls it instead
/// of [`ENTRY_SYMBOL`].
pub const HOST_ENTRY_SYMBOL: &str = "bitnet_plugin_for_host";

/// Gets to know the host, and returns the descriptor, which it may build for this machine. Called once.
pub type HostEntryFn = unsafe extern "C" fn(*const Host) -> *const Plugin;

/// [`Host::log`]: something failed.
pub const LOG_ERROR: u32 = 1;
/// [`Host::log`]: something that a user should know.
pub const LOG_WARNING: u32 = 2;
/// [`Host::log`]: what happens.
pub const LOG_INFO: u32 = 3;
/// [`Host::log`]: for the plugin's author.
pub const LOG_DEBUG: u32 = 4;

/// The host, as a plugin gets to know it (since 1.3). It lives as long as the process.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// `sizeof(Host)` of the host.
    pub struct_size: u64,
    /// [`ABI_MAJOR`] of the host.
    pub abi_major: u32,
    /// [`ABI_MINOR`] of the host.
    pub abi_minor: u32,
    /// Version of bitnet-burn: "0.1.0".
    pub version: *const c_char,
    /// What the user configured for plugins (`BITNET_PLUGIN_CONFIG`), empty by default. The host does not look into it.
    /// All plugins get the same text: look for entries that begin with your name.
    pub configuration: *const c_char,
    /// The features of this CPU, separated by commas, by the names that [`Kernel::features`] has.
    pub cpu_features: *const c_char,
    /// Writes a line to the host's log: this host, a `LOG_*`, and UTF-8 text of up to 4095 bytes. May be called on any thread, at
    /// any time.
    pub log: Option<unsafe extern "C" fn(host: *const Host, level: u32, text: *const c_char)>,
}

/// [`Kernel::operation`]: y = ternary weights times int8 activations.
pub const OPERATION_TERNARY_MATMUL: u32 = 1;

/// [`Kernel::operation`]: the same with many scales, of groups of weights and of groups of activations (since 1.2).
///
/// ```text
/// t[m, n, G] = sum over the groups g in G, ascending, from 0: fma((f32)(sum over k in g of q[m, k] * c[n, k]), a[m, g], .)
/// y[m, n]    = sum over the groups G of row n, ascending, from 0: fma(s[n, G], t[m, n, G], .)
/// ```
///
/// G are the groups of weights that share a scale s, and g those of activations that share a scale a
/// ([`Weights::group`], [`Activations::group`]): each G is a whole number of g. The inner sum is an exact i32, which is
/// rounded to the nearest f32. `fma(x, y, .)` adds x * y to what is there, with one rounding.
pub const OPERATION_SCALED_TERNARY_MATMUL: u32 = 2;

/// Rows whose scales lie side by side: see [`Weights::scales`].
pub const SCALE_ROWS: usize = 32;
/// [`Weights::scale_format`]: f32.
pub const SCALE_F32: u32 = 0;
/// [`Weights::scale_format`]: IEEE half precision.
pub const SCALE_F16: u32 = 1;

/// [`Kernel::target`]: runs on the host's CPU, through function pointers.
pub const TARGET_CPU: u32 = 1;
/// [`Kernel::target`]: WGSL text in [`Kernel::gpu`] (since 1.1).
pub const TARGET_WGSL: u32 = 2;
/// [`Kernel::target`]: CUDA C++ text in [`Kernel::gpu`], which NVRTC compiles (since 1.1).
pub const TARGET_CUDA: u32 = 3;
/// [`Kernel::target`]: a function of the host's own CubeCL, which [`Gpu::entry`] names. For kernels that are linked into the
/// host: those of a library would have a CubeCL of their own.
pub const TARGET_CUBECL: u32 = 1 << 16;

/// What a call returns. Any value but [`STATUS_OK`] makes the host take its next kernel.
pub type Status = i32;
/// The call did what it was asked to.
pub const STATUS_OK: Status = 0;
/// The kernel can't do this shape, though it claimed to.
pub const STATUS_UNSUPPORTED: Status = 1;
/// An argument breaks this contract.
pub const STATUS_INVALID_ARGUMENT: Status = 2;
/// The kernel failed; the message says why.
pub const STATUS_FAILED: Status = 3;
/// The kernel panicked; the SDK caught it.
pub const STATUS_PANICKED: Status = 4;

/// Activation rows begin at multiples of this many bytes, and are zero-filled up to one.
pub const ACTIVATION_ALIGNMENT: usize = 64;
/// Bytes that may be read (their values are unspecified) behind the last activation row.
pub const ACTIVATION_SLACK: usize = 64;
/// Canonical weights are only this well aligned: they lie wherever their owner keeps them, in a
/// memory-mapped file (32 there) or in a tensor. Read them with unaligned loads.
pub const CANONICAL_ALIGNMENT: usize = 4;
/// Workspaces are aligned to this many bytes.
pub const WORKSPACE_ALIGNMENT: usize = 64;
/// A kernel may ask for no larger alignment of its private packing than this.
pub const MAX_WEIGHT_ALIGNMENT: u64 = 4096;
/// On a GPU, activation rows are zero-filled up to a multiple of this many values: whole canonical blocks.
pub const GPU_ACTIVATION_BLOCK: usize = 128;

/// What is to be computed: an [m, k] by [n, k]ᵀ product, and its number of threads.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// `sizeof(Signature)` of the host.
    pub struct_size: u64,
    /// `OPERATION_*`.
    pub operation: u32,
    /// Threads that the host will call `run` from.
    pub threads: u32,
    /// Rows of activations (tokens), at least 1.
    pub m: u64,
    /// Output features, at least 1.
    pub n: u64,
    /// Input features, at least 1 and at most 2^23 (so that i32 sums can't overflow).
    pub k: u64,
    /// Since 1.2, as [`Weights::group`]; 0 with [`OPERATION_TERNARY_MATMUL`].
    pub weight_group: u64,
    /// Since 1.2, as [`Activations::group`]; 0 with [`OPERATION_TERNARY_MATMUL`].
    pub activation_group: u64,
    /// Since 1.2, as [`Weights::scale_format`].
    pub scale_format: u32,
    /// Zero.
    pub reserved: u32,
    /// Since 1.3: [`Kernel::context`] of the kernel that is asked.
    pub context: *const c_void,
    /// Since 1.3: where `supports` says why it answers 0, in a few words; null if the host does not ask.
    pub message: *const Message,
}

/// Quantised activations: `m` rows of `k` int8 values, with what absmax quantisation found.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Activations {
    /// `sizeof(Activations)` of the host.
    pub struct_size: u64,
    /// Rows.
    pub m: u64,
    /// Values a row.
    pub k: u64,
    /// Bytes from one row to the next: `k` rounded up to a multiple of 64.
    pub stride: u64,
    /// Row 0, aligned to 64 bytes. Bytes `k..stride` of each row are zero, and 64 bytes behind the
    /// last row may be read.
    pub q: *const i8,
    /// `m` row scales: absmax / 127. Unspecified where `group` is not 0.
    pub scale: *const f32,
    /// `m` sums over the row's `k` values. Unspecified where `group` is not 0.
    pub sum: *const i32,
    /// Since 1.2. Values that share a scale: a multiple of 32, or 0 for the whole row. The last group of a row may be
    /// shorter. With [`OPERATION_TERNARY_MATMUL`], 0.
    pub group: u64,
    /// Since 1.2. The groups' scales: `[m, ceil(k / group)]`, or `scale` itself where `group` is 0.
    pub group_scale: *const f32,
    /// Since 1.2. The groups' sums, likewise.
    pub group_sum: *const i32,
}

/// A ternary weight matrix [n, k], in the canonical layout or in the kernel's own.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// `sizeof(Weights)` of the host.
    pub struct_size: u64,
    /// Output features (rows).
    pub n: u64,
    /// Input features.
    pub k: u64,
    /// The packed codes, aligned as the kernel asks, canonical ones to 4 bytes.
    pub data: *const u8,
    /// Readable bytes at `data`.
    pub size: u64,
    /// The tensor's scale: weight = code * scale. Each matrix has its own, also among matrices of one shape; it may be
    /// negative or subnormal. With [`OPERATION_SCALED_TERNARY_MATMUL`], 0.
    pub scale: f32,
    /// Since 1.2: `SCALE_*`, the type of `scales`. (0 before.)
    pub scale_format: u32,
    /// Since 1.2. Weights of a row that share a scale: a multiple of 32, or 0 for the whole row. The last group of a row
    /// may be shorter.
    pub group: u64,
    /// Since 1.2, for [`OPERATION_SCALED_TERNARY_MATMUL`], else null, and null for `pack` and `unpack`: scales are not
    /// packed. They lie in blocks of [`SCALE_ROWS`] rows: that of row n and group G is number
    /// `(n / 32 * groups + G) * 32 + n % 32`, with `groups` to a row; those of rows behind n are zero. All are finite; they
    /// may be negative, zero or subnormal. Aligned as their type asks.
    pub scales: *const u8,
}

/// Where the results go: y[m, n] is at `y[m * stride + n]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// `sizeof(Output)` of the host.
    pub struct_size: u64,
    /// Row 0, column 0; aligned to 4 bytes only.
    pub y: *mut f32,
    /// Elements from one row to the next.
    pub stride: u64,
}

/// The part of the output that one call of `run` computes, and the only part it may write.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// `sizeof(Tile)` of the host.
    pub struct_size: u64,
    /// First output feature, a multiple of the kernel's `row_granule`.
    pub n0: u64,
    /// End of the output features: a multiple of `row_granule`, or `n`.
    pub n1: u64,
    /// First activation row.
    pub m0: u64,
    /// End of the activation rows.
    pub m1: u64,
    /// Since 1.3: number of the thread that makes the call, below [`Signature::threads`]. No other call of the matmul has it
    /// at the same time.
    pub thread: u32,
    /// Zero.
    pub reserved: u32,
    /// Since 1.3: [`Kernel::scratch_size`] bytes, aligned to 64, which belong to the thread during the call and hold
    /// anything before. Null where that is 0.
    pub scratch: *mut u8,
    /// Since 1.3: bytes at `scratch`.
    pub scratch_size: u64,
}

/// A buffer of the host's for a message: UTF-8, NUL-terminated, cut off at the capacity.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// `sizeof(Message)` of the host.
    pub struct_size: u64,
    /// The buffer.
    pub text: *mut c_char,
    /// Its size in bytes, with the NUL.
    pub capacity: u64,
    /// Since 1.3: [`Kernel::context`] of the kernel that is called.
    pub context: *const c_void,
}

/// A kernel as source text, which the host compiles and launches on the device that a model is on.
///
/// The host's pipeline quantises the activations on the device, so a kernel gets six buffers, always in this
/// order: `@group(0) @binding(0)` to `@binding(5)` in WGSL, where each must be
/// `var<storage, read_write>` and each must be used; the pointer parameters of the
/// `extern "C" __global__` function in CUDA C++.
///
/// | | holds | elements |
/// | --- | --- | --- |
/// | 0 | the weights, in the kernel's layout | u32: what `pack` wrote, or canonical rows, as little-endian words |
/// | 1 | the weights' scale | 1 f32 |
/// | 2 | activations | u32: 4 int8 each, the first in the lowest byte; rows `x_stride` words apart |
/// | 3 | rows | m pairs of an f32 (row scale: absmax / 127) and an i32 (sum of the row's int8 values) |
/// | 4 | parameters | 8 u32: m, n, k, x_stride, y_stride, y_column, 0, 0 |
/// | 5 | the output | f32: y[m, n] is at `m * y_stride + y_column + n` |
///
/// `x_stride` is `ceil(k / 128) * 32` words: rows are filled with zeros up to whole canonical blocks. The rows
/// of the canonical layout take `ceil(k / 128) * 8` words each. The output holds other matrices' columns
/// too, which are not the kernel's to write, and nothing may be written but its own. Sums must be exact; y may
/// differ from the two separate f32 products by 2 units in the last place, since shading languages leave that open.
///
/// `(ceil(n / tile_n), ceil(m / tile_m), 1)` workgroups (blocks) are launched.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Gpu {
    /// `sizeof(Gpu)` of the plugin.
    pub struct_size: u64,
    /// The text: UTF-8, NUL-terminated, at most 1 MiB.
    pub source: *const c_char,
    /// Name of the entry point in it: an ASCII identifier of up to 127 characters.
    pub entry: *const c_char,
    /// Threads of a workgroup by dimension, as the text declares them; at most 1024 in all.
    pub workgroup: [u32; 3],
    /// Output features that one workgroup computes, at least 1.
    pub tile_n: u32,
    /// Rows of activations that one workgroup computes, at least 1.
    pub tile_m: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: a part of a kernel descriptor, see there.
unsafe impl Sync for Gpu {}
// SAFETY: as above.
unsafe impl Send for Gpu {}

/// One kernel.
///
/// A kernel whose `layout` is null reads canonical weights where they lie; `packed_size`, `pack` and
/// `unpack` are then null too. Kernels of one plugin that name the same `layout` read each other's
/// packed bytes, so that the host can choose among them call by call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// `sizeof(Kernel)` of the plugin.
    pub struct_size: u64,
    /// Name, unique within the plugin: `[A-Za-z0-9._-]{1,63}`.
    pub name: *const c_char,
    /// Name of the private packing (same alphabet), or null for the canonical layout. Since 1.3 also the name of a
    /// [public layout](crate::layouts), such as "cpu/t2x32", for kernels of CPUs: the host packs it, and `packed_size`, `pack` and
    /// `unpack` are null.
    pub layout: *const c_char,
    /// Features that it needs, separated by commas, or null: of the CPU, in Rust's names ("avx2,fma"); of a
    /// GPU, "subgroups" (of at least 8 threads) and "shader-f16" are known. The host never runs it where one of them is lacking. What
    /// `pack` and `unpack` of a GPU kernel need of the CPU, they detect themselves.
    pub features: *const c_char,
    /// `OPERATION_*`.
    pub operation: u32,
    /// `TARGET_*`.
    pub target: u32,
    /// Alignment in bytes that packed weights need: a power of two up to 4096.
    pub weight_alignment: u64,
    /// `run`, `pack` and `unpack` get ranges of output features that begin at multiples of this.
    pub row_granule: u64,
    /// Whether it can compute this: 1 or 0. Must not depend on `threads` or `m` for packing.
    pub supports: Option<unsafe extern "C" fn(*const Signature) -> i32>,
    /// Bytes of packed weights for an [n, k] matrix, at least n * k * log2(3) / 8; 0 if it can't pack it.
    pub packed_size: Option<unsafe extern "C" fn(n: u64, k: u64) -> u64>,
    /// Packs rows `n0..n1` of canonical weights. Writes only what belongs to those rows (padding
    /// behind row n belongs to the last range), and all of it that `run` or `unpack` will read: the buffer
    /// holds anything before.
    pub pack: Option<
        unsafe extern "C" fn(
            canonical: *const Weights,
            packed: *mut u8,
            n0: u64,
            n1: u64,
            message: *const Message,
        ) -> Status,
    >,
    /// The inverse of `pack`: writes canonical rows `n0..n1` (row 0 of the matrix is at `canonical`),
    /// with their padding.
    pub unpack: Option<
        unsafe extern "C" fn(
            packed: *const Weights,
            canonical: *mut u8,
            n0: u64,
            n1: u64,
            message: *const Message,
        ) -> Status,
    >,
    /// Bytes of workspace for one matmul (null: none). The host aligns it to 64 bytes. Depends on `m`
    /// and `k` alone: weights over the same activations share one workspace.
    pub workspace_size: Option<unsafe extern "C" fn(*const Signature) -> u64>,
    /// Called once a matmul, before any `run` of it, to fill the workspace, which holds anything before,
    /// from the activations (null: nothing to prepare).
    pub prepare: Option<
        unsafe extern "C" fn(x: *const Activations, workspace: *mut u8, message: *const Message) -> Status,
    >,
    /// Computes one tile. Called concurrently on disjoint tiles. Null for a GPU.
    pub run: Option<
        unsafe extern "C" fn(
            weights: *const Weights,
            x: *const Activations,
            workspace: *const u8,
            y: *const Output,
            tile: *const Tile,
            message: *const Message,
        ) -> Status,
    >,
    /// Since 1.1: the text of a kernel for a GPU, null for the CPU. `workspace_size`, `prepare` and
    /// `run` are null where this is not.
    pub gpu: *const Gpu,
    /// Since 1.3: anything of the plugin's, or null. The host hands it to every function of the kernel: in [`Signature`] or
    /// [`Message`]. So one function can serve many kernels, which differ in what their contexts hold. Immutable.
    pub context: *const c_void,
    /// Since 1.3: as `packed_size`, of the signature's `n` and `k` (`m` is 1), with the context. Where it is not null, the host
    /// calls it instead of `packed_size`, which is for older hosts and may be null.
    pub packed_size_of: Option<unsafe extern "C" fn(*const Signature) -> u64>,
    /// Since 1.3: bytes of scratch for each thread ([`Tile::scratch`]). Depends on `m`, `n` and `k` alone. Null: none.
    pub scratch_size: Option<unsafe extern "C" fn(*const Signature) -> u64>,
}

/// `sizeof(Kernel)` in version 1.0: all fields before `gpu`.
pub const KERNEL_SIZE_1_0: usize = std::mem::offset_of!(Kernel, gpu);
/// `sizeof(Kernel)` in versions 1.1 and 1.2: all fields before `context`.
pub const KERNEL_SIZE_1_1: usize = std::mem::offset_of!(Kernel, context);

// SAFETY: read-only views of buffers that nobody writes while a call uses them (module contract).
unsafe impl Sync for Activations {}
// SAFETY: as above.
unsafe impl Send for Activations {}
// SAFETY: as above.
unsafe impl Sync for Weights {}
// SAFETY: as above.
unsafe impl Send for Weights {}

// SAFETY: as above; the scratch belongs to the call.
unsafe impl Sync for Tile {}
// SAFETY: as above.
unsafe impl Send for Tile {}
// SAFETY: plain data; the context is immutable, and the message belongs to the call.
unsafe impl Sync for Signature {}
// SAFETY: as above.
unsafe impl Send for Signature {}
// SAFETY: strings and a function that live as long as the process and belong to no thread.
unsafe impl Sync for Host {}
// SAFETY: as above.
unsafe impl Send for Host {}

// SAFETY: a kernel descriptor is immutable data; the strings and functions that it points to live as
// long as the library (module contract).
unsafe impl Sync for Kernel {}
// SAFETY: as above; nothing in it belongs to one thread.
unsafe impl Send for Kernel {}

/// A plugin: what [`EntryFn`] returns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Plugin {
    /// `sizeof(Plugin)` of the plugin.
    pub struct_size: u64,
    /// [`ABI_MAJOR`] that the plugin was built with. `struct_size`, `abi_major` and `abi_minor` keep
    /// their places in every version.
    pub abi_major: u32,
    /// [`ABI_MINOR`] that the plugin was built with.
    pub abi_minor: u32,
    /// Name: `[A-Za-z0-9._-]{1,63}`.
    pub name: *const c_char,
    /// Version, as its author counts.
    pub version: *const c_char,
    /// `kernel_count` pointers to kernels.
    pub kernels: *const *const Kernel,
    /// Number of kernels, at most 256.
    pub kernel_count: u64,
}

// SAFETY: as for `Kernel`.
unsafe impl Sync for Plugin {}
// SAFETY: as for `Kernel`.
unsafe impl Send for Plugin {}

impl Signature {
    /// A ternary matmul [m, k] x [n, k]ᵀ on `threads` threads.
    pub const fn ternary(m: u64, n: u64, k: u64, threads: u32) -> Self {
        Self {
            struct_size: size_of::<Self>() as u64,
            operation: OPERATION_TERNARY_MATMUL,
            threads,
            m,
            n,
            k,
            weight_group: 0,
            activation_group: 0,
            scale_format: SCALE_F32,
            reserved: 0,
            context: std::ptr::null(),
            message: std::ptr::null(),
        }
    }
}

impl Tile {
    /// Output features and rows of activations, for thread 0 without scratch.
    pub fn new(n: std::ops::Range<usize>, m: std::ops::Range<usize>) -> Self {
        Self {
            struct_size: size_of::<Self>() as u64,
            n0: n.start as u64,
            n1: n.end as u64,
            m0: m.start as u64,
            m1: m.end as u64,
            thread: 0,
            reserved: 0,
            scratch: std::ptr::null_mut(),
            scratch_size: 0,
        }
    }
}
