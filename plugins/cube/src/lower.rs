//! `#[cube]` functions to text, for [kernels that are GPU source](bitnet_burn_plugin::sdk::GpuKernel): a plugin that is
//! loaded from a file has no CubeCL in common with the host, and brings what CubeCL would have compiled.
//!
//! The function gets the six buffers of [`bitnet_burn_plugin::abi::Gpu`], in their order, as `&[u32]`, `&[f32]` and
//! `&mut [f32]`, uses all of them, and asks none for its length; sizes are in the parameters. What it is at build time
//! (`#[comptime]`) comes behind them.
//!
//! ```
//! use bitnet_burn_cube::lower;
//! use cubecl::prelude::*;
//!
//! /// One output a thread, 64 threads a workgroup.
//! #[cube(launch_unchecked)]
//! fn plain(weights: &[u32], scale: &[f32], x: &[u32], rows: &[u32], params: &[u32], y: &mut [f32]) {
//!     let n = ABSOLUTE_POS_X;
//!     let m = CUBE_POS_Y;
//!     let stride = params[3];
//!     if n < params[1] {
//!         let mut sum = 0i32;
//!         for word in 0..stride / 4 {
//!             let codes = weights[(n * (stride / 4) + word) as usize];
//!             let at = m * stride + word / 8 * 32 + word % 8;
//!             for g in 0..4u32 {
//!                 let q = i32::reinterpret(x[(at + 8 * g) as usize]);
//!                 sum = dp4a(q, i32::reinterpret((codes >> (6 - 2 * g)) & 0x0303_0303u32), sum);
//!             }
//!         }
//!         let a = f32::reinterpret(rows[(2 * m) as usize]);
//!         let sum = sum - i32::reinterpret(rows[(2 * m + 1) as usize]);
//!         y[(m * params[4] + params[5] + n) as usize] = f32::cast_from(sum) * (scale[0] * a);
//!     }
//! }
//!
//! fn main() -> Result<(), lower::LowerError> {
//!     let (settings, device, target) = lower::offline([64, 1, 1]);
//!     let [weights, scale, x, rows, params, y] = lower::buffers();
//!     let kernel = plain::Plain::new(settings, device, target, weights, scale, x, rows, params, y);
//!     let text = lower::wgsl(&kernel)?;
//!     assert!(text.source.contains(&format!("fn {}(", text.entry)));
//!     assert!(lower::cuda(&kernel)?.source.contains("__dp4a"));
//!     Ok(())
//! }
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use cubecl::features::{Features, MmaConfig};
use cubecl::ir::{
    DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties, IntKind,
    MemoryDeviceProperties, TargetProperties,
};
use cubecl::prelude::*;
use cubecl::profile::TimingMethod;
use cubecl::{Compiler, CubeKernel};
use cubecl_cpp::shared::{CompilationOptions, CppCompiler};
use cubecl_cpp::target::Cuda;
use cubecl_wgpu::WgslCompiler;

/// Why a function has no text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LowerError {
    /// CubeCL does not compile it.
    #[error("{language}: {reason}")]
    Compile {
        /// The language.
        language: &'static str,
        /// CubeCL's words.
        reason: String,
    },
    /// The text is not as it should be: it uses what the host does not bind, or this version of CubeCL writes otherwise.
    #[error("{language}: {reason}, in\n{source_text}")]
    Text {
        /// The language.
        language: &'static str,
        /// What.
        reason: &'static str,
        /// The text.
        source_text: String,
    },
}

/// A kernel as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// The text.
    pub source: String,
    /// Its entry point.
    pub entry: String,
}

