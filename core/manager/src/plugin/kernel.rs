//! A kernel of a checked plugin, and calls of its functions.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex};

use bitnet_burn_plugin::abi::{
    self, ABI_MAJOR, ABI_MINOR, Kernel as RawKernel, Message, OPERATION_SCALED_TERNARY_MATMUL,
    OPERATION_TERNARY_MATMUL, STATUS_OK, Signature, Status, TARGET_CPU, TARGET_CUBECL, TARGET_CUDA,
    TARGET_WGSL,
};

use super::{Declared, GpuSource, Layout, Origin, Plugin, Target, shown};
use crate::contained::Contained;
use crate::float::FloatControl;
use crate::process::{Call, within};
use bitnet_burn_plugin::layouts::PUBLIC;

/// Bytes of workspace, or of scratch, that a kernel may ask for, for `m` rows of activations `stride` bytes apart.
pub(crate) fn max_workspace(m: usize, stride: usize) -> usize {
    64 * (m + 64) * (stride + 4096)
}

/// Bytes of a packing, none if the kernel can't pack the shape, or what was wrong with the answer.
type PackedBytes = Result<Option<usize>, KernelFailure>;

/// What a kernel says of the size of its packing, as far as it is possible: 0 is `None`.
///
/// # Errors
/// If that many bytes can't hold the weights (log2(3) bits each), or are absurdly many.
pub(crate) fn check_packed_size(n: usize, k: usize, size: u64) -> PackedBytes {
    if size == 0 {
        return Ok(None);
    }
    let weights = n as u128 * k as u128;
    // log2(3) = 1.58496...
    let least = weights.saturating_mul(158_496).div_ceil(800_000);
    // More than 16 bits a weight, plus padding, is no packing but a mistake.
    let most = (n as u128 + 4096).saturating_mul(k as u128 + 4096).saturating_mul(2);
    match usize::try_from(size) {
        Ok(bytes) if (least..=most).contains(&u128::from(size)) => Ok(Some(bytes)),
        _ => Err(KernelFailure::Forbidden {
            reason: format!(
                "its packed_size of [{n}, {k}] is {size} bytes; ternary weights take at least {least}, and more than {most} \
                 are absurd"
            ),
        }),
    }
}

/// A kernel of a checked plugin, callable without `unsafe`.
#[derive(Debug)]
pub struct Kernel {
    /// As long as the process, as the plugin's code is: a signal handler may show it.
    id: &'static str,
    /// Whether its plugin came from a file.
    from_file: bool,
    /// Which of the plugin's kernels it is.
    number: usize,
    /// How its weights lie.
    layout: Layout,
    /// The layout that the plugin declared.
    declared_layout: Layout,
    features: Vec<String>,
    gpu: Option<Arc<GpuSource>>,
    plugin: Arc<Plugin>,
    raw: RawKernel,
    /// What it has said of the size of its packing, by [n, k].
    sizes: Mutex<HashMap<(usize, usize), PackedBytes>>,
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
    /// The kernel did what none may: it changed the floating-point environment, wrote beside its buffers, or names
    /// an impossible size.
    Forbidden {
        /// What it did.
        reason: String,
    },
}

