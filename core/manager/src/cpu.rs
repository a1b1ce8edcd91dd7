//! What this machine's processor is and can do.

use std::sync::OnceLock;

use bitnet_burn_plugin::features::{self, Features};
use serde::{Deserialize, Serialize};

/// Names of the CPU features that kernels may ask for and this machine has, masked or not.
pub fn features() -> &'static [&'static str] {
    static FEATURES: OnceLock<Vec<&'static str>> = OnceLock::new();
    FEATURES.get_or_init(|| features::detected().names().collect())
}

/// The features that a kernel needs and may not use here, in a phrase: the machine lacks them, the manager or the
/// process masks them, or their names are unknown.
pub(crate) fn lacking(needed: &[String], masked: &[String]) -> Option<String> {
    let missing: Vec<_> = needed
        .iter()
        .filter_map(|name| {
            if masked.contains(name) {
                return Some(format!("{name} (masked)"));
            }
            match Features::named(name) {
                Err(_) => Some(format!("{name} (unknown name; the host knows {})", features::NAMES_TEXT)),
                Ok(feature) if !features::detected().contains(feature) => Some(name.clone()),
                Ok(feature) if !features::has(feature) => Some(format!("{name} (masked)")),
                Ok(_) => None,
            }
        })
        .collect();
    (!missing.is_empty()).then(|| format!("needs {}", missing.join(", ")))
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
