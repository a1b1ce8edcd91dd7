//! What a machine is and can do, as plain data: this one's, or another one's that somebody wrote down.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use bitnet_burn_backends::devices;
use bitnet_burn_formats::files;
use bitnet_burn_manager::LOW_MEMORY;
use bitnet_burn_manager::cpu::{self, Cache};
use bitnet_burn_manager::pool::Pool;
use serde::{Deserialize, Serialize};

use super::CPU;
use crate::bench::{ReadStream, Roof};
use bitnet_burn::CacheType;

/// A machine. Written as JSON by `bitnet plan --print-machine`, and read by `--machine`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineProfile {
    /// The processor.
    pub cpu: CpuProfile,
    /// Main memory; absent where the system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryProfile>,
    /// GPUs, and what stands in for them.
    #[serde(default)]
    pub gpus: Vec<GpuProfile>,
    /// What could not be found out, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// A processor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuProfile {
    /// Its name.
    #[serde(default)]
    pub model: String,
    /// Cores that this process may use, hardware threads of one counted once; absent where the system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_cores: Option<usize>,
    /// Hardware threads that this process may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical_cores: Option<usize>,
    /// The caches of the first core.
    #[serde(default)]
    pub caches: Vec<Cache>,
    /// What kernels may ask for.
    #[serde(default)]
    pub features: Vec<String>,
    /// What was measured, by numbers of threads.
    #[serde(default)]
    pub rates: Vec<CpuRate>,
}

/// What so many threads do at most ([`Roof`]), in 10^9 a second, and what models have reached of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuRate {
    /// Threads.
    pub threads: usize,
    /// Bytes that a read-only stream gets from memory.
    pub read_gb_per_s: f64,
    /// int8 multiply-adds on registers alone; absent where the built-in kernels have no instruction for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multiply_adds_g_per_s: Option<f64>,
    /// What the last measured run reached of the predicted decode speed; absent before there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_efficiency: Option<f64>,
    /// The same for prefill.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_efficiency: Option<f64>,
}

/// Main memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryProfile {
    /// All that this process might have: the machine's, or its control group's.
    pub total_bytes: u64,
    /// What it can have now without that others are swapped out.
    pub available_bytes: u64,
}

/// A GPU, or what stands in for one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuProfile {
    /// What `--device` takes: `wgpu:0`, `metal:0`, `cuda:1`, `rocm:0`.
    pub device: String,
    /// As its driver names it.
    #[serde(default)]
    pub name: String,
    /// Whether no card computes, but a program on the CPU (lavapipe and the like).
    #[serde(default)]
    pub software: bool,
    /// Its memory; absent where the driver does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// The largest buffer that can be had at once, where there is a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_allocation_bytes: Option<u64>,
    /// What its kernels may use.
    #[serde(default)]
    pub features: Vec<String>,
    /// Types that it computes with: `f32`, `f16`, `i8` ...
    #[serde(default)]
    pub precisions: Vec<String>,
    /// 10^9 bytes a second that it reads from its memory; absent where that was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_gb_per_s: Option<f64>,
    /// 10^9 f32 multiply-adds a second; absent where that was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multiply_adds_g_per_s: Option<f64>,
}

/// Why a machine's profile can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It can't be read.
    #[error("{}: cannot read the machine's profile: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is no profile.
    #[error("{}: not a machine's profile (`bitnet plan --print-machine` prints one): {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// A profile is some thousand bytes.
const MAX_BYTES: u64 = 1 << 20;

impl MachineProfile {
    /// A profile that was written down.
    ///
    /// # Errors
    /// If the file is not there, or holds something else, or values that no machine has.
    pub fn read(path: &Path) -> Result<Self, ProfileError> {
        let invalid = |problem: String| ProfileError::Invalid { path: path.to_owned(), problem };
        let text = read_text(path).map_err(|error| ProfileError::Read { path: path.to_owned(), error })?;
        let profile: Self = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        profile.validate().map_err(invalid)?;
        Ok(profile)
    }