/// What functions are expanded for where there is no device: workgroups of so many threads, and what every GPU has, and the
/// matrix units that some have.
pub fn offline([x, y, z]: [u32; 3]) -> (KernelSettings, Arc<DeviceProperties>, Arc<TargetProperties>) {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 8,
        max_shared_memory_size: 16 << 10,
        max_cube_count: (u16::MAX.into(), u16::MAX.into(), u16::MAX.into()),
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
    let identity = DeviceIdentity { name: "none".into(), fingerprint: "none".into(), physical: None };
    let memory = MemoryDeviceProperties::new(u64::MAX, 256);
    let mut features = Features::default();
    let unit = |a_type, cd_type| MmaConfig { a_type, b_type: a_type, cd_type, m: 16, n: 16, k: 16 };
    features.matmul.cmma.extend([
        unit(ElemType::Int(IntKind::I8), ElemType::Int(IntKind::I32)),
        unit(ElemType::Float(FloatKind::F16), ElemType::Float(FloatKind::F32)),
    ]);
    let device = DeviceProperties::new(features, memory, hardware, TimingMethod::Device, identity);
    let settings =
        KernelSettings::new(CubeDim::new_3d(x, y, z).0, ExecutionMode::Unchecked, AddressType::U32);
    (settings, Arc::new(device), Arc::new(TargetProperties::default()))
}

/// The arguments of a kernel's constructor that stand for the six buffers.
pub fn buffers() -> [BufferCompilationArg; 6] {
    [(); 6].map(|()| BufferCompilationArg { inplace: None })
}

/// A function in WGSL.
///
/// # Errors
/// If CubeCL does not compile it, or the text asks for buffers that the host does not bind.
pub fn wgsl(kernel: &impl CubeKernel) -> Result<Text, LowerError> {
    let language = "wgsl";
    let fail = |reason: String| LowerError::Compile { language, reason };
    let shader =
        WgslCompiler.compile(kernel.define(), &Default::default()).map_err(|e| fail(e.to_string()))?;
    let source = shader.to_string();
    let wrong = |reason| LowerError::Text { language, reason, source_text: source.clone() };
    let entry = source.split_once("@compute").and_then(|(_, text)| between(text, "fn ", "("));
    let entry = entry.ok_or_else(|| wrong("no entry point was found"))?.to_owned();
    // Declared for the buffers' lengths, which nobody may ask for.
    if source.matches("info_var").count() > 1 {
        return Err(wrong("the length of a buffer is asked for"));
    }
    Ok(Text { source, entry })
}

/// That a function of matrix units is none in WGSL.
pub(crate) fn no_wgsl(_: &impl CubeKernel) -> Result<Text, LowerError> {
    Err(LowerError::Compile { language: "wgsl", reason: "it has no matrix units".into() })
}

/// A function in CUDA C++, for devices with `__dp4a` (compute capability 6.1).
///
/// # Errors
/// As [`wgsl`].
pub fn cuda(kernel: &impl CubeKernel) -> Result<Text, LowerError> {
    let language = "cuda";
    let fail = |reason: String| LowerError::Compile { language, reason };
    let mut options = CompilationOptions::default();
    options.supports_features.dp4a = true;
    let text =
        CppCompiler::<Cuda>::default().compile(kernel.define(), &options).map_err(|e| fail(e.to_string()))?;
    let source = renumber(&own_arguments_alone(&text.source, text.shared_memory_size));
    let wrong = |reason| LowerError::Text { language, reason, source_text: source.clone() };
    let entry = source.split_once("__global__").and_then(|(_, text)| between(text, ") ", "(")).map(str::trim);
    let entry = entry.ok_or_else(|| wrong("no entry point was found"))?.to_owned();
    let asked = ["dynamic_meta", "info_v", "extern __shared__"].iter().any(|name| source.contains(name))
        || source.matches("static_meta").count() > 1;
    if asked {
        return Err(wrong("the length of a buffer is asked for"));
    }
    Ok(Text { source, entry })
}

