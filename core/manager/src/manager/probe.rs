//! What the manager asks the machine while it works: the time, and how much memory is left. Tests ask
//! something else.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

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

    /// From `/proc/meminfo`, where there is one.
    fn memory(&self) -> Option<Memory> {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let bytes = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name))?;
            value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
        };
        Some(Memory { available: bytes("MemAvailable:")?, total: bytes("MemTotal:")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_answers() {
        let before = Machine.now();
        assert!(Machine.now() >= before);
        if cfg!(target_os = "linux") {
            let Memory { available, total } = Machine.memory().unwrap();
            assert!(available > 0 && available <= total, "{available} of {total}");
        }
    }
}
