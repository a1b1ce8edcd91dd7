//! Reads the descriptor of a plugin field by field, and refuses what breaks the ABI.

use std::ffi::c_char;
use std::sync::Arc;

use bitnet_burn_plugin::abi::{
    ABI_MAJOR, Gpu as RawGpu, KERNEL_SIZE_1_0, KERNEL_SIZE_1_1, Kernel as RawKernel, MAX_WEIGHT_ALIGNMENT,
    OPERATION_SCALED_TERNARY_MATMUL, OPERATION_TERNARY_MATMUL, Plugin as RawPlugin, TARGET_CPU,
    TARGET_CUBECL, TARGET_CUDA, TARGET_WGSL,
};
use bitnet_burn_plugin::layouts;

use super::{Declared, GpuSource, Layout, Origin, Plugin, PluginError, shown};

impl Plugin {
    /// Checks a descriptor.
    ///
    /// # Safety
    /// `descriptor` is null or points to the beginning of a descriptor of any version, which lives as
    /// long as the process, and whose pointers are null or valid.
    pub unsafe fn from_descriptor(descriptor: *const RawPlugin, origin: Origin) -> Result<Self, PluginError> {
        let invalid = |reason: String| PluginError::Descriptor { origin: origin.to_string(), reason };
        if descriptor.is_null() || !descriptor.is_aligned() {
            return Err(invalid("the entry point returned no descriptor".into()));
        }
        // SAFETY: these three fields keep their places in every version.
        let (size, major, minor) = unsafe {
            (
                (&raw const (*descriptor).struct_size).read(),
                (&raw const (*descriptor).abi_major).read(),
                (&raw const (*descriptor).abi_minor).read(),
            )
        };
        if major != ABI_MAJOR {
            return Err(PluginError::Version { origin: origin.to_string(), major, minor });
        }
        if size < size_of::<RawPlugin>() as u64 || size > 1 << 16 {
            return Err(invalid(format!(
                "struct_size of the plugin is {size}, ABI {ABI_MAJOR}.0 has {}",
                size_of::<RawPlugin>()
            )));
        }
        // SAFETY: same major version, and at least as long as version 1.0.
        let raw = unsafe { &*descriptor };
        let name = name(raw.name, "the plugin's name").map_err(&invalid)?;
        let version = text(raw.version, 63)
            .map(|version| shown(&version))
            .filter(|v| !v.is_empty())
            .ok_or_else(|| invalid("the plugin has no version".into()))?;
        if raw.kernels.is_null() || !raw.kernels.is_aligned() || !(1..=256).contains(&raw.kernel_count) {
            return Err(invalid(format!("it claims {} kernels", raw.kernel_count)));
        }
        // SAFETY: the caller's promise: a non-null pointer is valid, here to `kernel_count` pointers.
        let pointers = unsafe { std::slice::from_raw_parts(raw.kernels, raw.kernel_count as usize) };
        let mut kernels: Vec<Declared> = Vec::with_capacity(pointers.len());
        for (i, &pointer) in pointers.iter().enumerate() {
            if pointer.is_null() || !pointer.is_aligned() {
                return Err(invalid(format!("kernel {i} is null")));
            }
            // SAFETY: a non-null pointer is valid (the caller's promise).
            let kernel = unsafe { check_kernel(&name, i, pointer) }.map_err(&invalid)?;
            if kernels.iter().any(|k| k.name == kernel.name) {
                return Err(invalid(format!("two kernels are named `{}`", kernel.name)));
            }
            kernels.push(kernel);
        }
        Ok(Self { name, version, abi: (major, minor), origin, kernels, contained: None })
    }
}

/// The fields that a struct of `size` bytes has, and zeros for the others.
///
/// # Safety
/// `pointer` is valid for reading `size` bytes, and all zeros are a valid `T`.
unsafe fn known_fields<T: Copy>(pointer: *const T, size: u64) -> T {
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    let count = size_of::<T>().min(size as usize);
    // SAFETY: `count` bytes are readable (the caller's promise) and fit; what is not copied stays zero, which
    // is valid.
    unsafe {
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), count);
        value.assume_init()
    }
}