    /// That the values are those of a machine.
    fn validate(&self) -> Result<(), String> {
        let cores = [self.cpu.physical_cores, self.cpu.logical_cores];
        let threads = self.cpu.rates.iter().map(|rate| Some(rate.threads));
        for count in cores.into_iter().chain(threads).flatten() {
            if !(1..=1 << 16).contains(&count) {
                return Err(format!("{count} cores or threads; it must be between 1 and 65536"));
            }
        }
        let of_cpu = self.cpu.rates.iter().flat_map(|rate| {
            let CpuRate {
                read_gb_per_s, multiply_adds_g_per_s, decode_efficiency, prefill_efficiency, ..
            } = *rate;
            [Some(read_gb_per_s), multiply_adds_g_per_s, decode_efficiency, prefill_efficiency]
        });
        let of_gpus = self.gpus.iter().flat_map(|gpu| [gpu.read_gb_per_s, gpu.multiply_adds_g_per_s]);
        for rate in of_cpu.chain(of_gpus).flatten() {
            if !(rate > 0.0 && rate < 1e12) {
                return Err(format!("a rate of {rate}; it must be above 0 and below 1e12"));
            }
        }
        for (i, gpu) in self.gpus.iter().enumerate() {
            if gpu.device.is_empty() || gpu.device == CPU {
                return Err(format!("GPU {i} has the device {:?}; it is named like wgpu:0", gpu.device));
            }
            if self.gpus[..i].iter().any(|other| other.device == gpu.device) {
                return Err(format!("two GPUs have the device {:?}", gpu.device));
            }
        }
        match self.memory {
            Some(MemoryProfile { total_bytes, available_bytes }) if available_bytes > total_bytes => {
                Err(format!("{available_bytes} bytes of memory available of {total_bytes}"))
            }
            _ => Ok(()),
        }
    }

    /// This machine. What was measured before is taken from `cache_dir`; without `measure`, what was not, stays
    /// unknown. Threads to measure are one, half of the cores and all of them, and those asked for.
    pub fn detect(cache_dir: Option<&Path>, measure: Measure, threads: Option<usize>) -> Self {
        let logical_cores = std::thread::available_parallelism().ok().map(usize::from);
        let mut problems = Vec::new();
        let physical_cores = logical_cores.map(|_| cpu::physical_cores());
        if physical_cores.is_none() {
            problems.push("the system does not tell the number of cores".to_owned());
        }
        let memory = memory();
        if memory.is_none() {
            problems.push("the system does not tell how much memory there is".to_owned());
        }
        let mut known = match measure {
            Measure::Afresh => Measurements::default(),
            Measure::Missing | Measure::Nothing => Measurements::read(cache_dir).unwrap_or_default(),
        };
        let cores = physical_cores.unwrap_or(1);
        let mut changed = false;
        let mut counts = vec![1, cores.div_ceil(2), cores];
        counts.extend(threads);
        counts.sort_unstable();
        counts.dedup();
        if measure != Measure::Nothing {
            for threads in counts {
                if known.rates.iter().all(|rate| rate.threads != threads) {
                    match measured(threads, memory) {
                        Ok(rate) => known.rates.push(rate),
                        Err(error) => {
                            problems.push(format!("no memory to measure the bandwidth with: {error}"))
                        }
                    }
                    changed = true;
                }
            }
        }
        known.rates.sort_by_key(|rate| rate.threads);
        let mut gpus = known.gpus.clone();
        if known.gpus.is_none() && measure != Measure::Nothing {
            let (found, failed) = devices::gpus();
            gpus = Some(found.into_iter().map(gpu_profile).collect());
            // What could not be asked may answer the next time.
            if failed.is_empty() {
                known.gpus.clone_from(&gpus);
                changed = true;
            }
            problems.extend(failed);
        }
        // Nothing that stays: a driver may be installed.
        if measure != Measure::Nothing {
            problems.extend(devices::missing());
        }
        if changed && let Err(error) = known.write(cache_dir) {
            problems.push(format!("what was measured can't be kept: {error}"));
        }
        Self {
            cpu: CpuProfile {
                model: cpu::model().to_owned(),
                physical_cores,
                logical_cores,
                caches: cpu::caches(),
                features: cpu::features().iter().map(|&f| f.to_owned()).collect(),
                rates: known.rates,
            },
            memory,
            gpus: gpus.unwrap_or_default(),
            problems,
        }
    }

