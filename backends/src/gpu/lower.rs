//! From a `#[cube]` function to the text of a plugin's kernel.
//!
//! A plugin can't hand a CubeCL kernel over, only text; this makes the text, without a GPU, where a plugin is built. The
//! function's arguments are the buffers of [`bitnet_burn_plugin::abi::Gpu`] in their order, as slices:
//!
//! ```no_run
//! use bitnet_burn_backends::gpu::lower;
//! use burn_cubecl::cubecl;
//! use cubecl::prelude::*;
//!
//! #[cube(launch_unchecked)]
//! fn mine(weights: &[u32], scale: &[f32], x: &[u32], rows: &[u32], params: &[u32], y: &mut [f32]) {
//!     // ... y[...] = ...
//! }
//!
//! let text = lower::wgsl([64, 1, 1], |settings, device, target, buffer| {
//!     mine::Mine::new(settings, device, target, buffer(), buffer(), buffer(), buffer(), buffer(), buffer())
//! })?;
//! std::fs::write("src/mine.wgsl", text.source)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The kernel may use no scalars and no lengths of slices: the host binds nothing for them.

use std::sync::Arc;

use burn_cubecl::cubecl;
use cubecl::ir::{
    DeviceIdentity, DeviceProperties, HardwareProperties, MemoryDeviceProperties, TargetProperties,
};
use cubecl::prelude::*;
use cubecl::wgpu::WgslCompiler;
use cubecl::{Compiler as _, CubeKernel};

/// Name of the entry point in texts that [`wgsl`] makes.
pub const ENTRY: &str = "lowered";

/// A text, and what has to be said beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lowered {
    /// WGSL; its entry point is [`ENTRY`].
    pub source: String,
    /// Threads of a workgroup, by dimension.
    pub workgroup: [u32; 3],
}

/// A kernel that can't be lowered.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    /// CubeCL does not compile it.
    #[error("the kernel does not compile to WGSL: {0}")]
    Compile(String),
    /// It does not use the buffers that a plugin's kernel gets.
    #[error(
        "the kernel uses {found} buffers, and must use the 6 that a plugin's kernel gets: weights, scale, \
         activations, rows, parameters, output"
    )]
    Buffers {
        /// How many it uses.
        found: usize,
    },
    /// It needs what the host does not bind.
    #[error(
        "the kernel uses scalars or the lengths of slices, which the host does not bind; the parameters hold sizes"
    )]
    Info,
}

/// Lowers a kernel that `kernel` makes from its settings, a device's properties, and one compilation argument for each
/// buffer.
///
/// # Errors
/// If it does not compile, or needs other bindings than a plugin's kernel gets.
pub fn wgsl<K: CubeKernel>(
    workgroup: [u32; 3],
    kernel: impl FnOnce(
        KernelSettings,
        Arc<DeviceProperties>,
        Arc<TargetProperties>,
        &dyn Fn() -> BufferCompilationArg,
    ) -> K,
) -> Result<Lowered, LowerError> {
    let [x, y, z] = workgroup;
    let settings =
        KernelSettings::new(CubeDim::new_3d(x, y, z).0, ExecutionMode::Unchecked, AddressType::U32);
    let kernel =
        kernel(settings, Arc::new(portable_device()), Arc::new(TargetProperties::default()), &|| {
            BufferCompilationArg { inplace: None }
        });
    let compile = |error: cubecl::CompilationError| LowerError::Compile(error.to_string());
    let definition = cubecl::define_kernel(&kernel).map_err(compile)?;
    let shader = WgslCompiler.compile(definition, &Default::default()).map_err(compile)?;
    let source = finish(&shader.to_string())?;
    Ok(Lowered { source, workgroup })
}

/// What every WebGPU device has.
fn portable_device() -> DeviceProperties {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 1,
        plane_size_max: 128,
        max_bindings: 8,
        max_shared_memory_size: 16384,
        max_cube_count: (65535, 65535, 65535),
        max_units_per_cube: 256,
        max_cube_dim: (256, 256, 64),
        num_streaming_multiprocessors: None,
        num_cpu_cores: None,
        last_level_cache_size: None,
        num_tensor_cores: None,
        min_tensor_cores_dim: None,
        max_vector_size: 4,
        cube_mma_reserved_shared_memory: 0,
    };
    DeviceProperties::new(
        Default::default(),
        MemoryDeviceProperties::new(128 << 20, 256),
        hardware,
        cubecl::profile::TimingMethod::System,
        DeviceIdentity { name: "WebGPU".into(), fingerprint: "webgpu".into(), physical: None },
    )
}

/// Gives the entry point its name, and the buffers the access that the host's have; checks what is bound.
fn finish(source: &str) -> Result<String, LowerError> {
    let text = source.replace("var<storage, read>", "var<storage, read_write>");
    let entry = text.split("@compute").nth(1).and_then(|rest| rest.split("fn ").nth(1)).map(first_word);
    let entry = entry.filter(|name| !name.is_empty());
    let entry = entry.ok_or_else(|| LowerError::Compile("there is no entry point in it".into()))?;
    let mut buffers = 0;
    for declaration in text.split("@binding(").skip(1) {
        let index = first_word(declaration).parse::<usize>().unwrap_or(usize::MAX);
        let name =
            declaration.split("var<").nth(1).and_then(|rest| rest.split_once('>')).map(|(_, rest)| rest);
        let used = name.map(|name| first_word(name.trim_start())).is_some_and(|name| occurs(&text, name) > 1);
        match index {
            // What is not used is missing from the layout that the device makes.
            0..6 if used => buffers += 1,
            0..6 => {}
            _ if used => return Err(LowerError::Info),
            _ => {}
        }
    }
    if buffers != 6 {
        return Err(LowerError::Buffers { found: buffers });
    }
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    Ok(lines.join("\n").trim().replace(entry, ENTRY) + "\n")
}

fn is_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn first_word(text: &str) -> &str {
    text.split(|c| !is_part(c)).next().unwrap_or_default()
}

fn occurs(text: &str, name: &str) -> usize {
    text.split(|c| !is_part(c)).filter(|word| *word == name).count()
}