impl KernelFailure {
    /// Whether nothing that this kernel does can be trusted any more.
    pub fn is_fault(&self) -> bool {
        matches!(self, Self::WrongResult { .. } | Self::Forbidden { .. })
    }
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
            Self::Forbidden { reason } => f.write_str(reason),
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

/// What a function of a plugin returns, if it leaves the floating-point environment as it was. `None`: of one that is
/// linked into the program, which was checked when it was registered.
fn kept<T>(call: Option<Call>, f: impl FnOnce() -> T) -> Result<T, KernelFailure> {
    let Some(call) = call else { return Ok(f()) };
    FloatControl::kept_by(|| within(call, f)).map_err(|reason| KernelFailure::Forbidden { reason })
}

/// Calls `f` with a message buffer, which holds the kernel's context, too; what it returns, and the message.
fn with_message<T>(
    call: Option<Call>,
    context: *const c_void,
    f: impl FnOnce(*const Message) -> T,
    is_needed: impl FnOnce(&T) -> bool,
) -> Result<(T, String), KernelFailure> {
    let mut buffer = [0 as c_char; 256];
    let message = Message {
        struct_size: size_of::<Message>() as u64,
        text: buffer.as_mut_ptr(),
        capacity: buffer.len() as u64,
        context,
    };
    let result = kept(call, || f(&raw const message))?;
    if !is_needed(&result) {
        return Ok((result, String::new()));
    }
    buffer[buffer.len() - 1] = 0;
    // SAFETY: the last byte is NUL.
    let message = unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy();
    Ok((result, shown(&message)))
}

/// Calls `f` with a message buffer and turns its status into a result.
fn call(
    call: Option<Call>,
    context: *const c_void,
    f: impl FnOnce(*const Message) -> Status,
) -> Result<(), KernelFailure> {
    match with_message(call, context, f, |status| *status != STATUS_OK)? {
        (STATUS_OK, _) => Ok(()),
        (status, message) => Err(KernelFailure::Status { status, message }),
    }
}

fn sizes(signature: &Signature) -> [usize; 3] {
    [signature.m as usize, signature.n as usize, signature.k as usize]
}

impl Kernel {
    pub(super) fn new(plugin: &Arc<Plugin>, number: usize, declared: &Declared) -> Self {
        let (mut layout, mut raw) = (declared.layout.clone(), declared.raw);
        if plugin.contained.is_some() && raw.target == TARGET_CPU {
            // Its process reads a copy of its own, which this one makes. (No plugin can name a layout with a plus.)
            let copy = |name: &str| Layout::Private(format!("{}/+{}", plugin.name, name.replace('/', ".")));
            match &layout {
                Layout::Canonical => {
                    layout = copy("canonical");
                    raw.packed_size = Some(copies::size);
                    raw.pack = Some(copies::copy);
                    raw.unpack = Some(copies::copy);
                }
                Layout::Public(public) => layout = copy(public.name),
                Layout::Private(_) | Layout::Unknown(_) => {}
            }
        }
        Self {
            id: format!("{}/{}", plugin.name, declared.name).leak(),
            from_file: matches!(plugin.origin, Origin::File { .. }),
            number,
            layout,
            declared_layout: declared.layout.clone(),
            features: declared.features.clone(),
            gpu: declared.gpu.clone(),
            plugin: plugin.clone(),
            raw,
            sizes: Mutex::default(),
        }
    }

    /// The process that holds it, if that is not this one.
    pub(crate) fn contained(&self) -> Option<&Contained> {
        self.plugin.contained.as_deref()
    }

    /// The process that packs its weights, if this one does not.
    pub(crate) fn packs_elsewhere(&self) -> Option<&Contained> {
        self.contained().filter(|_| matches!(self.declared_layout, Layout::Private(_)))
    }

    /// Which of the plugin's kernels it is.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "nothing is contained elsewhere"))]
    pub(crate) fn number(&self) -> u64 {
        self.number as u64
    }

    /// [`layout`](Self::layout), as the plugin declares it.
    pub(crate) fn declared_layout(&self) -> Option<&str> {
        self.declared_layout.name()
    }

    /// `plugin/kernel`.
    pub fn id(&self) -> &'static str {
        self.id
    }