/// Numbers the variables, `v` and a number, as they come. CubeCL numbers arrays in shared memory by the order of a hash map, so
/// that one kernel has another text in each process, and a host refuses what it has not tried.
fn renumber(text: &str) -> String {
    let mut numbers = HashMap::new();
    let mut renumbered = String::with_capacity(text.len());
    let in_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rest = text;
    while let Some(start) = rest.find(in_name) {
        let length = rest[start..].find(|c| !in_name(c)).unwrap_or(rest.len() - start);
        let (between, name) = (&rest[..start], &rest[start..][..length]);
        renumbered.push_str(between);
        match name.strip_prefix('v').and_then(|number| number.parse::<u32>().ok()) {
            Some(number) => {
                let next = numbers.len();
                renumbered.push_str(&format!("v{}", numbers.entry(number).or_insert(next)));
            }
            None => renumbered.push_str(name),
        }
        rest = &rest[start + length..];
    }
    renumbered + rest
}

/// What the host launches without choosing (norms, quantisation, gates, dense matrices, attention with heads of 128), by
/// name and what it was made for.
pub fn operations() -> Vec<(String, crate::Texts)> {
    use crate::attention::{self, Cached, Plan};
    use crate::dense::{self, Format};
    use crate::rows::{self, Gate};

    let buffer = || BufferCompilationArg { inplace: None };
    let mut all: Vec<(String, crate::Texts)> = Vec::new();
    macro_rules! operation {
        ($threads:expr, $module:ident::$function:ident::$kernel:ident [$($buffer:ident),+] $($argument:expr),*) => {{
            let name = [stringify!($function).to_owned(), $(format!("{:?}", $argument)),*].join(" ");
            let (settings, device, target) = offline($threads);
            let kernel = $module::$function::$kernel::new(
                settings, device, target, $({ let $buffer = buffer(); $buffer }),+ $(, $argument)*,
            );
            all.push((name, (wgsl(&kernel), cuda(&kernel))));
        }};
    }
    let row = [rows::THREADS, 1, 1];
    operation!(row, rows::rms_norm_rows::RmsNormRows[x, weight, y, params]);
    for normed in [false, true] {
        operation!(row, rows::quantise_rows::QuantiseRows[x, weight, words, rows, params] normed);
    }
    for gate in [Gate::Relu2, Gate::Silu] {
        operation!(row, rows::gated_rows::GatedRows[gate_up, y, params] gate);
    }
    for format in Format::ALL {
        for tile in [1u32, 2, 4] {
            let threads = [dense::LANES, dense::GROUPS, 1];
            for int8 in [false, true].into_iter().filter(|int8| !*int8 || format.has_int8()) {
                operation!(
                    threads, dense::dense_gemv::DenseGemv[words, x, rows, y, params] format, int8, tile
                );
            }
        }
        for looked_up in [false, true] {
            let threads = [dense::DECODERS, 1, 1];
            operation!(threads, dense::decode_rows::DecodeRows[words, ids, y, params] format, looked_up);
        }
    }
    let (head_dim, threads) = (128u32, [attention::THREADS, 1, 1]);
    for turned in [false, true] {
        operation!(
            threads, attention::append_int8::AppendInt8[qkv, cos, sin, cache, scale, params] head_dim, turned
        );
    }
    for cached in [Cached::F32, Cached::F16, Cached::Int8] {
        operation!(
            [32, 1, 1],
            attention::rope_append::RopeAppend[qkv, cos, sin, q, keys, values, params] head_dim, cached
        );
        for (rows, split, windowed) in
            [(1, true, false), (1, false, false), (4, false, false), (1, true, true)]
        {
            let plan = Plan { head_dim, cached, heads: 4, rows, split, windowed };
            operation!(
                threads,
                attention::attend_chunks::AttendChunks[q, keys, values, key_scale, value_scale, out, params] plan
            );
        }
    }
    operation!(threads, attention::join_chunks::JoinChunks[partial, out, params] head_dim);
    all
}

