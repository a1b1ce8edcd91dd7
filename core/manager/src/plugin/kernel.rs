//! A kernel of a checked plugin, and calls of its functions.

use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::sync::{Arc, Mutex};

use bitnet_burn_plugin::abi::{
    self, Kernel as RawKernel, Message, STATUS_OK, Signature, Status, TARGET_CPU, TARGET_CUBECL, TARGET_CUDA,
    TARGET_WGSL,
};

use super::{Declared, GpuSource, Plugin, Target};

/// Bytes of workspace that a kernel may ask for, for `m` rows of activations `stride` bytes apart.
pub(crate) fn max_workspace(m: usize, stride: usize) -> usize {
    64 * (m + 64) * (stride + 4096)
}

/// A kernel of a checked plugin, callable without `unsafe`.
#[derive(Debug)]
pub struct Kernel {
    id: String,
    layout: Option<String>,
    features: Vec<String>,
    gpu: Option<Arc<GpuSource>>,
    plugin: Arc<Plugin>,
    raw: RawKernel,
    /// What it has said of the size of its packing, by [n, k].
    sizes: Mutex<HashMap<(usize, usize), Option<usize>>>,
}

/// Why a kernel's result is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KernelFailure {
    /// The kernel returned a status other than OK.
    Status {
        /// `STATUS_*`.
        status: Status,
        /// The kernel's message, which may be empty.
        message: String,
    },
    /// The kernel asks for more workspace than any kernel needs.
    Workspace {
        /// Bytes that it asks for.
        bytes: usize,
    },
    /// The kernel returned OK, and its result is not that of the reference.
    WrongResult {
        /// Which output differs, and how.
        reason: String,
    },
}

impl std::error::Error for KernelFailure {}

impl std::fmt::Display for KernelFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status { status, message } if message.is_empty() => {
                write!(f, "status {status} ({})", status_name(*status))
            }
            Self::Status { status, message } => {
                write!(f, "status {status} ({}): {message}", status_name(*status))
            }
            Self::Workspace { bytes } => write!(f, "it asks for a workspace of {bytes} bytes"),
            Self::WrongResult { reason } => write!(f, "wrong result: {reason}"),
        }
    }
}

fn status_name(status: Status) -> &'static str {
    match status {
        abi::STATUS_UNSUPPORTED => "unsupported",
        abi::STATUS_INVALID_ARGUMENT => "invalid argument",
        abi::STATUS_FAILED => "failed",
        abi::STATUS_PANICKED => "panicked",
        _ => "unknown",
    }
}

/// Calls `f` with a message buffer and turns its status into a result.
fn call(f: impl FnOnce(*const Message) -> Status) -> Result<(), KernelFailure> {
    let mut buffer = [0 as c_char; 256];
    let message = Message {
        struct_size: size_of::<Message>() as u64,
        text: buffer.as_mut_ptr(),
        capacity: buffer.len() as u64,
    };
    let status = f(&raw const message);
    if status == STATUS_OK {
        return Ok(());
    }
    buffer[buffer.len() - 1] = 0;
    // SAFETY: the last byte is NUL.
    let message = unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned();
    Err(KernelFailure::Status { status, message })
}

impl Kernel {
    pub(super) fn new(plugin: &Arc<Plugin>, declared: &Declared) -> Self {
        Self {
            id: format!("{}/{}", plugin.name, declared.name),
            layout: declared.layout.as_ref().map(|layout| format!("{}/{layout}", plugin.name)),
            features: declared.features.clone(),
            gpu: declared.gpu.clone(),
            plugin: plugin.clone(),
            raw: declared.raw,
            sizes: Mutex::default(),
        }
    }

    /// `plugin/kernel`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it runs.
    pub fn target(&self) -> Target {
        match self.raw.target {
            TARGET_CPU => Target::Cpu,
            TARGET_WGSL => Target::Wgsl,
            TARGET_CUDA => Target::Cuda,
            TARGET_CUBECL => Target::CubeCl,
            other => Target::Unknown(other),
        }
    }

    /// Its text, if it is for a GPU.
    pub fn gpu(&self) -> Option<&GpuSource> {
        self.gpu.as_deref()
    }

    /// `plugin/layout` of its private packing; `None` for the canonical layout.
    pub fn layout(&self) -> Option<&str> {
        self.layout.as_deref()
    }

    /// Features that it needs, of the CPU or of the GPU.
    pub fn features(&self) -> &[String] {
        &self.features
    }

    /// The plugin that brought it.
    pub fn plugin(&self) -> &Arc<Plugin> {
        &self.plugin
    }

    /// Ranges of output features begin at multiples of this.
    pub fn row_granule(&self) -> usize {
        self.raw.row_granule as usize
    }

    /// Alignment of its weights in bytes.
    pub fn weight_alignment(&self) -> usize {
        match self.layout {
            Some(_) => self.raw.weight_alignment as usize,
            None => abi::CANONICAL_ALIGNMENT,
        }
    }

