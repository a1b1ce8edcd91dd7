//! Writing a kernel in Rust: implement [`TernaryKernel`], or [`GpuKernel`] for one that is GPU source text,
//! name it in [`plugin!`](crate::plugin), and export the plugin from a `cdylib` with
//! [`export_plugin!`](crate::export_plugin). Panics are caught at the boundary and become a status.

use std::ffi::{CStr, c_char};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::abi::{
    self, Activations, Gpu, Kernel, Message, Output, STATUS_FAILED, STATUS_INVALID_ARGUMENT, STATUS_OK,
    STATUS_PANICKED, STATUS_UNSUPPORTED, Signature, Status, Tile, Weights,
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
    /// Name of the private packing, or `None` for a kernel that reads canonical weights in place.
    const LAYOUT: Option<&'static CStr> = None;
    /// CPU features that it needs, in Rust's names, separated by commas; empty for none.
    const FEATURES: &'static CStr = c"";
    /// Ranges of output features begin at multiples of this.
    const ROW_GRANULE: usize = 1;
    /// Alignment of the private packing in bytes.
    const WEIGHT_ALIGNMENT: usize = 64;
    /// `OPERATION_*`: what it computes.
    const OPERATION: u32 = abi::OPERATION_TERNARY_MATMUL;

    /// Whether it can compute this.
    fn supports(_signature: &Signature) -> bool {
        true
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

    /// Whether it can compute this.
    fn supports(_signature: &Signature) -> bool {
        true
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

/// A weight matrix, canonical or privately packed.
#[derive(Clone, Copy, Debug)]
pub struct WeightsRef<'a> {
    n: usize,
    k: usize,
    scale: f32,
    data: &'a [u8],
    scales: Scales<'a>,
}

/// The scales of [`OPERATION_SCALED_TERNARY_MATMUL`](abi::OPERATION_SCALED_TERNARY_MATMUL), laid out as
/// [`Weights::scales`] says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scales<'a> {
    /// None: one scale for all, [`WeightsRef::scale`].
    None,
    /// f32.
    F32 {
        /// Weights of a row that share a scale; 0 for the whole row.
        group: usize,
        /// The scales.
        values: &'a [f32],
    },
    /// The bits of IEEE half precision.
    F16 {
        /// As above.
        group: usize,
        /// The scales.
        values: &'a [u16],
    },
}

/// Groups in a row of `k` values; a `group` of 0 is the whole row.
pub const fn groups(k: usize, group: usize) -> usize {
    if group == 0 { 1 } else { k.div_ceil(group) }
}

/// Values of a group, but for the last of a row; a `group` of 0 is the whole row of `k`.
pub const fn group_length(k: usize, group: usize) -> usize {
    if group == 0 { k } else { group }
}

/// Whether a group of weights is a whole number of groups of activations, which are multiples of 32; 0 is a whole row.
pub const fn groups_fit(weights: usize, activations: usize) -> bool {
    match (weights, activations) {
        (0, 0) => true,
        (_, 0) => false,
        (weights, activations) => activations.is_multiple_of(32) && weights.is_multiple_of(activations),
    }
}

/// Number of scales of an [n, k] matrix with the padding of the last block of rows, or `None` where that overflows.
pub const fn scale_count(n: usize, k: usize, group: usize) -> Option<usize> {
    match n.checked_next_multiple_of(abi::SCALE_ROWS) {
        Some(rows) => rows.checked_mul(groups(k, group)),
        None => None,
    }
}

/// The value of a finite half-precision number, exactly.
#[inline(always)]
pub const fn f16_value(bits: u16) -> f32 {
    // The exponent's bias differs by 112; the product puts it right, also for subnormal numbers.
    let magnitude = f32::from_bits((bits as u32 & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | (bits as u32 & 0x8000) << 16)
}

impl Scales<'_> {
    /// Weights of a row that share a scale; 0 for the whole row.
    pub fn group(&self) -> usize {
        match self {
            Self::None => 0,
            Self::F32 { group, .. } | Self::F16 { group, .. } => *group,
        }
    }

    /// The scales of the block of [`SCALE_ROWS`](abi::SCALE_ROWS) rows that begins at row n0, of group `g` of `groups`.
    ///
    /// # Panics
    /// If there are no such scales.
    #[inline(always)]
    pub fn block(&self, n0: usize, g: usize, groups: usize) -> [f32; abi::SCALE_ROWS] {
        let at = (n0 / abi::SCALE_ROWS * groups + g) * abi::SCALE_ROWS;
        match self {
            Self::None => panic!("a matrix with one scale has no blocks of them"),
            Self::F32 { values, .. } => *values[at..].first_chunk().expect("a whole block"),
            Self::F16 { values, .. } => {
                let bits: &[u16; abi::SCALE_ROWS] = values[at..].first_chunk().expect("a whole block");
                bits.map(f16_value)
            }
        }
    }
}

impl<'a> WeightsRef<'a> {
    /// A view of packed bytes.
    pub fn new(n: usize, k: usize, scale: f32, data: &'a [u8]) -> Self {
        Self { n, k, scale, data, scales: Scales::None }
    }

    /// The same with many scales.
    pub fn with_scales(self, scales: Scales<'a>) -> Self {
        Self { scales, ..self }
    }

    /// The scales of groups.
    pub fn scales(&self) -> Scales<'a> {
        self.scales
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// weight = code * scale.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The packed bytes.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Row `n` of canonical weights.
    ///
    /// # Panics
    /// If the bytes are fewer than the canonical layout needs.
    pub fn canonical_row(&self, n: usize) -> canonical::Row<'a> {
        let bytes = canonical::row_bytes(self.k);
        let from = n.checked_mul(bytes).expect("a row that a machine can address");
        canonical::Row(&self.data[from..][..bytes])
    }

    /// The same as the C ABI passes it.
    pub fn as_abi(&self) -> Weights {
        Weights {
            struct_size: size_of::<Weights>() as u64,
            n: self.n as u64,
            k: self.k as u64,
            data: self.data.as_ptr(),
            size: self.data.len() as u64,
            scale: self.scale,
            scale_format: match self.scales {
                Scales::F16 { .. } => abi::SCALE_F16,
                _ => abi::SCALE_F32,
            },
            group: self.scales.group() as u64,
            scales: match self.scales {
                Scales::None => std::ptr::null(),
                Scales::F32 { values, .. } => values.as_ptr().cast(),
                Scales::F16 { values, .. } => values.as_ptr().cast(),
            },
        }
    }

    /// # Safety
    /// `raw` is filled as [`Weights`] says, and its data outlives `'a`.
    unsafe fn from_abi(raw: &Weights) -> Self {
        // SAFETY: the caller's promise.
        let data = unsafe { std::slice::from_raw_parts(raw.data, raw.size as usize) };
        let (n, k, group) = (raw.n as usize, raw.k as usize, raw.group as usize);
        let count = scale_count(n, k, group).unwrap_or(0);
        let scales = if raw.scales.is_null() {
            Scales::None
        } else if raw.scale_format == abi::SCALE_F16 {
            // SAFETY: that many scales of this type, aligned (ABI); the caller promises the lifetime.
            Scales::F16 { group, values: unsafe { std::slice::from_raw_parts(raw.scales.cast(), count) } }
        } else {
            // SAFETY: as above.
            Scales::F32 { group, values: unsafe { std::slice::from_raw_parts(raw.scales.cast(), count) } }
        };
        Self { n, k, scale: raw.scale, data, scales }
    }
}