/// # Safety
/// `pointer` points to the beginning of a kernel of any minor version, whose pointers are null or valid.
unsafe fn check_kernel(plugin: &str, i: usize, pointer: *const RawKernel) -> Result<Declared, String> {
    // SAFETY: the first field of every version.
    let size = unsafe { (&raw const (*pointer).struct_size).read() };
    if size < KERNEL_SIZE_1_0 as u64 || size > 1 << 16 {
        return Err(format!("struct_size of kernel {i} is {size}, ABI {ABI_MAJOR}.0 has {KERNEL_SIZE_1_0}"));
    }
    // A part of a later version's fields counts as none of them.
    let versions = [size_of::<RawKernel>(), KERNEL_SIZE_1_1].map(|version| version as u64);
    let size = versions.into_iter().find(|&version| size >= version).unwrap_or(KERNEL_SIZE_1_0 as u64);
    // SAFETY: `size` is what it says it has; null pointers, absent functions and zeros are valid.
    let mut kernel = unsafe { known_fields(pointer, size) };
    let name = name(kernel.name, &format!("the name of kernel {i}"))?;
    let features = match kernel.features.is_null() {
        true => String::new(),
        false => text(kernel.features, 255)
            .ok_or_else(|| format!("the features of kernel `{name}` are no text of at most 255 bytes"))?,
    };
    let features = shown(&features);
    let features = features.split(',').map(|f| f.trim().to_owned()).filter(|f| !f.is_empty()).collect();
    let known_operation =
        matches!(kernel.operation, OPERATION_TERNARY_MATMUL | OPERATION_SCALED_TERNARY_MATMUL);
    let known_target = matches!(kernel.target, TARGET_CPU | TARGET_WGSL | TARGET_CUDA | TARGET_CUBECL);
    let layout = match kernel.layout.is_null() {
        true => Layout::Canonical,
        false => check_layout(plugin, &name, &kernel)?,
    };
    if !known_operation || !known_target || matches!(layout, Layout::Unknown(_)) {
        // Of a later version: its fields may mean something else, and the host calls none of its functions.
        let (operation, target) = (kernel.operation, kernel.target);
        // SAFETY: zeros are a valid descriptor.
        let raw = RawKernel {
            operation,
            target,
            weight_alignment: 1,
            row_granule: 1,
            ..unsafe { std::mem::zeroed() }
        };
        return Ok(Declared { name, layout, features, gpu: None, raw });
    }
    match &layout {
        Layout::Public(public) => {
            if kernel.target != TARGET_CPU
                || !kernel.row_granule.is_multiple_of(layouts::BLOCK_ROWS as u64)
                || kernel.weight_alignment > layouts::ALIGNMENT as u64
            {
                return Err(format!(
                    "kernel `{name}` reads the public layout {}: that takes target {TARGET_CPU} (the CPU), a row granule that \
                     is a multiple of {}, and weights aligned to at most {}; it has target {}, {} and {}",
                    public.name,
                    layouts::BLOCK_ROWS,
                    layouts::ALIGNMENT,
                    kernel.target,
                    kernel.row_granule,
                    kernel.weight_alignment
                ));
            }
            kernel.weight_alignment = layouts::ALIGNMENT as u64;
            (kernel.packed_size, kernel.packed_size_of) = (Some(public.packed_size), None);
            (kernel.pack, kernel.unpack) = (Some(public.pack), Some(public.unpack));
        }
        Layout::Private(_) => {
            let sized = kernel.packed_size.is_some() || kernel.packed_size_of.is_some();
            if !sized || kernel.pack.is_none() || kernel.unpack.is_none() {
                return Err(format!(
                    "kernel `{name}` has a private layout but not packed_size, pack and unpack"
                ));
            }
        }
        // Canonical weights have their own size.
        Layout::Canonical => (kernel.packed_size, kernel.packed_size_of) = (None, None),
        Layout::Unknown(_) => {}
    }
    if !kernel.weight_alignment.is_power_of_two() || kernel.weight_alignment > MAX_WEIGHT_ALIGNMENT {
        return Err(format!(
            "kernel `{name}` asks for weights aligned to {}; it must be a power of two up to \
             {MAX_WEIGHT_ALIGNMENT}",
            kernel.weight_alignment
        ));
    }
    if !(1..=4096).contains(&kernel.row_granule) {
        return Err(format!(
            "kernel `{name}` has a row granule of {}; 1 to 4096 are possible",
            kernel.row_granule
        ));
    }
    if kernel.supports.is_none() || (kernel.target == TARGET_CPU && kernel.run.is_none()) {
        return Err(format!("kernel `{name}` lacks `supports` or `run`"));
    }
    if kernel.workspace_size.is_none() && kernel.prepare.is_some() {
        return Err(format!("kernel `{name}` prepares a workspace but has no workspace_size"));
    }
    let gpu = match kernel.target {
        TARGET_WGSL | TARGET_CUDA | TARGET_CUBECL => {
            // SAFETY: null, or valid (the caller's promise).
            Some(Arc::new(unsafe { check_gpu(&name, kernel.gpu) }?))
        }
        _ => None,
    };
    Ok(Declared { name, layout, features, gpu, raw: kernel })
}

