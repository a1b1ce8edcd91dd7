//! GPU kernels for ternary matrix multiplication, written in CubeCL: one source for CUDA, ROCm, Metal, Vulkan and
//! WebGPU.
//!
//! They are kernels like any others: the host's manager compares, measures and chooses them (`PLUGIN`), and hands them
//! the buffers that [`bitnet_burn_plugin::abi::Gpu`] describes. Only their launch is not text but a function of the
//! host's own CubeCL (`launch`). A library that is loaded from a file can't have that; the example `cube_plugin` is such a
//! library, with the same kernels as WGSL and CUDA C++ (feature `lower`).
//!
//! Beside them, as functions that the host calls without choosing: RMSNorm, quantisation and gated activation
//! (`rows`), attention over a KV cache on the device (`attention`), and the embedding and output projection in the
//! formats of model files (`dense`).
//!
//! The ternary kernels read the canonical layout, so that weights are uploaded as they are and every kernel, and the default
//! body in Burn's operations, can take over from every other one. Sums are exact i32.

#![cfg(feature = "kernels")]

pub mod attention;
mod bits;
pub mod dense;
mod kernels;
#[cfg(feature = "lower")]
pub mod lower;
mod matrix;
pub mod rows;

use std::ffi::CStr;
#[cfg(feature = "lower")]
use std::ffi::CString;

#[cfg(feature = "lower")]
use bitnet_burn_plugin::abi::Kernel;
use bitnet_burn_plugin::abi::Signature;
#[cfg(feature = "lower")]
use bitnet_burn_plugin::sdk::gpu_kernel_in;
use bitnet_burn_plugin::sdk::{GpuKernel, Language, source};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// The buffers of a launch, in the order of [`bitnet_burn_plugin::abi::Gpu`].
#[derive(Clone, Debug)]
pub struct Buffers {
    /// Canonical rows, or a kernel's own packing.
    pub weights: Handle,
    /// One f32.
    pub scale: Handle,
    /// Four int8 a word.
    pub x: Handle,
    /// Scale and sum of each row.
    pub rows: Handle,
    /// Eight u32.
    pub params: Handle,
    /// f32.
    pub y: Handle,
}

/// A function in WGSL and in CUDA C++.
#[cfg(feature = "lower")]
pub type Texts = (Result<lower::Text, lower::LowerError>, Result<lower::Text, lower::LowerError>);

/// A kernel as text.
#[cfg(feature = "lower")]
#[derive(Debug)]
pub struct Lowered {
    /// Its name here.
    pub name: &'static str,
    /// Its entry point here. (A text has its own.)
    pub entry: &'static str,
    /// The texts.
    pub texts: Texts,
    /// Its descriptor with another name, language, text and entry point.
    descriptor: fn(CString, Language, CString, CString) -> Kernel,
}

#[cfg(feature = "lower")]
impl Lowered {
    /// The kernels of a loadable plugin, `NAME-wgsl` and `NAME-cuda`, as far as there are texts.
    pub fn descriptors(&self) -> Vec<Kernel> {
        let texts = [("wgsl", Language::Wgsl, &self.texts.0), ("cuda", Language::Cuda, &self.texts.1)];
        let of = |text: &str| CString::new(text).ok();
        let kernel = |(suffix, language, text): (&str, Language, &Result<lower::Text, lower::LowerError>)| {
            let text = text.as_ref().ok()?;
            let name = of(&format!("{}-{suffix}", self.name))?;
            Some((self.descriptor)(name, language, of(&text.source)?, of(&text.entry)?))
        };
        texts.into_iter().filter_map(kernel).collect()
    }
}

/// Threads along K in [`kernels::gemv`], and ranges of output features side by side.
const GEMV_THREADS: [u32; 2] = [32, 8];
/// Threads along the output features and along the rows in [`kernels::gemm`].
const GEMM_THREADS: [u32; 2] = [16, 16];
/// Beyond so many rows, reading the weights again for each is hopeless.
const GEMV_ROWS: u64 = 16;