    /// How a call is entered and watched, if this is not a kernel of the program's own: thousands of its calls make a
    /// token.
    fn call(&self, function: &'static str, shape: [usize; 3]) -> Option<Call> {
        self.from_file.then_some(Call { kernel: self.id, function, shape })
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

    /// `plugin/layout` of its private packing, or a public layout; `None` for the canonical layout.
    pub fn layout(&self) -> Option<&str> {
        self.layout.name()
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
        match self.declared_layout {
            Layout::Canonical => abi::CANONICAL_ALIGNMENT,
            _ => self.raw.weight_alignment as usize,
        }
    }

    /// Why this host can use it nowhere: it is for a target, or computes an operation, of a later minor version.
    pub fn unknown(&self) -> Option<String> {
        let target = self.target();
        match self.raw.operation {
            OPERATION_TERNARY_MATMUL => {}
            OPERATION_SCALED_TERNARY_MATMUL if matches!(target, Target::Cpu | Target::Unknown(_)) => {}
            OPERATION_SCALED_TERNARY_MATMUL => {
                return Some(format!(
                    "it multiplies with many scales on {target}; this host does that on the CPU alone"
                ));
            }
            operation => {
                return Some(format!(
                    "it computes operation {operation}, which this host does not know (ABI {ABI_MAJOR}.{ABI_MINOR} has \
                     {OPERATION_TERNARY_MATMUL}, ternary matmul, and {OPERATION_SCALED_TERNARY_MATMUL}, ternary matmul \
                     with many scales)"
                ));
            }
        }
        match (target, &self.declared_layout) {
            (Target::Unknown(_), _) => Some(format!("it is for {target}, which this host does not know")),
            (_, Layout::Unknown(layout)) => Some(format!(
                "it reads the public layout {layout}, which this host does not know (ABI {ABI_MAJOR}.{ABI_MINOR} has {})",
                PUBLIC.each_ref().map(|layout| layout.name).join(" and ")
            )),
            _ => None,
        }
    }

    /// `OPERATION_*`: what it computes.
    pub fn operation(&self) -> u32 {
        self.raw.operation
    }

    /// Whether it claims this.
    pub fn supports(&self, signature: &Signature) -> bool {
        self.claims(signature).unwrap_or(false)
    }

    /// [`supports`](Self::supports).
    ///
    /// # Errors
    /// If it did something forbidden.
    pub(crate) fn claims(&self, signature: &Signature) -> Result<bool, KernelFailure> {
        // A kernel that this host does not know need not have the function.
        let Some(supports) = self.raw.supports else { return Ok(false) };
        if self.raw.operation != signature.operation {
            return Ok(false);
        }
        if let Some(contained) = self.contained() {
            return contained.claims(self, signature);
        }
        let signature = self.asked(signature);
        // SAFETY: a filled signature (ABI).
        kept(self.call("supports", sizes(&signature)), || unsafe { supports(&raw const signature) } == 1)
    }

    /// Why it does not compute this, in its own words, if it has some.
    pub fn why_not(&self, signature: &Signature) -> Option<String> {
        let supports = self.raw.supports.filter(|_| self.raw.operation == signature.operation)?;
        if let Some(contained) = self.contained() {
            return contained.why_not(self, signature);
        }
        let call = self.call("supports", sizes(signature));
        let ask = |message| {
            let signature = Signature { message, ..self.asked(signature) };
            // SAFETY: a filled signature (ABI).
            unsafe { supports(&raw const signature) }
        };
        let (answer, why) = with_message(call, self.raw.context, ask, |answer| *answer != 1).ok()?;
        (answer != 1 && !why.is_empty()).then_some(why)
    }

    /// A signature as this kernel gets it.
    fn asked(&self, signature: &Signature) -> Signature {
        Signature { context: self.raw.context, ..*signature }
    }

    /// Bytes of its packing of an [n, k] matrix, of the canonical layout if it has none of its own;
    /// `None` if it can't pack it.
    pub fn weight_bytes(&self, n: usize, k: usize) -> Option<usize> {
        self.packed_bytes(n, k).ok().flatten()
    }

    /// [`weight_bytes`](Self::weight_bytes).
    ///
    /// # Errors
    /// If the size is impossible, or it did something forbidden.
    pub(crate) fn packed_bytes(&self, n: usize, k: usize) -> PackedBytes {
        let (with_context, plain) = (self.raw.packed_size_of, self.raw.packed_size);
        if with_context.is_none() && plain.is_none() {
            return Ok(bitnet_burn_plugin::canonical::matrix_bytes(n, k));
        }
        // Asked once: buffers are sized, filled and read by the same answer.
        let mut sizes = self.sizes.lock().unwrap_or_else(|e| e.into_inner());
        let known = sizes.entry((n, k)).or_insert_with(|| {
            if let Some(contained) = self.packs_elsewhere() {
                return contained.packed_bytes(self, (n, k));
            }
            let signature = Signature {
                operation: self.raw.operation,
                ..self.asked(&Signature::ternary(1, n as u64, k as u64, 1))
            };
            let size = kept(self.call("packed_size", [0, n, k]), || match (with_context, plain) {
                // SAFETY: takes a filled signature (ABI).
                (Some(packed_size), _) => unsafe { packed_size(&raw const signature) },
                // SAFETY: takes two numbers (ABI).
                (None, Some(packed_size)) => unsafe { packed_size(n as u64, k as u64) },
                (None, None) => 0,
            })?;
            check_packed_size(n, k, size)
        });
        known.clone()
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
        let at = self.call("pack", [0, canonical.n as usize, canonical.k as usize]);
        // SAFETY: the caller's promise, and filled weights.
        call(at, self.raw.context, |message| unsafe {
            pack(canonical, packed, rows.start as u64, rows.end as u64, message)
        })
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
        let at = self.call("unpack", [0, packed.n as usize, packed.k as usize]);
        // SAFETY: the caller's promise.
        call(at, self.raw.context, |message| unsafe {
            unpack(packed, canonical, rows.start as u64, rows.end as u64, message)
        })
    }

    /// Bytes of workspace that it asks for.
    ///
    /// # Errors
    /// If it did something forbidden.
    pub(crate) fn workspace_size(&self, signature: &Signature) -> Result<usize, KernelFailure> {
        self.asked_size(self.raw.workspace_size, "workspace_size", signature)
    }

    /// Bytes of scratch that it asks for, for each thread.
    ///
    /// # Errors
    /// If it did something forbidden.
    pub(crate) fn scratch_size(&self, signature: &Signature) -> Result<usize, KernelFailure> {
        self.asked_size(self.raw.scratch_size, "scratch_size", signature)
    }

    fn asked_size(
        &self,
        size: Option<unsafe extern "C" fn(*const Signature) -> u64>,
        function: &'static str,
        signature: &Signature,
    ) -> Result<usize, KernelFailure> {
        let Some(size) = size else { return Ok(0) };
        let signature = self.asked(signature);
        // SAFETY: a filled signature (ABI).
        kept(self.call(function, sizes(&signature)), || unsafe { size(&raw const signature) } as usize)
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
            Some(prepare) => {
                let at = self.call("prepare", [x.m as usize, 0, x.k as usize]);
                // SAFETY: the caller's promise.
                call(at, self.raw.context, |message| unsafe { prepare(x, workspace, message) })
            }
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
        let at = self.call("run", [x.m as usize, weights.n as usize, weights.k as usize]);
        // SAFETY: the caller's promise.
        call(at, self.raw.context, |message| unsafe { run(weights, x, workspace, y, tile, message) })
    }
}

/// The packing of weights that stay canonical.
mod copies {
    use bitnet_burn_plugin::abi::{Message, STATUS_OK, Status, Weights};
    use bitnet_burn_plugin::canonical;

