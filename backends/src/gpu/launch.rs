//! Launching a kernel: one of CubeCL's own, or a text, which CubeCL takes in place of what it would have compiled.

use burn_cubecl::cubecl;
use cubecl::client::Client;
use cubecl::ir::attributes::BufferIOAttr;
use cubecl::ir::metadata::Info;
use cubecl::prelude::*;
use cubecl::server::KernelArguments;
use cubecl::{CubeKernel, PrecompiledSource};

pub(super) use bitnet_burn_cube::Buffers;
use bitnet_burn_manager::plugin::{GpuSource, Kernel, Target};

/// The language that a client's compiler takes as text, if it takes any.
pub(super) fn target(client: &Client) -> Option<Target> {
    match client.name() {
        "wgpu<wgsl>" => Some(Target::Wgsl),
        "cuda" => Some(Target::Cuda),
        _ => None,
    }
}

/// A kernel of a plugin, as CubeCL takes it.
struct TextKernel {
    language: &'static str,
    source: GpuSource,
}

impl KernelMetadata for TextKernel {
    /// Covers the text: every cache of compiled kernels is keyed by it.
    fn id(&self) -> KernelId {
        let GpuSource { text, entry, workgroup, .. } = &self.source;
        KernelId::new::<Self>().cube_dim(dim(*workgroup).0).info((self.language, text.clone(), entry.clone()))
    }

    fn address_type(&self) -> cubecl::ir::ElemType {
        cubecl::ir::UIntKind::U32.into()
    }
}

fn dim([x, y, z]: [u32; 3]) -> CubeDim {
    CubeDim::new_3d(x, y, z)
}

impl CubeKernel for TextKernel {
    fn define(&self) -> KernelDefinition {
        let dim = dim(self.source.workgroup);
        let settings = KernelSettings::new(dim.0, ExecutionMode::Unchecked, AddressType::U32);
        KernelDefinition { body: Scope::root(settings.clone()), settings, info: Info::default() }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        Some(PrecompiledSource {
            source: self.source.text.clone(),
            entrypoint_name: self.source.entry.clone(),
            lang: self.language,
        })
    }
}

/// Launches a kernel for an [m, n] output over k. What goes wrong, shows when the output is read.
///
/// # Safety
/// The buffers hold what they must for these sizes ([`bitnet_burn_plugin::abi::Gpu`]).
pub(super) unsafe fn launch(
    client: &Client,
    kernel: &Kernel,
    (m, n, k): (usize, usize, usize),
    buffers: Buffers,
) {
    let source = kernel.gpu().expect("a kernel for a GPU has a text, or an entry point");
    let language = match kernel.target() {
        Target::CubeCl => {
            // SAFETY: the caller's promise; the manager offers what supports the sizes.
            return unsafe { bitnet_burn_cube::launch(client, &source.entry, (m, n, k), &buffers) };
        }
        Target::Cuda => "cuda",
        _ => "wgsl",
    };
    let [x, y, z] = source.grid(m, n).map(|count| u32::try_from(count).unwrap_or(u32::MAX));
    let Buffers { weights, scale, x: activations, rows, params, y: output } = buffers;
    let mut arguments = KernelArguments::new();
    // A launch that fails spoils what it was declared to write: never the weights. The output is declared to be read
    // too, so that a later launch that writes other columns of it does not pass for having repaired it.
    for handle in [weights, scale, activations, rows, params] {
        arguments = arguments.with_buffer_io(handle.binding(), BufferIOAttr::ReadOnly);
    }
    let arguments = arguments.with_buffer_io(output.binding(), BufferIOAttr::ReadWrite);
    let kernel = TextKernel { language, source: source.clone() };
    client.launch(Box::new(kernel), CubeCount::Static(x, y, z), arguments);
}

/// Why a device can't launch a kernel at all.
pub(super) fn lacking(client: &Client, source: &GpuSource, features: &[String]) -> Option<String> {
    use cubecl::features::MmaConfig;
    use cubecl::features::Plane;
    use cubecl::ir::{ElemType, FloatKind, IntKind};

    let units = |a: ElemType, sum: ElemType| {
        let unit = MmaConfig { a_type: a, b_type: a, cd_type: sum, m: 16, n: 16, k: 16 };
        // Of 32 threads.
        client.features().matmul.cmma.contains(&unit) && client.properties().hardware.plane_size_max == 32
    };
    let hardware = &client.properties().hardware;
    let missing: Vec<_> = features
        .iter()
        .filter(|feature| match feature.as_str() {
            "subgroups" => !client.features().plane.contains(Plane::Ops) || hardware.plane_size_min < 8,
            "shader-f16" => client.properties().type_usage(ElemType::Float(FloatKind::F16)).is_empty(),
            // For functions of CubeCL; no text has them.
            "matrix-i8" => !units(ElemType::Int(IntKind::I8), ElemType::Int(IntKind::I32)),
            "matrix-f16" => !units(ElemType::Float(FloatKind::F16), ElemType::Float(FloatKind::F32)),
            _ => true,
        })
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        return Some(format!("needs {}", missing.join(", ")));
    }
    let ([x, y, z], most) = (source.workgroup, hardware.max_cube_dim);
    let threads = x * y * z;
    if threads > hardware.max_units_per_cube || x > most.0 || y > most.1 || z > most.2 {
        return Some(format!(
            "needs workgroups of {x} x {y} x {z} threads; the device has at most {}, {} x {} x {}",
            hardware.max_units_per_cube, most.0, most.1, most.2
        ));
    }
    None
}

/// Whether the device can launch as many workgroups as an [m, n] output takes.
pub(super) fn fits(client: &Client, source: &GpuSource, m: usize, n: usize) -> bool {
    let most = client.properties().hardware.max_cube_count;
    let [x, y, _] = source.grid(m, n);
    x <= most.0 as usize && y <= most.1 as usize
}
