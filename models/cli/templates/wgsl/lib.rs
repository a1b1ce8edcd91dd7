//! A plugin whose kernels run on GPUs: source text in WGSL and in CUDA C++, which bitnet-burn compiles and launches on the
//! device that the model is on. Copy this folder, change it, and `cargo build --release`.
//!
//! `src/matmul.wgsl` is the text, for one row of activations (a token) and, with the same packing, for eight.

use std::ffi::CStr;
use std::ops::Range;

use bitnet_burn_plugin::canonical::{self, ZERO_BYTE};
use bitnet_burn_plugin::sdk::*;

/// Output features that are packed together, and that a workgroup computes.
const FEATURES: usize = 32;
/// What one thread reads at once: half a canonical block.
const PIECE: usize = 16;

/// Pieces of 32 canonical rows, side by side: the first pieces of all 32 rows, then the second ones. Threads that are
/// side by side read memory that is.
fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
    let row_bytes = canonical::row_bytes(canonical.k());
    let granules = out.chunks_exact_mut(FEATURES * row_bytes);
    for (granule, first) in granules.zip(rows.clone().step_by(FEATURES)) {
        for (i, piece) in granule.chunks_exact_mut(PIECE).enumerate() {
            let (row, at) = (first + i % FEATURES, i / FEATURES * PIECE);
            if row < rows.end {
                piece.copy_from_slice(&canonical.canonical_row(row).0[at..at + PIECE]);
            } else {
                // Behind the last row: weights of zero.
                piece.fill(ZERO_BYTE);
            }
        }
    }
    Ok(())
}

/// The inverse of [`pack`].
fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
    let row_bytes = canonical::row_bytes(packed.k());
    for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
        let granule = &packed.data()[row / FEATURES * FEATURES * row_bytes..][..FEATURES * row_bytes];
        for (i, piece) in out.chunks_exact_mut(PIECE).enumerate() {
            piece.copy_from_slice(&granule[(i * FEATURES + row % FEATURES) * PIECE..][..PIECE]);
        }
    }
    Ok(())
}

/// A kernel over the packing above: its name, its language, and its text with so many rows.
macro_rules! kernel {
    ($(#[$doc:meta])* $type:ident, $name:literal, $language:ident, $rows:literal, $source:expr) => {
        $(#[$doc])*
        struct $type;

        impl GpuKernel for $type {
            const NAME: &'static CStr = $name;
            const LANGUAGE: Language = Language::$language;
            const SOURCE: &'static CStr = source($source);
            const ENTRY: &'static CStr = c"matmul";
            const WORKGROUP: [u32; 3] = [FEATURES as u32, 8, 1];
            const TILE: [u32; 2] = [FEATURES as u32, $rows];
            const LAYOUT: Option<&'static CStr> = Some(c"interleaved32");
            const ROW_GRANULE: usize = FEATURES;

            fn granule_bytes(k: usize) -> usize {
                FEATURES * canonical::row_bytes(k)
            }

            fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
                pack(canonical, rows, out)
            }

            fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
                unpack(packed, rows, out)
            }
        }
    };
}

macro_rules! wgsl {
    ($rows:literal) => {
        concat!("const ROWS = ", $rows, "u;\n", include_str!("matmul.wgsl"), "\0")
    };
}

macro_rules! cuda {
    ($rows:literal) => {
        concat!("#define ROWS ", $rows, "\n", include_str!("matmul.cu"), "\0")
    };
}

kernel!(
    /// One row at a time: decode.
    Gemv, c"gemv", Wgsl, 1, wgsl!(1)
);
kernel!(
    /// Eight rows over the same weights: prompts.
    Gemm, c"gemm", Wgsl, 8, wgsl!(8)
);
kernel!(
    /// [`Gemv`] in CUDA C++.
    CudaGemv, c"cuda-gemv", Cuda, 1, cuda!(1)
);
kernel!(
    /// [`Gemm`] in CUDA C++.
    CudaGemm, c"cuda-gemm", Cuda, 8, cuda!(8)
);

bitnet_burn_plugin::plugin! {
    /// What the host reads.
    pub static PLUGIN = {
        name: c"example-gpu",
        version: c"0.1.0",
        kernels: [],
        gpu_kernels: [Gemv, Gemm, CudaGemv, CudaGemm],
    };
}
bitnet_burn_plugin::export_plugin!(PLUGIN);