    /// Remembers what runs on the CPU reached of what was predicted, for later plans.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn remember(
        cache_dir: Option<&Path>,
        threads: usize,
        decode: Option<f64>,
        prefill: Option<f64>,
    ) -> std::io::Result<()> {
        let Some(mut known) = Measurements::read(cache_dir) else { return Ok(()) };
        let Some(rate) = known.rates.iter_mut().find(|rate| rate.threads == threads) else { return Ok(()) };
        let sane = |value: Option<f64>, old| value.filter(|v| (0.001..1000.0).contains(v)).or(old);
        rate.decode_efficiency = sane(decode, rate.decode_efficiency);
        rate.prefill_efficiency = sane(prefill, rate.prefill_efficiency);
        known.write(cache_dir)
    }

    /// The same without what earlier runs reached: for the roofline alone.
    pub fn without_efficiency(&self) -> Self {
        let mut machine = self.clone();
        for rate in &mut machine.cpu.rates {
            (rate.decode_efficiency, rate.prefill_efficiency) = (None, None);
        }
        machine
    }

    /// Bytes of main memory below which the kernel manager calls it low.
    pub fn memory_reserve(&self) -> u64 {
        self.memory.map_or(0, |memory| memory.total_bytes / LOW_MEMORY)
    }

    /// What threads can do: measured for so many, else scaled down from the next larger number, or that of the
    /// largest.
    pub fn cpu_rate(&self, threads: usize) -> Option<CpuRate> {
        let rates = &self.cpu.rates;
        let more = rates.iter().filter(|rate| rate.threads >= threads).min_by_key(|rate| rate.threads);
        match more {
            Some(rate) => {
                let part = threads as f64 / rate.threads.max(1) as f64;
                Some(CpuRate {
                    threads,
                    read_gb_per_s: rate.read_gb_per_s * part,
                    multiply_adds_g_per_s: rate.multiply_adds_g_per_s.map(|adds| adds * part),
                    ..*rate
                })
            }
            None => rates.iter().max_by_key(|rate| rate.threads).copied(),
        }
    }
}

impl GpuProfile {
    /// Whether it can hold a KV cache of a type. (Codes of int8 are kept four in a word.)
    pub fn holds(&self, cache_type: CacheType) -> bool {
        cache_type != CacheType::F16 || self.precisions.iter().any(|precision| precision == "f16")
    }
}

/// What is measured where it is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Nothing: for an answer at once.
    Nothing,
    /// What was not measured before.
    Missing,
    /// Everything.
    Afresh,
}

/// Main memory as the system, or the control group, has it now.
fn memory() -> Option<MemoryProfile> {
    let kind = sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
    let system = sysinfo::System::new_with_specifics(kind);
    let (total, available) = (system.total_memory(), system.available_memory());
    // sysinfo asserts that there is memory before it asks for a control group's.
    (total > 0).then(|| {
        let group = system.cgroup_limits().filter(|group| group.total_memory > 0);
        within(total, available, group.map(|group| (group.total_memory, group.rss)))
    })
}

/// The machine's memory within a control group's limit, of which the group's processes hold so many bytes. What the
/// group has in the page cache counts as its use, but is given back when it is needed: a model that was read is there.
fn within(total: u64, available: u64, group: Option<(u64, u64)>) -> MemoryProfile {
    let (limit, held) = group.unwrap_or((u64::MAX, 0));
    let total_bytes = total.min(limit);
    MemoryProfile { total_bytes, available_bytes: available.min(limit.saturating_sub(held)).min(total_bytes) }
}