/// Declares a plugin's kernels, and how their entry points are launched.
macro_rules! plugin {
    ($(#[$plugin_doc:meta])* $plugin:ident = $plugin_name:literal, $launch:ident, $(#[$texts_doc:meta])* $texts:ident by $wgsl:path;
     $($(#[$doc:meta])* $type:ident = $name:literal, $entry:literal:
       $module:ident::$function:ident::$kernel:ident($a:literal, $b:literal)
       in [$threads_x:expr, $threads_y:expr], tile [$tile_n:expr, $tile_m:expr], needs $features:literal,
       if $supports:expr;)+) => {
        $(
            $(#[$doc])*
            struct $type;

            impl GpuKernel for $type {
                const NAME: &'static CStr = $name;
                const LANGUAGE: Language = Language::CubeCl;
                const SOURCE: &'static CStr = c"a CubeCL function of bitnet-burn-cube";
                const ENTRY: &'static CStr = $entry;
                const WORKGROUP: [u32; 3] = [$threads_x, $threads_y, 1];
                const TILE: [u32; 2] = [$tile_n, $tile_m];
                const FEATURES: &'static CStr = $features;

                fn supports(signature: &Signature) -> bool {
                    let supports: fn(&Signature) -> bool = $supports;
                    supports(signature)
                }
            }
        )+

        bitnet_burn_plugin::plugin! {
            $(#[$plugin_doc])*
            pub static $plugin = {
                name: $plugin_name,
                version: source(concat!(env!("CARGO_PKG_VERSION"), "\0")),
                kernels: [],
                gpu_kernels: [$($type),+],
            };
        }

        $(#[$texts_doc])*
        #[cfg(feature = "lower")]
        pub fn $texts() -> Vec<Lowered> {
            vec![$({
                let kernel = || {
                    let (settings, device, target) = lower::offline([$threads_x, $threads_y, 1]);
                    let [weights, scale, x, rows, params, y] = lower::buffers();
                    $module::$function::$kernel::new(
                        settings, device, target, weights, scale, x, rows, params, y, $a, $b,
                    )
                };
                Lowered {
                    name: $name.to_str().expect("ASCII"),
                    entry: $entry.to_str().expect("ASCII"),
                    texts: ($wgsl(&kernel()), lower::cuda(&kernel())),
                    descriptor: gpu_kernel_in::<$type>,
                }
            }),+]
        }

        /// Launches the kernel of this entry point, if this plugin has it.
        ///
        /// # Safety
        /// As for [`launch`].
        unsafe fn $launch(
            client: &Client,
            entry: &str,
            (m, n, k): (usize, usize, usize),
            buffers: &Buffers,
        ) -> bool {
            let words = k.div_ceil(128) * 8;
            let argument = |handle: &Handle, elements: usize| {
                // SAFETY: the caller's promise.
                unsafe { BufferArg::from_raw_parts(handle.clone(), elements) }
            };
            $(
                if entry.as_bytes() == $entry.to_bytes() {
                    let [tile_n, tile_m] = <$type as GpuKernel>::TILE;
                    let count = |size: usize, tile: u32| size.div_ceil(tile as usize) as u32;
                    // SAFETY: the caller's promise; the kernels read and write nothing beyond these sizes.
                    unsafe {
                        $module::$function::launch_unchecked(
                            client,
                            CubeCount::Static(count(n, tile_n), count(m, tile_m), 1),
                            CubeDim::new_2d($threads_x, $threads_y),
                            argument(&buffers.weights, n * words),
                            argument(&buffers.scale, 1),
                            argument(&buffers.x, m * words * 4),
                            argument(&buffers.rows, m * 2),
                            argument(&buffers.params, 8),
                            argument(&buffers.y, m * n),
                            $a,
                            $b,
                        );
                    }
                    return true;
                }
            )+
            false
        }
    };
}

/// Launches the kernel of this entry point for activations [m, k] and weights [n, k]. What goes wrong, shows
/// when the output is read.
///
/// # Panics
/// If no kernel of [`PLUGIN`] or [`MATRIX_UNITS`] has the entry point.
///
/// # Safety
/// The buffers hold what they must for [`bitnet_burn_plugin::abi::Gpu`] and these sizes, and the kernel supports them.
pub unsafe fn launch(client: &Client, entry: &str, shape: (usize, usize, usize), buffers: &Buffers) {
    // SAFETY: the caller's promise.
    let launched =
        unsafe { launch_own(client, entry, shape, buffers) || launch_units(client, entry, shape, buffers) };
    assert!(launched, "no kernel has the entry point {entry}");
}

plugin! {
    /// The kernels that any GPU can run.
    PLUGIN = c"cube", launch_own,
    /// The kernels of [`PLUGIN`] by entry point, in WGSL and in CUDA C++.
    texts by lower::wgsl;
    /// An output feature a group of threads.
    Gemv1 = c"gemv-1", c"gemv_1": kernels::gemv::Gemv(1, 8) in [GEMV_THREADS[0], GEMV_THREADS[1]], tile [8, 1], needs c"",
        if |signature| signature.m <= GEMV_ROWS;
    /// Two, for the same activations.
    Gemv2 = c"gemv-2", c"gemv_2": kernels::gemv::Gemv(2, 8) in [GEMV_THREADS[0], GEMV_THREADS[1]], tile [16, 1], needs c"",
        if |signature| signature.m <= GEMV_ROWS;
    /// Four.
    Gemv4 = c"gemv-4", c"gemv_4": kernels::gemv::Gemv(4, 8) in [GEMV_THREADS[0], GEMV_THREADS[1]], tile [32, 1], needs c"",
        if |signature| signature.m <= GEMV_ROWS;
    /// 16 bytes a thread and read.
    Wide1 = c"gemv-wide-1", c"gemv_wide_1": kernels::gemv_wide::GemvWide(1, false) in [GEMV_THREADS[0], GEMV_THREADS[1]],
        tile [32, 1], needs c"", if |signature| signature.m <= GEMV_ROWS;
    /// The same, two features a group of threads.
    Wide2 = c"gemv-wide-2", c"gemv_wide_2": kernels::gemv_wide::GemvWide(2, false) in [GEMV_THREADS[0], GEMV_THREADS[1]],
        tile [64, 1], needs c"", if |signature| signature.m <= GEMV_ROWS;
    /// The same, without shared memory.
    Plane1 = c"gemv-plane-1", c"gemv_plane_1": kernels::gemv_wide::GemvWide(1, true) in [GEMV_THREADS[0], GEMV_THREADS[1]],
        tile [32, 1], needs c"subgroups", if |signature| signature.m <= GEMV_ROWS;
    /// The same, two features a group of threads.
    Plane2 = c"gemv-plane-2", c"gemv_plane_2": kernels::gemv_wide::GemvWide(2, true) in [GEMV_THREADS[0], GEMV_THREADS[1]],
        tile [64, 1], needs c"subgroups", if |signature| signature.m <= GEMV_ROWS;
    /// Few rows.
    Gemm16 = c"gemm-16x64", c"gemm_16x64": kernels::gemm::Gemm(1, 4) in [GEMM_THREADS[0], GEMM_THREADS[1]], tile [64, 16], needs c"",
        if |signature| signature.m > 1;
    /// Prompts.
    Gemm64 = c"gemm-64x64", c"gemm_64x64": kernels::gemm::Gemm(4, 4) in [GEMM_THREADS[0], GEMM_THREADS[1]], tile [64, 64], needs c"",
        if |signature| signature.m > GEMV_ROWS;
}

plugin! {
    /// Kernels over matrix units, where a device says that it has them. A plugin of their own: they were compiled, and not
    /// yet run on such a device, and what is found to be wrong takes its plugin with it.
    MATRIX_UNITS = c"cube-matrix-units", launch_units,
    /// The kernels of [`MATRIX_UNITS`] by entry point, in CUDA C++ alone.
    matrix_unit_texts by lower::no_wgsl;
    /// int8.
    Int8x64 = c"gemm-i8-64x64", c"gemm_i8_64x64": matrix::gemm_i8::GemmI8(1, 4) in [32, 4], tile [64, 64],
        needs c"matrix-i8", if |signature| signature.m > GEMV_ROWS;
    /// Twice as many rows.
    Int8x128 = c"gemm-i8-128x64", c"gemm_i8_128x64": matrix::gemm_i8::GemmI8(2, 4) in [32, 4], tile [64, 128],
        needs c"matrix-i8", if |signature| signature.m > 64;
    /// f16.
    F16x64 = c"gemm-f16-64x64", c"gemm_f16_64x64": matrix::gemm_f16::GemmF16(1, 4) in [32, 4], tile [64, 64],
        needs c"matrix-f16", if |signature| signature.m > GEMV_ROWS && signature.k <= matrix::F16_EXACT;
    /// Twice as many rows.
    F16x128 = c"gemm-f16-128x64", c"gemm_f16_128x64": matrix::gemm_f16::GemmF16(2, 4) in [32, 4], tile [64, 128],
        needs c"matrix-f16", if |signature| signature.m > 64 && signature.k <= matrix::F16_EXACT;
}
