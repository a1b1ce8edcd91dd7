//! The contract between bitnet-burn and the kernels it loads.
//!
//! A *kernel* multiplies int8 activations by ternary weights. A *plugin* is a library that brings
//! kernels; the ones built into bitnet-burn and the ones that third parties ship speak the same C
//! ABI, which this crate defines, and are checked and measured by the same manager.
//!
//! * [`abi`]: the `#[repr(C)]` types. `include/bitnet_plugin.h` is the same contract for C.
//! * [`canonical`]: the canonical weight layout (I2_S rows) that every kernel packs from.
//! * [`layouts`]: the packings that kernels of all plugins may share.
//! * [`features`]: the names of CPU features, and which of them this machine has.
//! * [`sdk`]: a safe trait to implement, and the macros that turn it into a plugin:
//!
//! ```
//! use bitnet_burn_plugin::sdk::*;
//!
//! /// Reads the canonical layout, one weight at a time.
//! struct Plain;
//!
//! impl TernaryKernel for Plain {
//!     const NAME: &'static std::ffi::CStr = c"plain";
//!
//!     fn run(w: &WeightsRef, x: &ActivationsRef, _workspace: &[u8], y: &mut OutputTile) -> KernelResult {
//!         for m in y.rows_m() {
//!             for n in y.rows_n() {
//!                 let codes = w.canonical_row(n);
//!                 let dot = (0..w.k()).map(|k| i32::from(codes.weight(k)) * i32::from(x.row(m)[k])).sum();
//!                 y.set(m, n, dot, w, x);
//!             }
//!         }
//!         Ok(())
//!     }
//! }
//!
//! bitnet_burn_plugin::plugin! {
//!     /// The descriptor; `export_plugin!(PLUGIN)` in a `cdylib` makes it loadable.
//!     pub static PLUGIN = { name: c"example", version: c"0.1.0", kernels: [Plain] };
//! }
//! assert_eq!(PLUGIN.kernel_count, 1);
//! ```
//!
//! The arithmetic that every kernel must reproduce, bit for bit: with `q[m, k]` the int8
//! activations, `c[n, k]` in {-1, 0, 1} the weights, `s` the weight scale and `a[m]` the row scale,
//!
//! ```text
//! y[m, n] = (f32)(sum_k q[m, k] * c[n, k]) * (s * a[m])
//! ```
//!
//! with an exact i32 sum, and two separate f32 products (no fused multiply-add). Weights with many scales are
//! [another operation](abi::OPERATION_SCALED_TERNARY_MATMUL).

pub mod abi;
pub mod canonical;
pub mod features;
pub mod layouts;
pub mod sdk;

/// The header for C: `bitnet_plugin.h`.
pub const HEADER: &str = include_str!("../include/bitnet_plugin.h");

/// This crate's sources by their paths, for projects that contain a copy of it.
pub const SOURCES: [(&str, &str); 10] = [
    ("src/lib.rs", include_str!("lib.rs")),
    ("src/abi.rs", include_str!("abi.rs")),
    ("src/canonical.rs", include_str!("canonical.rs")),
    ("src/features.rs", include_str!("features.rs")),
    ("src/layouts.rs", include_str!("layouts.rs")),
    ("src/layouts/t2x32.rs", include_str!("layouts/t2x32.rs")),
    ("src/layouts/t5x32.rs", include_str!("layouts/t5x32.rs")),
    ("src/sdk.rs", include_str!("sdk.rs")),
    ("src/sdk/host.rs", include_str!("sdk/host.rs")),
    ("src/sdk/operands.rs", include_str!("sdk/operands.rs")),
];

// The example of the README runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
