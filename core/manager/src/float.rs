//! The floating-point environment of a thread, which a kernel must leave as it found it: with another rounding mode,
//! or with subnormals flushed to zero, all later kernels on the thread would compute other bits.

/// The control bits of this thread's floating-point unit: rounding, flushing of subnormals, masked
/// exceptions. The sticky exception flags are left out: arithmetic sets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FloatControl(u64);

impl FloatControl {
    #[inline]
    pub fn of_this_thread() -> Self {
        Self(read())
    }

    /// Compares this thread's control bits with these and, if they differ, sets them to these again.
    ///
    /// # Errors
    /// What had changed.
    #[inline]
    pub fn restore(self) -> Result<(), String> {
        let now = read();
        if now == self.0 {
            return Ok(());
        }
        write(self.0);
        Err(format!("it changed the floating-point environment ({REGISTER} {now:#x}, before {:#x})", self.0))
    }

    /// What `f` returns.
    ///
    /// # Errors
    /// If `f` changed this thread's control bits. They are set back.
    #[inline]
    pub fn kept_by<T>(f: impl FnOnce() -> T) -> Result<T, String> {
        let before = Self::of_this_thread();
        let result = f();
        before.restore().map(|()| result)
    }
}

/// Sticky exception flags of MXCSR.
#[cfg(target_arch = "x86_64")]
const FLAGS: u32 = 0x3f;

#[cfg(target_arch = "x86_64")]
const REGISTER: &str = "x87 control word and MXCSR";

#[cfg(target_arch = "x86_64")]
#[inline]
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
#[inline]
fn read() -> u64 {
    let fpcr: u64;
    // SAFETY: reads a register that every program may read.
    unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) fpcr, options(nostack, preserves_flags)) };
    fpcr
}

#[cfg(target_arch = "aarch64")]
fn write(control: u64) {
    // SAFETY: puts back the value that `read` found, and with that the environment that compiled code
    // expects.
    unsafe { std::arch::asm!("msr fpcr, {}", in(reg) control, options(nostack, preserves_flags)) };
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

#[cfg(test)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tests {
    use super::*;

    #[test]
    fn changed_control_bits_are_seen_and_undone_and_flags_are_not() {
        let before = FloatControl::of_this_thread();
        // Inexact and overflow: flags.
        let infinite = || (std::hint::black_box(1e30_f32) * std::hint::black_box(1e30)).is_infinite();
        assert_eq!(FloatControl::kept_by(infinite), Ok(true));
        // Towards zero; subnormals count as zero.
        let bits: &[u64] = if cfg!(target_arch = "x86_64") {
            &[3 << 13, 1 << 15, 1 << 6, 3 << 42]
        } else {
            &[3 << 22, 1 << 24]
        };
        for bits in bits {
            let changed = FloatControl::kept_by(|| write(before.0 ^ *bits)).unwrap_err();
            assert!(changed.contains("floating-point environment"), "{changed}");
            assert_eq!(FloatControl::of_this_thread(), before);
        }
        assert_eq!(before.restore(), Ok(()));
    }
}
