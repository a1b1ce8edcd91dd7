//! Plugin descriptors made of arbitrary bytes: whatever one says, the host refuses it or can use it, and reads no
//! byte that the ABI does not promise. Every struct and string has an allocation of its own, so that the address
//! sanitizer sees the first byte too many; a struct is as long as it says.
#![allow(unsafe_code, reason = "plugin descriptors are C structs")]

use std::ffi::{CString, c_char};

use bitnet_burn_manager::plugin::{Origin, Plugin};
use bitnet_burn_plugin::abi;

/// The input, from its beginning; zeros behind its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.0.len().min(N);
        bytes[..taken].copy_from_slice(&self.0[..taken]);
        self.0 = &self.0[taken..];
        bytes
    }

    fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    /// A valid number mostly, and any other.
    fn number(&mut self, valid: u64) -> u64 {
        match self.byte() {
            0..200 => valid,
            200..230 => u64::from(u16::from_le_bytes(self.bytes())),
            _ => u64::from_le_bytes(self.bytes()),
        }
    }
}

/// What a descriptor points to, for as long as the host looks at it.
#[derive(Default)]
struct Memory {
    strings: Vec<CString>,
    structs: Vec<Vec<u64>>,
    pointers: Vec<Vec<*const abi::Kernel>>,
}

impl Memory {
    /// Null, valid text, or any bytes up to a NUL.
    fn string(&mut self, input: &mut Input) -> *const c_char {
        let text = match input.byte() {
            0..20 => return std::ptr::null(),
            20..200 => format!("name_{}", input.byte() % 4).into_bytes(),
            length => {
                let mut bytes = vec![b'a'; usize::from(length) * 2];
                bytes[..16].copy_from_slice(&input.bytes::<16>());
                bytes.retain(|&b| b != 0);
                bytes
            }
        };
        self.strings.push(CString::new(text).expect("no NUL is left"));
        self.strings.last().expect("pushed above").as_ptr()
    }

    /// A copy of a struct that is as long as it says, up to its real length.
    fn place<T>(&mut self, value: &T, struct_size: u64, least: usize) -> *const T {
        let size = (struct_size.min(size_of::<T>() as u64) as usize).max(least).next_multiple_of(8);
        let mut words = vec![0u64; size / 8];
        // SAFETY: `size` bytes of a C struct without padding at its beginning, into as many of a vector.
        unsafe {
            std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>(), words.as_mut_ptr().cast(), size)
        };
        self.structs.push(words);
        self.structs.last().expect("pushed above").as_ptr().cast()
    }
}

unsafe extern "C" fn supports(_: *const abi::Signature) -> i32 {
    0
}

unsafe extern "C" fn packed_size(n: u64, k: u64) -> u64 {
    n.wrapping_mul(k)
}

unsafe extern "C" fn pack(
    _: *const abi::Weights,
    _: *mut u8,
    _: u64,
    _: u64,
    _: *const abi::Message,
) -> abi::Status {
    abi::STATUS_FAILED
}

unsafe extern "C" fn workspace_size(_: *const abi::Signature) -> u64 {
    u64::MAX
}

unsafe extern "C" fn prepare(_: *const abi::Activations, _: *mut u8, _: *const abi::Message) -> abi::Status {
    abi::STATUS_FAILED
}

unsafe extern "C" fn run(
    _: *const abi::Weights,
    _: *const abi::Activations,
    _: *const u8,
    _: *const abi::Output,
    _: *const abi::Tile,
    _: *const abi::Message,
) -> abi::Status {
    abi::STATUS_FAILED
}

/// Whether the descriptor was taken.
pub fn descriptor(data: &[u8]) -> bool {
    let input = &mut Input(data);
    let mut memory = Memory::default();
    let mut kernels = Vec::new();
    for _ in 0..input.byte() % 5 {
        if input.byte() > 240 {
            // Null, or aligned to nothing.
            kernels.push(std::ptr::without_provenance(usize::from(input.byte() & 1)));
            continue;
        }
        let gpu = match input.byte() {
            0..100 => std::ptr::null(),
            100..110 => std::ptr::without_provenance(4),
            _ => {
                let gpu = abi::Gpu {
                    struct_size: input.number(size_of::<abi::Gpu>() as u64),
                    source: memory.string(input),
                    entry: memory.string(input),
                    workgroup: [64, 1, 1].map(|valid| input.number(valid) as u32),
                    tile_n: input.number(64) as u32,
                    tile_m: input.number(8) as u32,
                    reserved: 0,
                };
                memory.place(&gpu, gpu.struct_size, 8)
            }
        };
        let functions = input.byte();
        let has = |bit: u32| functions >> bit & 1 == 0;
        let kernel = abi::Kernel {
            struct_size: match input.byte() {
                0..40 => abi::KERNEL_SIZE_1_0 as u64,
                40..80 => abi::KERNEL_SIZE_1_1 as u64,
                _ => input.number(size_of::<abi::Kernel>() as u64),
            },
            name: memory.string(input),
            layout: memory.string(input),
            features: memory.string(input),
            operation: input.number(abi::OPERATION_TERNARY_MATMUL.into()) as u32,
            target: input.number([abi::TARGET_CPU, abi::TARGET_WGSL][usize::from(!gpu.is_null())].into())
                as u32,
            weight_alignment: input.number(64),
            row_granule: input.number(8),
            supports: has(0).then_some(supports),
            packed_size: has(1).then_some(packed_size),
            pack: has(2).then_some(pack),
            unpack: has(3).then_some(pack),
            workspace_size: has(4).then_some(workspace_size),
            prepare: has(5).then_some(prepare),
            run: has(6).then_some(run),
            gpu,
            context: std::ptr::null(),
            packed_size_of: has(7).then_some(workspace_size),
            scratch_size: has(4).then_some(workspace_size),
        };
        kernels.push(memory.place(&kernel, kernel.struct_size, 8));
    }
    // A count beyond the array is beyond what a count may be, too: a valid pointer is valid for all of them.
    let count = match input.number(0) {
        n @ 257.. => n,
        _ => kernels.len() as u64,
    };
    memory.pointers.push(kernels);
    let descriptor = abi::Plugin {
        struct_size: input.number(size_of::<abi::Plugin>() as u64),
        abi_major: input.number(abi::ABI_MAJOR.into()) as u32,
        abi_minor: input.number(abi::ABI_MINOR.into()) as u32,
        name: memory.string(input),
        version: memory.string(input),
        kernels: if input.byte() > 250 { std::ptr::null() } else { memory.pointers[0].as_ptr() },
        kernel_count: count,
    };
    let descriptor = memory.place(&descriptor, descriptor.struct_size, 16);
    // SAFETY: null or valid pointers, to structs as long as they say, which live until the end.
    match unsafe { Plugin::from_descriptor(descriptor, Origin::BuiltIn) } {
        Err(error) => {
            assert!(error.to_string().contains("built in"));
            false
        }
        Ok(plugin) => {
            assert!((1..64).contains(&plugin.name().len()));
            let version = plugin.version();
            assert!((1..64).contains(&version.chars().count()) && !version.contains(char::is_control));
            assert!(plugin.identity().starts_with(plugin.name()));
            assert!(plugin.abi().starts_with(&format!("{}.", abi::ABI_MAJOR)));
            true
        }
    }
}