/// Quantised activations.
#[derive(Clone, Copy, Debug)]
pub struct ActivationsRef<'a> {
    m: usize,
    k: usize,
    stride: usize,
    q: &'a [i8],
    scale: &'a [f32],
    sum: &'a [i32],
    group: usize,
    group_scale: &'a [f32],
    group_sum: &'a [i32],
}

impl<'a> ActivationsRef<'a> {
    /// # Safety
    /// `raw` is filled as [`Activations`] says, and its buffers outlive `'a`.
    pub unsafe fn from_abi(raw: &Activations) -> Self {
        let (m, stride, group) = (raw.m as usize, raw.stride as usize, raw.group as usize);
        // Without them (a host of an older version), a row is one group.
        let (group_scale, group_sum) = match raw.group_scale.is_null() {
            true => (raw.scale, raw.sum),
            false => (raw.group_scale, raw.group_sum),
        };
        let count = m * groups(raw.k as usize, group);
        // SAFETY: m rows of stride bytes and the slack behind them are readable (ABI), as are m scales
        // and m sums, and as many of the groups; the caller promises the lifetime.
        unsafe {
            Self {
                m,
                k: raw.k as usize,
                stride,
                q: std::slice::from_raw_parts(raw.q, m * stride),
                scale: std::slice::from_raw_parts(raw.scale, m),
                sum: std::slice::from_raw_parts(raw.sum, m),
                group,
                group_scale: std::slice::from_raw_parts(group_scale, count),
                group_sum: std::slice::from_raw_parts(group_sum, count),
            }
        }
    }