/// As large a buffer as tells memory from caches, and an eighth of what is available at most.
fn stream_bytes(memory: Option<MemoryProfile>) -> usize {
    let eighth = memory.map_or(1 << 28, |memory| memory.available_bytes / 8);
    ReadStream::default_bytes().min(1 << 30).min(usize::try_from(eighth).unwrap_or(usize::MAX))
}

fn measured(threads: usize, memory: Option<MemoryProfile>) -> std::io::Result<CpuRate> {
    let roof = Roof::measure(&Pool::new(threads)?, stream_bytes(memory))?;
    Ok(CpuRate {
        threads,
        read_gb_per_s: roof.read_gb_per_s,
        multiply_adds_g_per_s: roof.multiply_adds_g_per_s,
        decode_efficiency: None,
        prefill_efficiency: None,
    })
}

fn gpu_profile(gpu: devices::GpuInfo) -> GpuProfile {
    // What is no card is never chosen for its speed.
    let (read, multiply) = if gpu.software { (None, None) } else { devices::peak(&gpu.device) };
    GpuProfile {
        device: gpu.id,
        name: gpu.name,
        software: gpu.software,
        memory_bytes: gpu.memory_bytes,
        max_allocation_bytes: Some(gpu.max_allocation_bytes),
        features: gpu.features,
        precisions: gpu.precisions,
        read_gb_per_s: read,
        multiply_adds_g_per_s: multiply,
    }
}

/// What was measured on this machine, with this build's runtimes. Processes that write at once: the last one wins, and
/// what the other one measured is measured again.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Measurements {
    rates: Vec<CpuRate>,
    /// `None` before they were looked for.
    gpus: Option<Vec<GpuProfile>>,
}

/// In the file's name, so that another version's is not read.
const VERSION: u32 = 1;

impl Measurements {
    /// What measurements depend on: processor, its features, runtimes, and which drivers of GPUs are asked for.
    fn key() -> String {
        let drivers =
            ["VK_ICD_FILENAMES", "VK_DRIVER_FILES", "CUDA_VISIBLE_DEVICES", "CUBECL_WGPU_DEFAULT_DEVICE"]
                .map(|variable| std::env::var(variable).unwrap_or_default());
        let cards = std::fs::read_dir("/sys/class/drm").map_or(0, Iterator::count);
        let parts = [
            cpu::model().to_owned(),
            cpu::features().join(","),
            devices::runtimes().join(","),
            drivers.join(","),
            cards.to_string(),
            cpu::physical_cores().to_string(),
        ];
        files::sha256(parts.join("\n").as_ref())[..16].to_owned()
    }

    fn path(cache_dir: Option<&Path>) -> Option<PathBuf> {
        Some(cache_dir?.join(format!("machine-v{VERSION}-{}.json", Self::key())))
    }

    /// What is wrong with the file costs a new measurement, and nothing else.
    fn read(cache_dir: Option<&Path>) -> Option<Self> {
        let path = Self::path(cache_dir)?;
        let text = match read_text(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "ignoring what was measured on this machine");
                return None;
            }
        };
        let known =
            serde_json::from_str::<Self>(&text).map_err(|error| error.to_string()).and_then(|known| {
                let cpu = CpuProfile { rates: known.rates.clone(), ..CpuProfile::default() };
                let gpus = known.gpus.clone().unwrap_or_default();
                MachineProfile { cpu, gpus, ..MachineProfile::default() }.validate()?;
                Ok(known)
            });
        known
            .inspect_err(|problem| {
                tracing::warn!(path = %path.display(), problem, "ignoring what was measured on this machine");
            })
            .ok()
    }

    fn write(&self, cache_dir: Option<&Path>) -> std::io::Result<()> {
        let Some(path) = Self::path(cache_dir) else { return Ok(()) };
        std::fs::create_dir_all(files::directory(&path))?;
        files::replace_private(&path, |out| {
            serde_json::to_writer_pretty(&mut *out, self)?;
            out.write_all(b"\n")
        })
    }
}

