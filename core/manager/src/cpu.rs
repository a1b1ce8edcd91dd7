//! What this machine's processor is and can do.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

/// Names (Rust's) of the CPU features that kernels may ask for and this machine has.
pub fn features() -> &'static [&'static str] {
    static FEATURES: OnceLock<Vec<&'static str>> = OnceLock::new();
    FEATURES.get_or_init(detect)
}

/// Which of the features that a kernel needs the machine lacks, or is to act as if it did, in words.
pub(crate) fn lacking(needed: &[String], masked: &[String]) -> Option<String> {
    let missing: Vec<_> = needed
        .iter()
        .filter_map(|feature| {
            if masked.contains(feature) {
                Some(format!("{feature} (masked)"))
            } else if !features().contains(&feature.as_str()) {
                Some(feature.clone())
            } else {
                None
            }
        })
        .collect();
    (!missing.is_empty()).then(|| format!("needs {}", missing.join(", ")))
}

macro_rules! detected {
    ($detect:ident: $($name:tt),+ $(,)?) => {{
        let mut found = Vec::new();
        $(if std::arch::$detect!($name) { found.push($name); })+
        found
    }};
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<&'static str> {
    let mut found = detected!(is_x86_feature_detected:
        "sse2", "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi1", "bmi2",
        "gfni", "vaes", "vpclmulqdq", "avxvnni", "avxifma", "avxvnniint8", "avxvnniint16", "avx512f",
        "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni", "avx512vbmi", "avx512vbmi2",
        "avx512bitalg", "avx512vpopcntdq", "avx512ifma", "avx512bf16", "avx512fp16",
    );
    // Whether a process may use the tiles' registers, the kernels that do have to ask the system.
    let leaves = std::arch::x86_64::__cpuid(0).eax;
    let bits = if leaves >= 7 { std::arch::x86_64::__cpuid_count(7, 0).edx } else { 0 };
    for (bit, name) in [(22, "amx-bf16"), (24, "amx-tile"), (25, "amx-int8")] {
        if bits & (1 << bit) != 0 {
            found.push(name);
        }
    }
    found
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Vec<&'static str> {
    detected!(is_aarch64_feature_detected: "neon", "dotprod", "i8mm", "fp16", "bf16", "sve", "sve2")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Vec<&'static str> {
    Vec::new()
}

/// The processor's name as the system gives it, or its architecture.
pub fn model() -> &'static str {
    static MODEL: OnceLock<String> = OnceLock::new();
    MODEL.get_or_init(|| {
        let from_file = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("model name") || l.starts_with("Model"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        });
        from_file.filter(|name| !name.is_empty()).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
    })
}

/// Physical cores that this process may use: the number of threads that compute-bound work wants.
/// Counts what the scheduler and control groups allow where the system tells, hardware threads of
/// one core once.
pub fn physical_cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    physical_in_sysfs().map_or(allowed, |cores| cores.clamp(1, allowed))
}

fn physical_in_sysfs() -> Option<usize> {
    let mut cores = std::collections::HashSet::new();
    for entry in std::fs::read_dir("/sys/devices/system/cpu").ok()? {
        let topology = entry.ok()?.path().join("topology");
        let read = |name: &str| std::fs::read_to_string(topology.join(name)).ok();
        if let (Some(package), Some(core)) = (read("physical_package_id"), read("core_id")) {
            cores.insert((package, core));
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

/// The hardware threads that this process may run on, one of each physical core before the second ones; empty
/// where the system does not tell.
pub fn by_cores() -> Vec<core_affinity::CoreId> {
    let topology = |id: usize, name: &str| {
        std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{id}/topology/{name}")).ok()
    };
    let mut seen = std::collections::HashMap::new();
    let mut ids: Vec<_> = core_affinity::get_core_ids()
        .unwrap_or_default()
        .into_iter()
        .map(|core| {
            // What is not told is a core of its own.
            let place = topology(core.id, "physical_package_id").zip(topology(core.id, "core_id"));
            let turn: &mut usize = seen.entry(place.ok_or(core.id)).or_default();
            *turn += 1;
            (*turn, core)
        })
        .collect();
    ids.sort_by_key(|&(turn, core)| (turn, core.id));
    ids.into_iter().map(|(_, core)| core).collect()
}

/// A cache of the first core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// 1, 2, 3 ...
    pub level: u32,
    /// Its size.
    pub bytes: usize,
}

/// The caches of data of the first core, where the system tells, by level.
pub fn caches() -> Vec<Cache> {
    let cache = |index: usize| {
        let read = |name: &str| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
            Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
        };
        let text = read("size")?;
        let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let factor = match unit {
            "K" => 1 << 10,
            "M" => 1 << 20,
            _ => 1,
        };
        if read("type").is_some_and(|kind| kind == "Instruction") {
            return None;
        }
        let bytes = digits.parse::<usize>().ok()?.checked_mul(factor)?;
        Some(Cache { level: read("level").and_then(|level| level.parse().ok()).unwrap_or(0), bytes })
    };
    let mut caches: Vec<Cache> = (0..8).filter_map(cache).collect();
    caches.sort_by_key(|cache| cache.level);
    caches
}

/// Bytes of the largest cache level, where the system tells.
pub fn last_level_cache() -> Option<usize> {
    caches().iter().map(|cache| cache.bytes).max()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_machine_is_described() {
        assert!(super::physical_cores() >= 1);
        let mut ids: Vec<usize> = super::by_cores().into_iter().map(|core| core.id).collect();
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), count);
        assert!(!super::model().is_empty());
    }
}
