//! What the manager asks the machine while it works: the time, and how much memory is left. Tests ask
//! something else.

#![cfg_attr(any(target_os = "macos", windows), allow(unsafe_code, reason = "two systems' functions"))]

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Memory of a machine, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// What programs can have without that others are swapped out.
    pub available: u64,
    /// All there is.
    pub total: u64,
}

/// A clock and a look at the memory. See [`ManagerConfig::probe`](super::ManagerConfig::probe).
pub trait Probe: std::fmt::Debug + Send + Sync {
    /// Time since any moment that stays the same; never less than before.
    fn now(&self) -> Duration;

    /// The memory; `None` where it is unknown.
    fn memory(&self) -> Option<Memory>;
}

/// The machine at hand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine;

impl Probe for Machine {
    fn now(&self) -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }

    fn memory(&self) -> Option<Memory> {
        let kind = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(kind);
        let memory = Memory { available: system.available_memory(), total: system.total_memory() };
        (memory.total > 0).then_some(memory)
    }
}

/// Peak of this process's resident memory in bytes; `None` if the system does not report it (Linux, macOS and Windows do).
pub fn peak_memory() -> Option<u64> {
    // Not getrusage, which on Linux counts the program that this process was before `exec`.
    #[cfg(target_os = "linux")]
    {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }
    #[cfg(target_os = "macos")]
    {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the system fills the struct, which is valid as zeros, too.
        let usage = unsafe {
            (libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) == 0).then(|| usage.assume_init())?
        };
        // In bytes there.
        u64::try_from(usage.ru_maxrss).ok()
    }
    #[cfg(windows)]
    {
        use windows_sys::Win32::System::ProcessStatus::{GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS};
        use windows_sys::Win32::System::Threading::GetCurrentProcess;

        let mut counters = PROCESS_MEMORY_COUNTERS::default();
        let size = size_of::<PROCESS_MEMORY_COUNTERS>() as u32;
        // SAFETY: the system fills a struct of this size.
        let found = unsafe { GetProcessMemoryInfo(GetCurrentProcess(), &raw mut counters, size) } != 0;
        found.then_some(counters.PeakWorkingSetSize as u64)
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos", windows)))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_answers() {
        let before = Machine.now();
        assert!(Machine.now() >= before);
        if cfg!(any(target_os = "linux", target_os = "macos", windows)) {
            let Memory { available, total } = Machine.memory().unwrap();
            assert!(available > 0 && available <= total, "{available} of {total}");
            let before = peak_memory().unwrap();
            let block = std::hint::black_box(vec![1u8; 64 << 20]);
            assert!(peak_memory().unwrap() >= before.max(64 << 20));
            drop(block);
            assert!(peak_memory().unwrap() <= total);
        }
    }
}
