//! A call as both processes see it: plain data in shared memory, and the number that says whose turn it is.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bitnet_burn_plugin::abi::{OPERATION_SCALED_TERNARY_MATMUL, SCALE_F16, Signature};

use super::MAX_PARTS;
use crate::manager::{ScaleKind, WeightShape};
use crate::plugin::KernelFailure;

/// Bytes of the shared file before the outputs.
pub(super) const OUTPUTS: usize = 64 << 10;
/// Bytes of outputs of one call, at most.
pub(super) const MOST_OUTPUTS: usize = 16 << 30;
/// Bytes of inputs of one call, at most. The weights are behind them.
pub(super) const MOST_INPUTS: usize = 16 << 30;

/// The beginning of the file that both write.
#[repr(C, align(64))]
pub(super) struct Control {
    /// Odd while the child is asked. Both count on.
    turn: AtomicU32,
    host_sleeps: AtomicU32,
    child_sleeps: AtomicU32,
    request: UnsafeCell<Request>,
    reply: UnsafeCell<Reply>,
}

const _: () = assert!(size_of::<Control>() <= OUTPUTS);

/// What the child is to do.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Request {
    /// One of `ASK_*`.
    pub what: u64,
    /// Number of the kernel in the plugin.
    pub kernel: u64,
    pub asked: Asked,
    /// Pack and unpack: where the weights are in the inputs, and their bytes.
    pub weights: u64,
    pub bytes: u64,
    pub x: Rows,
    pub parts: u64,
    pub part: [PartOf; MAX_PARTS],
    /// Multiply: elements from row to row of the outputs.
    pub stride: u64,
}

/// Say what the plugin is.
pub(super) const DESCRIBE: u64 = 1;
pub(super) const CLAIMS: u64 = 2;
pub(super) const WHY_NOT: u64 = 3;
pub(super) const PACKED_BYTES: u64 = 4;
pub(super) const PACK: u64 = 5;
pub(super) const UNPACK: u64 = 6;
pub(super) const MULTIPLY: u64 = 7;

/// A signature.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Asked {
    pub m: u64,
    pub n: u64,
    pub k: u64,
    pub operation: u64,
    pub weight_group: u64,
    pub activation_group: u64,
    pub scale_format: u64,
    pub threads: u64,
}

impl From<&Signature> for Asked {
    fn from(signature: &Signature) -> Self {
        Self {
            m: signature.m,
            n: signature.n,
            k: signature.k,
            operation: signature.operation.into(),
            weight_group: signature.weight_group,
            activation_group: signature.activation_group,
            scale_format: signature.scale_format.into(),
            threads: signature.threads.into(),
        }
    }
}

impl Asked {
    pub fn shape(&self) -> WeightShape {
        let scales = match self.operation as u32 {
            OPERATION_SCALED_TERNARY_MATMUL => ScaleKind::Groups {
                weights: self.weight_group as usize,
                activations: self.activation_group as usize,
                half: self.scale_format as u32 == SCALE_F16,
            },
            _ => ScaleKind::One,
        };
        WeightShape { n: self.n as usize, k: self.k as usize, scales }
    }

    pub fn signature(&self) -> Signature {
        self.shape().signature(self.m as usize, self.threads as usize)
    }
}

/// Activations: places in the inputs.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Rows {
    pub m: u64,
    pub k: u64,
    pub stride: u64,
    pub group: u64,
    pub q: u64,
    pub scale: u64,
    pub sum: u64,
}

/// One matrix of a multiplication: places in the inputs.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct PartOf {
    pub kernel: u64,
    pub asked: Asked,
    pub weights: u64,
    pub bytes: u64,
    pub scale: u64,
    /// 0 where there is one scale.
    pub scales: u64,
    pub group: u64,
    pub column: u64,
}

/// What the child says.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Reply {
    /// An answer, or the bytes of one in the outputs.
    pub value: u64,
    pub failed: [FailureOf; MAX_PARTS],
}

/// Why a matrix was not computed. 0 is no failure.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct FailureOf {
    pub kind: u64,
    pub value: u64,
    pub text: [u8; 496],
}

impl FailureOf {
    pub const NONE: Self = Self { kind: 0, value: 0, text: [0; 496] };

    pub fn new(failure: Option<&KernelFailure>) -> Self {
        let (kind, value, text) = match failure {
            None => return Self::NONE,
            Some(KernelFailure::Status { status, message }) => (1, *status as u32 as u64, message.as_str()),
            Some(KernelFailure::Workspace { bytes }) => (2, *bytes as u64, ""),
            Some(KernelFailure::WrongResult { reason }) => (3, 0, reason.as_str()),
            Some(KernelFailure::Forbidden { reason }) => (4, 0, reason.as_str()),
        };
        let mut cut = Self { kind, value, ..Self::NONE };
        let length = text.len().min(cut.text.len());
        cut.text[..length].copy_from_slice(&text.as_bytes()[..length]);
        cut
    }

