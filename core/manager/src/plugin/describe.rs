//! A plugin's descriptor as text between processes. The host of a [contained](crate::contained) plugin never sees the
//! library's own descriptor. It makes one from the text, and checks it like any other.
#![cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "nothing is confined elsewhere"))]

use std::ffi::{CString, c_char};
use std::path::Path;
use std::sync::Arc;

use bitnet_burn_plugin::abi::{
    Activations, Gpu as RawGpu, Kernel as RawKernel, Message, Output, Plugin as RawPlugin, STATUS_FAILED,
    Signature, Status, TARGET_CPU, Tile, Weights,
};
use serde::{Deserialize, Serialize};

use super::{GpuSource, Layout, Origin, Plugin, PluginError};
use crate::contained::Contained;

/// A plugin's descriptor as plain data.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Described {
    name: String,
    version: String,
    abi: (u32, u32),
    kernels: Vec<DescribedKernel>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct DescribedKernel {
    name: String,
    layout: Option<String>,
    features: String,
    operation: u32,
    target: u32,
    weight_alignment: u64,
    row_granule: u64,
    gpu: Option<GpuSource>,
}

impl Plugin {
    /// The descriptor as plain data.
    pub(crate) fn describe(&self) -> Described {
        let kernels = self.kernels.iter().map(|kernel| DescribedKernel {
            name: kernel.name.clone(),
            layout: kernel.layout.name().map(|layout| match &kernel.layout {
                // A name with a slash would be that of a public one.
                Layout::Private(_) => layout.split_once('/').map_or(layout, |(_, own)| own).to_owned(),
                _ => layout.to_owned(),
            }),
            features: kernel.features.join(","),
            operation: kernel.raw.operation,
            target: kernel.raw.target,
            weight_alignment: kernel.raw.weight_alignment,
            row_granule: kernel.raw.row_granule,
            gpu: kernel.gpu.as_deref().cloned(),
        });
        Described {
            name: self.name.clone(),
            version: self.version.clone(),
            abi: self.abi,
            kernels: kernels.collect(),
        }
    }

    /// The plugin of the file `origin` that another process holds.
    ///
    /// # Errors
    /// If its descriptor breaks the ABI.
    pub(crate) fn contained(
        contained: Arc<Contained>,
        origin: &Path,
        sha256: String,
    ) -> Result<Self, PluginError> {
        let described = contained.described();
        let text = |text: &str| -> *const c_char {
            // A text with a NUL is cut there, as in C.
            let text = text.split('\0').next().unwrap_or_default();
            CString::new(text).unwrap_or_default().into_raw()
        };
        let kernels = described.kernels.iter().map(|kernel| {
            let gpu = kernel.gpu.as_ref().map(|gpu| RawGpu {
                struct_size: size_of::<RawGpu>() as u64,
                source: text(&gpu.text),
                entry: text(&gpu.entry),
                workgroup: gpu.workgroup,
                tile_n: gpu.tile_n,
                tile_m: gpu.tile_m,
                reserved: 0,
            });
            let packs = kernel.layout.is_some();
            let raw = RawKernel {
                struct_size: size_of::<RawKernel>() as u64,
                name: text(&kernel.name),
                layout: kernel.layout.as_deref().map_or(std::ptr::null(), text),
                features: text(&kernel.features),
                operation: kernel.operation,
                target: kernel.target,
                weight_alignment: kernel.weight_alignment,
                row_granule: kernel.row_granule,
                supports: Some(elsewhere::supports),
                packed_size: packs.then_some(elsewhere::packed_size),
                pack: packs.then_some(elsewhere::pack),
                unpack: packs.then_some(elsewhere::unpack),
                workspace_size: None,
                prepare: None,
                run: (kernel.target == TARGET_CPU).then_some(elsewhere::run),
                gpu: gpu.map_or(std::ptr::null(), |gpu| Box::leak(Box::new(gpu))),
                context: std::ptr::null(),
                packed_size_of: None,
                scratch_size: None,
            };
            std::ptr::from_ref::<RawKernel>(Box::leak(Box::new(raw)))
        });
        let kernels: &'static [*const RawKernel] = Vec::leak(kernels.collect());
        let descriptor = RawPlugin {
            struct_size: size_of::<RawPlugin>() as u64,
            abi_major: described.abi.0,
            abi_minor: described.abi.1,
            name: text(&described.name),
            version: text(&described.version),
            kernels: kernels.as_ptr(),
            kernel_count: kernels.len() as u64,
        };
        let origin = Origin::File { path: origin.to_owned(), sha256 };
        // SAFETY: a descriptor of this version, made above of memory that stays, with strings that end with NUL.
        let mut plugin = unsafe { Self::from_descriptor(Box::leak(Box::new(descriptor)), origin) }?;
        plugin.contained = Some(contained);
        Ok(plugin)
    }
}

/// Functions that stand for those in another process. Nothing calls them: [`Kernel`](super::Kernel) asks the process.
mod elsewhere {
    use super::*;

    pub unsafe extern "C" fn supports(_: *const Signature) -> i32 {
        0
    }

    pub unsafe extern "C" fn packed_size(_: u64, _: u64) -> u64 {
        0
    }

    pub unsafe extern "C" fn pack(
        _: *const Weights,
        _: *mut u8,
        _: u64,
        _: u64,
        _: *const Message,
    ) -> Status {
        STATUS_FAILED
    }

    pub unsafe extern "C" fn unpack(
        _: *const Weights,
        _: *mut u8,
        _: u64,
        _: u64,
        _: *const Message,
    ) -> Status {
        STATUS_FAILED
    }

    pub unsafe extern "C" fn run(
        _: *const Weights,
        _: *const Activations,
        _: *const u8,
        _: *const Output,
        _: *const Tile,
        _: *const Message,
    ) -> Status {
        STATUS_FAILED
    }
}