fn read_text(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(std::io::Error::other(format!("it is longer than {MAX_BYTES} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_remembered_and_damage_costs_a_measurement() {
        let dir = tempfile::tempdir().unwrap();
        let path = Measurements::path(Some(dir.path())).unwrap();
        let rate = CpuRate {
            threads: 3,
            read_gb_per_s: 30.0,
            multiply_adds_g_per_s: None,
            decode_efficiency: None,
            prefill_efficiency: None,
        };
        Measurements { rates: vec![rate], gpus: Some(Vec::new()) }.write(Some(dir.path())).unwrap();
        MachineProfile::remember(Some(dir.path()), 3, Some(0.75), Some(f64::NAN)).unwrap();
        let profile = MachineProfile::detect(Some(dir.path()), Measure::Nothing, None);
        let expected = CpuRate { decode_efficiency: Some(0.75), ..rate };
        assert_eq!(profile.cpu.rates, [expected]);
        assert_eq!(profile.cpu_rate(1).unwrap().read_gb_per_s, 10.0);
        assert_eq!(profile.cpu_rate(8).unwrap().read_gb_per_s, 30.0);
        for damage in ["", "{", "{\"rates\": [{\"threads\": 0, \"read_gb_per_s\": 1}], \"gpus\": []}"] {
            std::fs::write(&path, damage).unwrap();
            assert!(Measurements::read(Some(dir.path())).is_none(), "{damage:?}");
        }
    }

    #[test]
    fn a_control_groups_limit_counts_and_its_page_cache_does_not() {
        let memory = |total_bytes, available_bytes| MemoryProfile { total_bytes, available_bytes };
        assert_eq!(within(64, 40, None), memory(64, 40));
        assert_eq!(within(64, 40, Some((16, 3))), memory(16, 13));
        assert_eq!(within(64, 10, Some((16, 3))), memory(16, 10));
        assert_eq!(within(64, 40, Some((16, 17))), memory(16, 0));
        // No limit.
        assert_eq!(within(64, 40, Some((u64::MAX, 3))), memory(64, 40));
    }

    #[test]
    fn this_machine_is_described_in_json_that_is_read_back() {
        let profile = MachineProfile::detect(None, Measure::Nothing, None);
        assert!(profile.cpu.physical_cores.is_some_and(|cores| cores >= 1));
        assert!(profile.memory.is_some_and(|memory| memory.available_bytes <= memory.total_bytes));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine.json");
        std::fs::write(&path, serde_json::to_string_pretty(&profile).unwrap()).unwrap();
        assert_eq!(MachineProfile::read(&path).unwrap(), profile);
    }

    #[test]
    fn what_no_machine_is_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine.json");
        for (text, expected) in [
            ("", "EOF"),
            ("[]", "invalid"),
            ("{\"cpu\": {\"physical_cores\": 0}}", "0 cores"),
            ("{\"cpu\": {\"cores\": 4}}", "unknown field `cores`"),
            ("{\"cpu\": {\"rates\": [{\"threads\": 1, \"read_gb_per_s\": -1}]}}", "a rate of -1"),
            ("{\"cpu\": {}, \"memory\": {\"total_bytes\": 1, \"available_bytes\": 2}}", "2 bytes of memory"),
            ("{\"cpu\": {}, \"gpus\": [{\"device\": \"cpu\"}]}", "GPU 0 has the device"),
            ("{\"cpu\": {}, \"gpus\": [{\"device\": \"a\"}, {\"device\": \"a\"}]}", "two GPUs"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = MachineProfile::read(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