/// CUDA C++ as the host launches a text: without the last parameter, which CubeCL gives its own kernels for the buffers'
/// lengths, and with shared memory of a fixed size.
fn own_arguments_alone(source: &str, shared_memory: usize) -> String {
    let Some((head, body)) = source.split_once("__global__").and_then(|(before, rest)| {
        let (signature, body) = rest.split_once(") {")?;
        Some((format!("{before}__global__{signature}"), body))
    }) else {
        return source.to_owned();
    };
    let (head, info) = match head.rsplit_once(", ") {
        Some((head, last)) if last.starts_with("info_st ") => (head, last.rsplit(' ').next()),
        _ => (&head[..], None),
    };
    let of_info = |statement: &str| {
        info.is_some_and(|info| {
            statement.ends_with(&format!(" = *{info}")) || statement.ends_with(&format!("({info} + 1)"))
        })
    };
    let statements = body.split(';').filter(|statement| !of_info(statement)).map(|statement| match statement
        .split_once("extern __shared__")
        .map(|(before, rest)| (before, rest.strip_suffix("[]")))
    {
        Some((before, Some(name))) => format!("{before}__shared__{name}[{shared_memory}]"),
        _ => statement.to_owned(),
    });
    format!("{head}) {{{}", statements.collect::<Vec<_>>().join(";"))
}

/// What is between two parts of a text.
fn between<'a>(text: &'a str, before: &str, behind: &str) -> Option<&'a str> {
    text.split_once(before)?.1.split_once(behind).map(|(inner, _)| inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::texts;

    /// Its length is a buffer of its own.
    #[cube(launch_unchecked)]
    fn asks(weights: &[u32], scale: &[f32], x: &[u32], rows: &[u32], params: &[u32], y: &mut [f32]) {
        let all = weights.len() + x.len() + rows.len() + params.len();
        y[0] = f32::cast_from(all) * scale[0];
    }

    #[test]
    fn variables_are_numbered_as_they_come() {
        let text = "array *v895 = &v894[2]; v895[v1] = max(vv1, v894[0], v_2) + 0x1v7;";
        assert_eq!(renumber(text), "array *v0 = &v1[2]; v0[v2] = max(vv1, v1[0], v_2) + 0x1v7;");
    }

    #[test]
    fn kernels_of_this_package_have_texts_that_a_host_can_launch() {
        let all = texts();
        assert_eq!(all.len(), 9);
        for kernel in all {
            assert_eq!(kernel.descriptors().len(), 2);
            let name = kernel.entry;
            let (wgsl, cuda) = (kernel.texts.0.unwrap(), kernel.texts.1.unwrap());
            for binding in 0..6 {
                let binding = format!("@binding({binding}) var<storage, read_write>");
                assert!(wgsl.source.contains(&binding), "{name}: no {binding}");
            }
            let (_, signature) = cuda.source.split_once(&format!("{}(", cuda.entry)).unwrap();
            let (parameters, _) = signature.split_once(") {").unwrap();
            assert_eq!(parameters.split(',').count(), 6, "{name}: {parameters}");
            assert!(
                cuda.source.contains("extern \"C\" __global__") && cuda.source.contains("__dp4a"),
                "{name}"
            );
            let shared =
                cuda.source.split_once("__shared__").is_some_and(|(_, text)| text.contains("[1024]"));
            assert!(shared || name != "gemv_1", "{name}: {}", cuda.source);
        }
    }

    #[test]
    fn what_is_launched_without_being_chosen_has_texts_too() {
        let all = operations();
        assert!(all.len() > 50, "{}", all.len());
        for (name, (wgsl, cuda)) in all {
            let cuda = cuda.unwrap().source;
            assert!(wgsl.unwrap().source.contains("@compute"), "{name}");
            assert!(
                cuda.contains("__dp4a") || !(name.starts_with("dense_gemv") && name.contains("true")),
                "{name}: {cuda}"
            );
        }
    }

    #[test]
    fn a_kernel_that_asks_for_lengths_is_refused() {
        let (settings, device, target) = offline([1, 1, 1]);
        let [weights, scale, x, rows, params, y] = buffers();
        let kernel = asks::Asks::new(settings, device, target, weights, scale, x, rows, params, y);
        for error in [wgsl(&kernel).unwrap_err(), cuda(&kernel).unwrap_err()] {
            assert!(error.to_string().contains("the length of a buffer is asked for"), "{error}");
        }
    }
}