    /// As the other side wrote it: anything.
    pub fn read(&self) -> Option<KernelFailure> {
        let text = self.text.split(|&byte| byte == 0).next().unwrap_or_default();
        let text = crate::plugin::shown(&String::from_utf8_lossy(text));
        Some(match self.kind {
            0 => return None,
            1 => KernelFailure::Status { status: self.value as i32, message: text },
            2 => KernelFailure::Workspace { bytes: self.value as usize },
            3 => KernelFailure::WrongResult { reason: text },
            _ => KernelFailure::Forbidden { reason: text },
        })
    }
}

impl Control {
    /// The whole of it, at the beginning of a file.
    ///
    /// # Safety
    /// `base` is the beginning of a mapped file of at least [`OUTPUTS`] bytes, which stays for as long as the reference.
    pub unsafe fn at<'a>(base: *mut u8) -> &'a Self {
        // SAFETY: pages are aligned, and all bytes are valid; what the other process may write at any time is in atomics
        // and cells, and is read through pointers.
        unsafe { &*base.cast::<Self>() }
    }

    pub fn turn(&self) -> u32 {
        self.turn.load(Ordering::Acquire)
    }

    /// A new child begins with a request.
    pub fn restart(&self, request: &Request) {
        self.child_sleeps.store(0, Ordering::Relaxed);
        self.host_sleeps.store(0, Ordering::Relaxed);
        self.ask(0, request);
    }

    /// Hands a request to the child, whose last answer was `turn`; the number of the answer to wait for.
    pub fn ask(&self, turn: u32, request: &Request) -> u32 {
        // SAFETY: plain data, in memory that is ours; the child reads it after the turn has changed.
        unsafe { self.request.get().write_volatile(*request) };
        self.give(turn.wrapping_add(1), &self.child_sleeps);
        turn.wrapping_add(2)
    }

    /// The request, on the child's side.
    pub fn request(&self) -> Request {
        // SAFETY: plain data of which all bits are valid.
        unsafe { self.request.get().read_volatile() }
    }

    /// Answers a request that came with `turn`.
    pub fn answer(&self, turn: u32, value: u64, failed: &[Option<KernelFailure>]) {
        let reply = self.reply.get();
        // SAFETY: plain data within the reply; the host reads it after the turn has changed.
        unsafe {
            (&raw mut (*reply).value).write_volatile(value);
            for (i, failure) in failed.iter().enumerate().take(MAX_PARTS) {
                let place = &raw mut (*reply).failed[i];
                match failure {
                    None => (&raw mut (*place).kind).write_volatile(0),
                    Some(failure) => place.write_volatile(FailureOf::new(Some(failure))),
                }
            }
        }
        self.give(turn.wrapping_add(1), &self.host_sleeps);
    }

    /// The answer's number.
    pub fn value(&self) -> u64 {
        // SAFETY: a number; all bits are valid.
        unsafe { (&raw const (*self.reply.get()).value).read_volatile() }
    }

    /// How matrix `i` of the answer failed.
    pub fn failure(&self, i: usize) -> Option<KernelFailure> {
        // SAFETY: plain data of which all bits are valid; read once.
        unsafe {
            let place = &raw const (*self.reply.get()).failed[i];
            match (&raw const (*place).kind).read_volatile() {
                0 => None,
                _ => place.read_volatile().read(),
            }
        }
    }

    /// Whoever sleeps announces that before looking at the turn, and this looks for sleepers after changing it: one of them
    /// sees the other.
    fn give(&self, turn: u32, sleeps: &AtomicU32) {
        self.turn.store(turn, Ordering::SeqCst);
        if sleeps.load(Ordering::SeqCst) != 0 {
            self.wake();
        }
    }

    /// Wakes who sleeps.
    pub fn wake(&self) {
        // SAFETY: a number that lives as long as the mapping; the system reads its address alone.
        unsafe { libc::syscall(libc::SYS_futex, self.turn.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }

    /// Sleeps while the turn is `turn`, for a while at most.
    fn sleep(&self, turn: u32, sleeps: &AtomicU32, most: Duration) {
        sleeps.store(1, Ordering::SeqCst);
        let time = libc::timespec {
            tv_sec: most.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(most.subsec_nanos()),
        };
        // SAFETY: as above, and a time that lives during the call. That another value is there already, a signal, and the
        // end of the time are what the caller looks for itself.
        unsafe {
            libc::syscall(libc::SYS_futex, self.turn.as_ptr(), libc::FUTEX_WAIT, turn, &raw const time)
        };
        sleeps.store(0, Ordering::SeqCst);
    }

    pub fn host_sleeps(&self, turn: u32, most: Duration) {
        self.sleep(turn, &self.host_sleeps, most);
    }

    pub fn child_sleeps(&self, turn: u32) {
        self.sleep(turn, &self.child_sleeps, Duration::from_secs(3600));
    }
}