    /// Rows.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Values a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes from one row to the next: `k` rounded up to a multiple of 64.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `m`, `k` values.
    pub fn row(&self, m: usize) -> &'a [i8] {
        &self.q[m * self.stride..][..self.k]
    }

    /// Row `m` with the zeros behind it, [`stride`](Self::stride) values, aligned to 64 bytes; another
    /// [`abi::ACTIVATION_SLACK`] bytes behind it may be read.
    pub fn padded_row(&self, m: usize) -> &'a [i8] {
        &self.q[m * self.stride..][..self.stride]
    }

    /// The rows `rows` as [`padded_row`](Self::padded_row) has them, one after the other.
    pub fn padded_rows(&self, rows: Range<usize>) -> &'a [i8] {
        &self.q[rows.start * self.stride..rows.end * self.stride]
    }

    /// Row `m`'s scale, absmax / 127.
    pub fn scale(&self, m: usize) -> f32 {
        self.scale[m]
    }

    /// Sum of row `m`'s values.
    pub fn sum(&self, m: usize) -> i32 {
        self.sum[m]
    }

    /// Values that share a scale; 0 for the whole row.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The scales of row `m`'s groups.
    pub fn group_scales(&self, m: usize) -> &'a [f32] {
        let count = groups(self.k, self.group);
        &self.group_scale[m * count..][..count]
    }

    /// The sums of row `m`'s groups.
    pub fn group_sums(&self, m: usize) -> &'a [i32] {
        let count = groups(self.k, self.group);
        &self.group_sum[m * count..][..count]
    }
}

/// The part of the output that one call computes.
#[derive(Debug)]
pub struct OutputTile {
    y: *mut f32,
    stride: usize,
    n: Range<usize>,
    m: Range<usize>,
}

impl OutputTile {
    /// # Safety
    /// The elements y[m * stride + n] with (m, n) in the tile are writable, and nobody else accesses
    /// them while this value lives.
    pub unsafe fn from_abi(output: &Output, tile: &Tile) -> Self {
        Self {
            y: output.y,
            stride: output.stride as usize,
            n: tile.n0 as usize..tile.n1 as usize,
            m: tile.m0 as usize..tile.m1 as usize,
        }
    }

    /// Output features to compute.
    pub fn rows_n(&self) -> Range<usize> {
        self.n.clone()
    }

    /// Activation rows to compute.
    pub fn rows_m(&self) -> Range<usize> {
        self.m.clone()
    }

    /// The place of y[m, n]; y[m, n..rows_n().end] follows it.
    ///
    /// # Panics
    /// If (m, n) is outside the tile.
    pub fn at(&mut self, m: usize, n: usize) -> *mut f32 {
        assert!(self.m.contains(&m) && self.n.contains(&n), "({m}, {n}) is outside the tile");
        // SAFETY: inside the tile, which `from_abi`'s caller promised to be within the output.
        unsafe { self.y.add(m * self.stride + n) }
    }

    /// Stores y[m, n] from the exact integer sum.
    ///
    /// # Panics
    /// If (m, n) is outside the tile.
    pub fn set(&mut self, m: usize, n: usize, sum: i32, w: &WeightsRef, x: &ActivationsRef) {
        let place = self.at(m, n);
        // SAFETY: `at` checked that the element belongs to the tile, which nobody else accesses.
        unsafe { *place = sum as f32 * (w.scale() * x.scale(m)) }
    }
}

/// What both kinds of kernels do on the host.
trait Packing {
    const ROW_GRANULE: usize;
    fn supports(signature: &Signature) -> bool;
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
    let private = layout.is_some();
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
    }
}

/// The descriptor of a kernel type. Used by [`plugin!`](crate::plugin).
pub const fn kernel<K: TernaryKernel>() -> Kernel {
    let private = K::LAYOUT.is_some();
    Kernel {
        features: K::FEATURES.as_ptr(),
        operation: K::OPERATION,
        weight_alignment: if private { K::WEIGHT_ALIGNMENT as u64 } else { abi::CANONICAL_ALIGNMENT as u64 },
        workspace_size: Some(workspace_size::<K>),
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
        target: match K::LANGUAGE {
            Language::Wgsl => abi::TARGET_WGSL,
            Language::Cuda => abi::TARGET_CUDA,
            Language::CubeCl => abi::TARGET_CUBECL,
        },
        gpu: OnGpu::<K>::GPU,
        ..descriptor::<OnGpu<K>>(K::NAME, K::LAYOUT)
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
    catch_unwind(|| P::supports(&signature)).unwrap_or(false).into()
}

fn private_size<P: Packing>(n: usize, k: usize) -> Option<usize> {
    n.div_ceil(P::ROW_GRANULE).checked_mul(P::granule_bytes(k))
}

unsafe extern "C" fn packed_size<P: Packing>(n: u64, k: u64) -> u64 {
    catch_unwind(|| private_size::<P>(n as usize, k as usize)).ok().flatten().unwrap_or(0) as u64
}

unsafe extern "C" fn pack<P: Packing>(
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

unsafe extern "C" fn unpack<P: Packing>(
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
        let (raw, weights, mut tile) =
            unsafe { (read(x), WeightsRef::from_abi(&read(weights)), OutputTile::from_abi(&*y, &*tile)) };
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

/// Exports a plugin's descriptor from a `cdylib`: the one symbol that the host looks for.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:path) => {
        /// The entry point that bitnet-burn looks for.
        // SAFETY: the symbol is this ABI's own name, and a cdylib exports it once.
        #[unsafe(no_mangle)]
        pub extern "C" fn bitnet_plugin() -> *const $crate::abi::Plugin {
            &raw const $plugin
        }
    };
}
