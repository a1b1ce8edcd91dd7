//! What other programs take of the processor while something runs here.

/// The processor's time so far, in the system's ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessorTime {
    /// Of all hardware threads.
    all: u64,
    /// In which they computed, for this machine's programs or for its host's.
    busy: u64,
    /// In which they computed for this process.
    own: u64,
}

impl ProcessorTime {
    /// Now; `None` where the system does not tell (it does on Linux).
    pub fn now() -> Option<Self> {
        Self::parse(
            &std::fs::read_to_string("/proc/stat").ok()?,
            &std::fs::read_to_string("/proc/self/stat").ok()?,
        )
    }

    /// Of the texts that Linux has of all and of one process.
    fn parse(all: &str, own: &str) -> Option<Self> {
        let numbers =
            |text: &str| -> Option<Vec<u64>> { text.split_whitespace().map(|n| n.parse().ok()).collect() };
        // user nice system idle iowait irq softirq steal; what follows is in user and nice already.
        let ticks = numbers(all.lines().next()?.strip_prefix("cpu ")?)?;
        let ticks = ticks.get(..8)?;
        let total: u64 = ticks.iter().sum();
        // The name may have spaces and parentheses.
        let fields: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |i: usize| fields.get(i)?.parse::<u64>().ok();
        Some(Self { all: total, busy: total - ticks[3] - ticks[4], own: field(11)? + field(12)? })
    }

    /// The part of the processor that others had since then, 0 to 1; `None` if no time has passed.
    pub fn others_since(&self, then: &Self) -> Option<f64> {
        let of = |value: fn(&Self) -> u64| value(self).checked_sub(value(then));
        let (all, busy, own) = (of(|t| t.all)?, of(|t| t.busy)?, of(|t| t.own)?);
        (all > 0).then(|| busy.saturating_sub(own) as f64 / all as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_who_computes_besides_us() {
        let own = |user: u64, system: u64| {
            format!("7 (a) name) R 1 7 7 0 -1 4194304 100 0 0 0 {user} {system} 0 0 20 0 3 0 100 1000 10")
        };
        let then = ProcessorTime::parse("cpu  100 0 50 800 20 5 5 20 9 0\ncpu0 1", &own(60, 10)).unwrap();
        assert_eq!(then, ProcessorTime { all: 1000, busy: 180, own: 70 });
        let now = ProcessorTime::parse("cpu  700 0 150 1000 20 5 5 120 9 0", &own(560, 40)).unwrap();
        // 1000 ticks more, 800 of them busy, 530 of these ours.
        assert_eq!(now.others_since(&then), Some(0.27));
        assert_eq!(then.others_since(&then), None);
        assert_eq!(then.others_since(&now), None);
        for (all, of_us) in
            [("", &*own(1, 1)), ("cpu  1 2 3", &own(1, 1)), ("cpu  1 2 3 4 5 6 7 8", "7 (a) R 1")]
        {
            assert_eq!(ProcessorTime::parse(all, of_us), None);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells() {
        let now = ProcessorTime::now().unwrap();
        assert!(now.all >= now.busy && now.busy > 0);
    }
}
