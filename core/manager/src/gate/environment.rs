//! What a kernel must leave as it found it: the floating-point environment, and the process's threads.

/// The control bits of this thread's floating-point unit: rounding, flushing of subnormals, masked
/// exceptions. The sticky exception flags are left out: arithmetic sets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FloatControl(u64);

impl FloatControl {
    pub fn of_this_thread() -> Self {
        Self(read())
    }

    /// Sets this thread's control bits.
    pub fn restore(self) {
        write(self.0);
    }

    /// What has changed since.
    pub fn changed(self) -> Option<String> {
        let now = read();
        (now != self.0).then(|| {
            format!("it changed the floating-point environment ({REGISTER} {:#x}, before {:#x})", now, self.0)
        })
    }
}

/// Sticky exception flags of MXCSR.
#[cfg(target_arch = "x86_64")]
const FLAGS: u32 = 0x3f;

#[cfg(target_arch = "x86_64")]
const REGISTER: &str = "x87 control word and MXCSR";

#[cfg(target_arch = "x86_64")]
fn read() -> u64 {
    let (mut mxcsr, mut x87) = (0u32, 0u16);
    // SAFETY: both instructions store a register into the variable whose address they are given.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack, preserves_flags));
        std::arch::asm!("fnstcw [{}]", in(reg) &raw mut x87, options(nostack, preserves_flags));
    }
    u64::from(x87) << 32 | u64::from(mxcsr & !FLAGS)
}

#[cfg(target_arch = "x86_64")]
fn write(control: u64) {
    let (mxcsr, x87) = (control as u32, (control >> 32) as u16);
    // SAFETY: puts back values that `read` found on this machine (with the flags clear, which is always
    // valid), and with that the environment that compiled code expects.
    unsafe {
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr, options(nostack, preserves_flags));
        std::arch::asm!("fldcw [{}]", in(reg) &raw const x87, options(nostack, preserves_flags));
    }
}

#[cfg(target_arch = "aarch64")]
const REGISTER: &str = "FPCR";

#[cfg(target_arch = "aarch64")]
fn read() -> u64 {
    let fpcr: u64;
    // SAFETY: reads a register that every program may read.
    unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) fpcr, options(nomem, nostack, preserves_flags)) };
    fpcr
}

#[cfg(target_arch = "aarch64")]
fn write(control: u64) {
    // SAFETY: puts back the value that `read` found, and with that the environment that compiled code
    // expects.
    unsafe { std::arch::asm!("msr fpcr, {}", in(reg) control, options(nomem, nostack, preserves_flags)) };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const REGISTER: &str = "unknown";

/// Nothing is known of this architecture's registers: nothing changes.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn read() -> u64 {
    0
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn write(_: u64) {}

/// Threads of this process, where the system tells (Linux).
pub(super) fn threads() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

/// Whether there are more threads than `before`, for longer than a thread that was joined needs to go.
pub(super) fn more_threads_than(before: Option<usize>) -> Option<usize> {
    let before = before?;
    let mut now = threads()?;
    for _ in 0..50 {
        if now <= before {
            return None;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
        now = threads()?;
    }
    (now > before).then(|| now - before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn a_changed_rounding_mode_is_seen_and_undone_and_flags_are_not() {
        let before = FloatControl::of_this_thread();
        // Inexact and overflow: flags.
        assert!((std::hint::black_box(1e30_f32) * std::hint::black_box(1e30)).is_infinite());
        assert_eq!(before.changed(), None);
        // Round towards zero.
        let bits = if cfg!(target_arch = "x86_64") { 3 << 13 } else { 3 << 22 };
        FloatControl(before.0 | bits).restore();
        let changed = before.changed();
        before.restore();
        assert!(changed.unwrap().contains("floating-point environment"));
        assert_eq!(before.changed(), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_that_stays_is_counted() {
        let before = threads();
        assert!(before.is_some());
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || receiver.recv());
        // Other tests' threads come and go: at least this one is more.
        assert!(threads() >= Some(2));
        drop(sender);
        assert!(thread.join().unwrap().is_err());
    }
}
