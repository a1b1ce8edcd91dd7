//! The ternary kernels of this package that any GPU can run, as a library that a program loads at run time. CubeCL is in the library: it writes the
//! kernels as WGSL and CUDA C++ when the library is loaded, so that the program needs no CubeCL of the same version.
//!
//! ```sh
//! cargo build --release -p bitnet-burn-cube --features lower --example cube_plugin
//! bitnet plugins verify target/release/examples/libcube_plugin.so
//! ```

use bitnet_burn_cube::texts;
use bitnet_burn_plugin::abi::Plugin;
use bitnet_burn_plugin::sdk::{HostRef, build_plugin, source};

bitnet_burn_plugin::plugin! {
    /// For hosts of ABI 1.0 to 1.2, which ask for a descriptor that needs no work.
    pub static NO_KERNELS = { name: c"cubecl", version: VERSION, kernels: [] };
}

const VERSION: &std::ffi::CStr = source(concat!(env!("CARGO_PKG_VERSION"), "\0"));

fn build(_: HostRef) -> &'static Plugin {
    build_plugin(c"cubecl", VERSION, texts().iter().flat_map(|kernel| kernel.descriptors()).collect())
}

bitnet_burn_plugin::export_plugin!(NO_KERNELS, for_host: build);