/// What a kernel says of the layout of its weights.
///
/// # Errors
/// If it is no name.
fn check_layout(plugin: &str, kernel: &str, raw: &RawKernel) -> Result<Layout, String> {
    let what = format!("the layout of kernel `{kernel}`");
    // A name with a slash is that of a public layout, by which `cpu`'s own are called, too.
    let full = text(raw.layout, 127).unwrap_or_default();
    let Some((owner, short)) = full.split_once('/') else {
        let name = format!("{plugin}/{}", name(raw.layout, &what)?);
        return Ok(layouts::find(&name).map_or(Layout::Private(name), Layout::Public));
    };
    let valid = is_name(owner) && is_name(short);
    match layouts::find(&full) {
        Some(public) => Ok(Layout::Public(public)),
        None if valid => Ok(Layout::Unknown(full)),
        None => Err(format!("{what} is neither a name nor two with a slash")),
    }
}

/// Bytes that the text of a GPU kernel may have.
const MAX_SOURCE: usize = 1 << 20;
/// Threads that a workgroup may have on any device that there is.
const MAX_WORKGROUP: u32 = 1024;

/// # Safety
/// `pointer` is null, or points to the beginning of the GPU part of a kernel of any minor version, whose
/// pointers are null or valid.
unsafe fn check_gpu(kernel: &str, pointer: *const RawGpu) -> Result<GpuSource, String> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(format!("kernel `{kernel}` is for a GPU, and its `gpu` is null"));
    }
    // SAFETY: the first field of every version.
    let size = unsafe { (&raw const (*pointer).struct_size).read() };
    if size < size_of::<RawGpu>() as u64 || size > 1 << 16 {
        return Err(format!(
            "struct_size of the GPU part of kernel `{kernel}` is {size}, ABI {ABI_MAJOR}.1 has {}",
            size_of::<RawGpu>()
        ));
    }
    // SAFETY: `size` is what it says it has; null pointers and zeros are valid.
    let gpu = unsafe { known_fields(pointer, size) };
    let source = text(gpu.source, MAX_SOURCE).filter(|text| !text.is_empty());
    let source = source.ok_or_else(|| {
        format!("the source of kernel `{kernel}` is no UTF-8 text of 1 to {MAX_SOURCE} bytes")
    })?;
    let entry = text(gpu.entry, 127).filter(|name| {
        name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && !name.starts_with(|c: char| c.is_ascii_digit())
    });
    let entry = entry.filter(|name| !name.is_empty()).ok_or_else(|| {
        format!("the entry point of kernel `{kernel}` is no identifier of 1 to 127 characters")
    })?;
    let [x, y, z] = gpu.workgroup;
    let threads = x.checked_mul(y).and_then(|xy| xy.checked_mul(z));
    if !threads.is_some_and(|threads| (1..=MAX_WORKGROUP).contains(&threads)) {
        return Err(format!(
            "kernel `{kernel}` has workgroups of {x} x {y} x {z} threads; 1 to {MAX_WORKGROUP} are possible"
        ));
    }
    if gpu.tile_n == 0 || gpu.tile_m == 0 {
        return Err(format!(
            "a workgroup of kernel `{kernel}` computes {} x {} outputs; it must be at least 1 x 1",
            gpu.tile_n, gpu.tile_m
        ));
    }
    Ok(GpuSource { text: source, entry, workgroup: gpu.workgroup, tile_n: gpu.tile_n, tile_m: gpu.tile_m })
}

/// Text of at most `limit` bytes behind a pointer that is null or NUL-terminated.
fn text(pointer: *const c_char, limit: usize) -> Option<String> {
    if pointer.is_null() {
        return None;
    }
    let mut length = 0;
    // SAFETY: a descriptor's string is NUL-terminated (ABI); no byte behind the NUL is read, and at
    // most `limit` + 1 bytes are.
    while unsafe { *pointer.add(length) } != 0 {
        length += 1;
        if length > limit {
            return None;
        }
    }
    // SAFETY: the loop above found `length` bytes before the NUL.
    let bytes = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), length) };
    std::str::from_utf8(bytes).ok().map(str::to_owned)
}

fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn name(pointer: *const c_char, what: &str) -> Result<String, String> {
    text(pointer, 63)
        .filter(|name| is_name(name))
        .ok_or_else(|| format!("{what} is not 1 to 63 of A-Z, a-z, 0-9, '.', '_', '-'"))
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use bitnet_burn_plugin::abi::{self, Message, STATUS_OK, Signature, Status};
    use proptest::prelude::*;

    use super::super::Target;
    use super::*;

    unsafe extern "C" fn supports(_: *const Signature) -> i32 {
        1
    }

    unsafe extern "C" fn packed_size(n: u64, k: u64) -> u64 {
        n.wrapping_mul(k)
    }

    /// A string for a descriptor, which must live as long as it: null, valid, or anything.
    fn string() -> impl Strategy<Value = Option<CString>> {
        prop_oneof![
            1 => Just(None),
            6 => "[A-Za-z0-9._-]{1,63}".prop_map(|text| CString::new(text).ok()),
            1 => prop::collection::vec(1u8..=255, 0..300).prop_map(|bytes| CString::new(bytes).ok()),
        ]
    }

    fn number(valid: u64) -> impl Strategy<Value = u64> {
        prop_oneof![12 => Just(valid), 1 => any::<u64>(), 1 => 0..5000u64]
    }

    fn pointer(text: &Option<CString>) -> *const c_char {
        text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr())
    }

    #[derive(Debug, Clone)]
    struct Fields {
        names: [Option<CString>; 5],
        sizes: [u64; 2],
        version: (u32, u32),
        count: Option<u64>,
        null_kernel: bool,
        numbers: [u64; 4],
        functions: [bool; 3],
    }

    fn fields() -> impl Strategy<Value = Fields> {
        let sizes = [size_of::<RawPlugin>() as u64, size_of::<RawKernel>() as u64].map(number);
        (
            [string(), string(), string(), string(), string()],
            sizes,
            (prop_oneof![9 => Just(ABI_MAJOR), 1 => any::<u32>()], any::<u32>()),
            prop::option::weighted(0.1, any::<u64>().prop_filter("not one", |&n| n == 0 || n > 256)),
            prop::bool::weighted(0.05),
            [number(1), number(1), number(64), number(8)],
            [prop::bool::weighted(0.9), prop::bool::weighted(0.9), prop::bool::weighted(0.9)],
        )
            .prop_map(|(names, sizes, version, count, null_kernel, numbers, functions)| Fields {
                names,
                sizes,
                version,
                count,
                null_kernel,
                numbers,
                functions,
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever a descriptor says, it is refused or its kernels keep what the host relies on.
        #[test]
        fn a_descriptor_is_refused_or_sound(fields in fields()) {
            let Fields { names, sizes, version, count, null_kernel, numbers, functions } = fields;
            let [name, plugin_version, kernel_name, layout, features] = &names;
            let [has_supports, has_pack, has_size] = functions;
            let kernel = RawKernel {
                struct_size: sizes[1],
                name: pointer(kernel_name),
                layout: pointer(layout),
                features: pointer(features),
                operation: numbers[0] as u32,
                target: numbers[1] as u32,
                weight_alignment: numbers[2],
                row_granule: numbers[3],
                supports: has_supports.then_some(supports),
                packed_size: has_size.then_some(packed_size),
                pack: None,
                unpack: None,
                workspace_size: None,
                prepare: None,
                run: None,
                gpu: std::ptr::null(),
                context: std::ptr::null(),
                packed_size_of: None,
                scratch_size: None,
            };
            // Complete kernels, or none of the three: what differs between them is what is checked.
            let kernel = match has_pack {
                true => RawKernel { pack: Some(pack), unpack: Some(pack), run: Some(run), ..kernel },
                false => kernel,
            };
            let kernels = [if null_kernel { std::ptr::null() } else { &raw const kernel }];
            let plugin = RawPlugin {
                struct_size: sizes[0],
                abi_major: version.0,
                abi_minor: version.1,
                name: pointer(name),
                version: pointer(plugin_version),
                kernels: kernels.as_ptr(),
                kernel_count: count.unwrap_or(1),
            };
            // SAFETY: null or valid pointers, which live until the end of this test; counts that are not
            // that of the array are out of range, and refused before it is read.
            let checked = unsafe { Plugin::from_descriptor(&plugin, Origin::BuiltIn) };
            let alphabet = |text: &Option<CString>| {
                text.as_ref().and_then(|t| t.to_str().ok()).is_some_and(|t| {
                    (1..=63).contains(&t.len()) && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                })
            };
            match checked {
                Err(error) => prop_assert!(error.to_string().contains("built in")),
                Ok(plugin) => {
                    prop_assert!(version.0 == ABI_MAJOR && count.is_none() && !null_kernel);
                    prop_assert!(alphabet(name) && alphabet(kernel_name) && (layout.is_none() || alphabet(layout)));
                    prop_assert!(sizes[0] >= size_of::<RawPlugin>() as u64 && sizes[1] >= KERNEL_SIZE_1_0 as u64);
                    let kernel = &Arc::new(plugin).kernels()[0];
                    let ternary = numbers[0] as u32 == OPERATION_TERNARY_MATMUL;
                    let scaled = numbers[0] as u32 == OPERATION_SCALED_TERNARY_MATMUL;
                    prop_assert!(ternary || scaled || kernel.unknown().is_some());
                    // What this host does not know is never called, whatever else it says.
                    if kernel.unknown().is_some() {
                        return Ok(());
                    }
                    prop_assert!(layout.is_none() || (has_pack && has_size));
                    // Without a text it is for no GPU that this host knows.
                    prop_assert!(kernel.gpu().is_none() && !matches!(kernel.target(), Target::Wgsl | Target::Cuda));
                    prop_assert!(has_pack || kernel.target() != Target::Cpu || scaled);
                    prop_assert!(kernel.weight_alignment().is_power_of_two() && kernel.weight_alignment() <= 4096);
                    prop_assert!((1..=4096).contains(&kernel.row_granule()));
                    prop_assert!(scaled || kernel.supports(&Signature::ternary(1, 1, 1, 1)));
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the GPU part of a kernel says, it is refused or what the host relies on holds.
        #[test]
        fn a_gpu_part_is_refused_or_sound(
            (source, entry) in (string(), string()),
            (size, present) in (number(size_of::<RawGpu>() as u64), prop::bool::weighted(0.9)),
            workgroup in prop::array::uniform3(prop_oneof![9 => 1..40u32, 1 => any::<u32>()]),
            (tile_n, tile_m) in (prop_oneof![0..3u32, any::<u32>()], prop_oneof![1..3u32, any::<u32>()]),
            target in TARGET_WGSL..TARGET_CUDA + 2,
            kernel_size in prop_oneof![3 => Just(size_of::<RawKernel>()), 1 => Just(KERNEL_SIZE_1_0)],
        ) {
            let gpu = RawGpu {
                struct_size: size,
                source: pointer(&source),
                entry: pointer(&entry),
                workgroup,
                tile_n,
                tile_m,
                reserved: 0,
            };
            let kernel = RawKernel {
                struct_size: kernel_size as u64,
                name: c"text".as_ptr(),
                layout: std::ptr::null(),
                features: std::ptr::null(),
                operation: OPERATION_TERNARY_MATMUL,
                target,
                weight_alignment: 4,
                row_granule: 1,
                supports: Some(supports),
                packed_size: None,
                pack: None,
                unpack: None,
                workspace_size: None,
                prepare: None,
                run: None,
                gpu: if present { &raw const gpu } else { std::ptr::null() },
                context: std::ptr::null(),
                packed_size_of: None,
                scratch_size: None,
            };
            // SAFETY: a kernel whose pointers are null or valid.
            let checked = unsafe { check_kernel("plugin", 0, &raw const kernel) };
            let known = target != TARGET_CUDA + 1;
            match checked {
                Err(error) => prop_assert!(known && error.contains("`text`"), "{error}"),
                // Kernels of unknown targets are listed, and not used.
                Ok(declared) if !known => prop_assert!(declared.gpu.is_none()),
                Ok(declared) => {
                    let gpu = declared.gpu.expect("a text");
                    prop_assert!(present && kernel_size >= KERNEL_SIZE_1_1);
                    prop_assert!(!gpu.text.is_empty() && !gpu.entry.is_empty() && gpu.tile_n > 0 && gpu.tile_m > 0);
                    prop_assert!((1..=1024).contains(&gpu.workgroup.iter().map(|&w| u64::from(w)).product::<u64>()));
                    prop_assert_eq!(gpu.grid(1, 1), [1, 1, 1]);
                }
            }
        }
    }

    unsafe extern "C" fn pack(
        _: *const abi::Weights,
        _: *mut u8,
        _: u64,
        _: u64,
        _: *const Message,
    ) -> Status {
        STATUS_OK
    }

    unsafe extern "C" fn run(
        _: *const abi::Weights,
        _: *const abi::Activations,
        _: *const u8,
        _: *const abi::Output,
        _: *const abi::Tile,
        _: *const Message,
    ) -> Status {
        STATUS_OK
    }
}