    pub unsafe extern "C" fn size(n: u64, k: u64) -> u64 {
        canonical::matrix_bytes(n as usize, k as usize).unwrap_or(0) as u64
    }

    /// # Safety
    /// As for any kernel's `pack` and `unpack`.
    pub unsafe extern "C" fn copy(
        from: *const Weights,
        to: *mut u8,
        n0: u64,
        n1: u64,
        _: *const Message,
    ) -> Status {
        // SAFETY: filled weights, as many rows of which as they say can be read, and written at `to`.
        unsafe {
            let row = canonical::row_bytes((*from).k as usize);
            let (start, bytes) = (n0 as usize * row, (n1 - n0) as usize * row);
            std::ptr::copy_nonoverlapping((*from).data.add(start), to.add(start), bytes);
        }
        STATUS_OK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_and_failures_speak() {
        let say = |bytes: &[u8], status| {
            let at = Some(Call { kernel: "test", function: "run", shape: [0; 3] });
            call(at, std::ptr::null(), |message| {
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
        // On one line.
        let text = say(b"no luck\nkernel other passed\x1b[2J\0", 3).unwrap_err().to_string();
        assert_eq!(text, "status 3 (failed): no luck kernel other passed\u{fffd}[2J");
    }

    #[test]
    fn sizes_that_cannot_hold_the_weights_are_faults() {
        // 8 * 100 weights, 1.585 bits each: 158.5 bytes.
        assert_eq!(check_packed_size(8, 100, 159), Ok(Some(159)));
        assert_eq!(check_packed_size(8, 100, 0), Ok(None));
        let most = (8 + 4096) * (100 + 4096) * 2;
        assert_eq!(check_packed_size(8, 100, most), Ok(Some(most as usize)));
        for size in [1, 158, most + 1, u64::MAX] {
            let failure = check_packed_size(8, 100, size).unwrap_err();
            assert!(
                failure.is_fault() && failure.to_string().contains(&format!("is {size} bytes")),
                "{failure}"
            );
        }
        // The densest packing that there is: five weights a byte.
        assert_eq!(
            check_packed_size(1 << 20, 1 << 20, (1u64 << 40).div_ceil(5)),
            Ok(Some((1usize << 40).div_ceil(5)))
        );
        assert!(check_packed_size(usize::MAX, usize::MAX, u64::MAX).is_err());
    }
}
