//! Kernels for ternary matrix multiplication, as a plugin.
//!
//! | kernels | weights | idea |
//! | --- | --- | --- |
//! | `i2s-*` | canonical (I2_S) rows, read where they lie | GEMV one weight row after the other, GEMM in register blocks of up to 4 x 4 rows |
//! | `t2-*` | the layout `t2x32` ([`tile`]) | 32 weight rows at a time, one per 32-bit lane: no horizontal sums, one sequential stream |
//! | `t5-*` | the layout `t5x32` ([`trits`]) | the same with five weights a byte, where a byte permutation decodes them |
//! | `t2-*-scaled`, `i2s-scalar-scaled` | the same | a scale for each row or group of weights, and of activations |
//! | `tl1-*`, `tl2-*` | the private packings `tl1x32` and `tl2x32` (`lut`) | no products: two or three weights at a time are looked up in tables of the activations' sums |
//!
//! All but the last multiply *unsigned* codes c = w + 1 in {0, 1, 2} by signed activations, which is what the
//! byte dot-product instructions want, and subtract the activations' sum: dot = sum(c * x) - sum(x).
//!
//! `generic` holds the loops over tiles, written once; `arch` says, per instruction set, how one block is multiplied;
//! [`tile`] and [`trits`] are public layouts, which other plugins may read, and `lut` is a private packing.

pub(crate) mod arch;
mod generic;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
pub mod lut;
pub mod trits;

pub use bitnet_burn_plugin::layouts::t2x32 as tile;

use std::ffi::CStr;

/// The crate's version, as the descriptor wants it.
const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => panic!("a version contains no NUL"),
};

#[cfg(target_arch = "x86_64")]
bitnet_burn_plugin::plugin! {
    /// The descriptor of this plugin.
    pub static PLUGIN = {
        name: c"cpu",
        version: VERSION,
        kernels: [
            arch::x86_64::amx::Tiles,
            arch::x86_64::amx::Trits,
            arch::x86_64::avx512vbmi::Trits,
            arch::x86_64::avx512vnni::Tiles<false>,
            arch::x86_64::avx512vnni::Rows,
            arch::x86_64::avxvnni::Tiles<false>,
            arch::x86_64::avxvnni::Rows,
            arch::x86_64::avx2::Tiles<false>,
            arch::x86_64::avx2::Rows,
            arch::x86_64::avx2lut::Tables<2>,
            arch::x86_64::avx2lut::Tables<3>,
            arch::scalar::Tiles<false>,
            arch::scalar::Rows,
            arch::x86_64::avx512vnni::Tiles<true>,
            arch::x86_64::avxvnni::Tiles<true>,
            arch::x86_64::avx2::Tiles<true>,
            arch::scalar::Tiles<true>,
            arch::scalar::ScaledRows,
        ],
    };
}

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
bitnet_burn_plugin::plugin! {
    /// The descriptor of this plugin.
    pub static PLUGIN = {
        name: c"cpu",
        version: VERSION,
        kernels: [
            arch::aarch64::i8mm::Tiles<false>,
            arch::aarch64::dotprod::Tiles<false>,
            arch::aarch64::dotprod::Rows,
            arch::aarch64::neon::Tiles<false>,
            arch::aarch64::neon::Rows,
            arch::aarch64::neonlut::Tables<2>,
            arch::aarch64::neonlut::Tables<3>,
            arch::scalar::Tiles<false>,
            arch::scalar::Rows,
            arch::aarch64::i8mm::Tiles<true>,
            arch::aarch64::dotprod::Tiles<true>,
            arch::aarch64::neon::Tiles<true>,
            arch::scalar::Tiles<true>,
            arch::scalar::ScaledRows,
        ],
    };
}

#[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little"))))]
bitnet_burn_plugin::plugin! {
    /// The descriptor of this plugin.
    pub static PLUGIN = {
        name: c"cpu",
        version: VERSION,
        kernels: [arch::scalar::Tiles<false>, arch::scalar::Rows, arch::scalar::Tiles<true>, arch::scalar::ScaledRows],
    };
}