    /// Whether it claims this.
    pub fn supports(&self, signature: &Signature) -> bool {
        let supports = self.raw.supports.expect("checked");
        // SAFETY: a filled signature (ABI).
        unsafe { supports(signature) == 1 }
    }

    /// Bytes of its packing of an [n, k] matrix, of the canonical layout if it has none of its own;
    /// `None` if it can't pack it.
    pub fn weight_bytes(&self, n: usize, k: usize) -> Option<usize> {
        let Some(packed_size) = self.raw.packed_size else {
            return bitnet_burn_plugin::canonical::matrix_bytes(n, k);
        };
        // Asked once: buffers are sized, filled and read by the same answer.
        let mut sizes = self.sizes.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: takes two numbers (ABI).
        *sizes.entry((n, k)).or_insert_with(|| match unsafe { packed_size(n as u64, k as u64) } {
            0 => None,
            // More than 16 bits a weight, plus padding, is no packing but a mistake.
            size if size > (n as u64 + 4096) * (k as u64 + 4096) * 2 => None,
            size => usize::try_from(size).ok(),
        })
    }

    /// Packs rows `rows` of a canonical matrix. Concurrent calls take disjoint ranges that begin at
    /// multiples of [`row_granule`](Self::row_granule).
    ///
    /// # Safety
    /// `packed` has [`weight_bytes`](Self::weight_bytes) writable bytes, aligned as the kernel asks,
    /// and no other access overlaps these rows' part of them.
    pub(crate) unsafe fn pack(
        &self,
        canonical: &abi::Weights,
        packed: *mut u8,
        rows: std::ops::Range<usize>,
    ) -> Result<(), KernelFailure> {
        let pack = self.raw.pack.expect("checked with the layout");
        // SAFETY: the caller's promise, and filled weights.
        call(|message| unsafe { pack(canonical, packed, rows.start as u64, rows.end as u64, message) })
    }

    /// Unpacks rows `rows` to the canonical layout. Concurrent calls take disjoint ranges that begin at
    /// multiples of [`row_granule`](Self::row_granule).
    ///
    /// # Safety
    /// `packed` is filled, `canonical` has room for the whole matrix, and no other access overlaps these
    /// rows' part of it.
    pub(crate) unsafe fn unpack(
        &self,
        packed: &abi::Weights,
        canonical: *mut u8,
        rows: std::ops::Range<usize>,
    ) -> Result<(), KernelFailure> {
        let unpack = self.raw.unpack.expect("checked with the layout");
        // SAFETY: the caller's promise.
        call(|message| unsafe { unpack(packed, canonical, rows.start as u64, rows.end as u64, message) })
    }

    pub(crate) fn workspace_size(&self, signature: &Signature) -> usize {
        // SAFETY: a filled signature (ABI).
        self.raw.workspace_size.map_or(0, |size| unsafe { size(signature) } as usize)
    }

    /// # Safety
    /// Filled activations, and a workspace of [`workspace_size`](Self::workspace_size) bytes.
    pub(crate) unsafe fn prepare(
        &self,
        x: &abi::Activations,
        workspace: *mut u8,
    ) -> Result<(), KernelFailure> {
        match self.raw.prepare {
            None => Ok(()),
            // SAFETY: the caller's promise.
            Some(prepare) => call(|message| unsafe { prepare(x, workspace, message) }),
        }
    }

    /// # Safety
    /// Filled structs whose buffers are as the ABI says, a workspace that `prepare` filled, and a
    /// tile of the output that no other access overlaps.
    pub(crate) unsafe fn run(
        &self,
        weights: &abi::Weights,
        x: &abi::Activations,
        workspace: *const u8,
        y: &abi::Output,
        tile: &abi::Tile,
    ) -> Result<(), KernelFailure> {
        let run = self.raw.run.expect("checked: it is for the CPU");
        // SAFETY: the caller's promise.
        call(|message| unsafe { run(weights, x, workspace, y, tile, message) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_and_failures_speak() {
        let say = |bytes: &[u8], status| {
            call(|message| {
                // SAFETY: `call` passes a filled message.
                let message = unsafe { &*message };
                for (i, &byte) in bytes.iter().enumerate().take(message.capacity as usize) {
                    // SAFETY: within the capacity.
                    unsafe { *message.text.add(i) = byte as c_char };
                }
                status
            })
        };
        assert_eq!(say(b"", STATUS_OK), Ok(()));
        assert_eq!(say(b"out of luck\0", 3).unwrap_err().to_string(), "status 3 (failed): out of luck");
        assert_eq!(say(b"", 77).unwrap_err().to_string(), "status 77 (unknown)");
        // Without a NUL, and no text at all.
        let KernelFailure::Status { message, .. } = say(&[0xff; 400], 1).unwrap_err() else { unreachable!() };
        assert_eq!(message.chars().count(), 255);
    }
}
