//! Profiles of machines as plain data: hardware and measured speed, of this machine or read from a file.

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
    /// Main memory; absent if the system does not report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryProfile>,
    /// GPUs, including software GPUs.
    #[serde(default)]
    pub gpus: Vec<GpuProfile>,
    /// What could not be determined, as sentences.
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
    /// Physical cores that this process may use; absent if the system does not report them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_cores: Option<usize>,
    /// Hardware threads that this process may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical_cores: Option<usize>,
    /// The caches of the first core.
    #[serde(default)]
    pub caches: Vec<Cache>,
    /// CPU features that kernels may need.
    #[serde(default)]
    pub features: Vec<String>,
    /// Measured speed, by number of threads.
    #[serde(default)]
    pub rates: Vec<CpuRate>,
}

/// The measured limits of a number of threads ([`Roof`]), in 10^9 a second, and the parts of them that models reached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuRate {
    /// Number of threads.
    pub threads: usize,
    /// Bytes that a read-only stream reads from memory.
    pub read_gb_per_s: f64,
    /// int8 multiply-adds on registers alone; absent if the built-in kernels have no instruction for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multiply_adds_g_per_s: Option<f64>,
    /// Fraction of the predicted decode speed that the last `bench` reached; absent before the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_efficiency: Option<f64>,
    /// Fraction of the predicted prefill speed that the last `bench` reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_efficiency: Option<f64>,
}

/// Main memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryProfile {
    /// Total memory: the machine's, or the limit of this process's control group.
    pub total_bytes: u64,
    /// Memory that this process can get now without swapping.
    pub available_bytes: u64,
}

/// A GPU, or a software GPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuProfile {
    /// Its name for `--device`: `wgpu:0`, `metal:0`, `cuda:1`, `rocm:0`.
    pub device: String,
    /// Its name in the driver.
    #[serde(default)]
    pub name: String,
    /// Whether it is a software GPU: a program that computes on the CPU, such as lavapipe.
    #[serde(default)]
    pub software: bool,
    /// Its memory; absent if the driver does not report it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// The largest buffer that can be allocated; absent if there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_allocation_bytes: Option<u64>,
    /// Features that kernels may use.
    #[serde(default)]
    pub features: Vec<String>,
    /// Types that it can compute with: `f32`, `f16`, `i8` ...
    #[serde(default)]
    pub precisions: Vec<String>,
    /// 10^9 bytes a second that it reads from its memory; absent if not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_gb_per_s: Option<f64>,
    /// 10^9 f32 multiply-adds a second; absent if not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multiply_adds_g_per_s: Option<f64>,
}

/// Why a machine profile can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The file can't be read.
    #[error("{}: cannot read the machine profile: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        error: std::io::Error,
    },
    /// The file holds no valid profile.
    #[error("{}: not a machine profile (`bitnet plan --print-machine` prints one): {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The mistake.
        problem: String,
    },
}

/// The most GPUs of a profile. A plan compares them all, and no machine has more.
const MAX_GPUS: usize = 256;

/// The largest profile that is read. Profiles usually have a few thousand bytes.
const MAX_BYTES: u64 = 1 << 20;

impl MachineProfile {
    /// Reads a profile from a JSON file.
    ///
    /// # Errors
    /// If the file can't be read, or holds no profile, or holds impossible values.
    pub fn read(path: &Path) -> Result<Self, ProfileError> {
        let invalid = |problem: String| ProfileError::Invalid { path: path.to_owned(), problem };
        let text = read_text(path).map_err(|error| ProfileError::Read { path: path.to_owned(), error })?;
        let profile: Self = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
        profile.validate().map_err(invalid)?;
        Ok(profile)
    }

    /// Checks that the values are possible.
    fn validate(&self) -> Result<(), String> {
        let cores = [self.cpu.physical_cores, self.cpu.logical_cores];
        let threads = self.cpu.rates.iter().map(|rate| Some(rate.threads));
        for count in cores.into_iter().chain(threads).flatten() {
            if !(1..=1 << 16).contains(&count) {
                return Err(format!("{count} cores or threads; the number must be between 1 and 65536"));
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
                return Err(format!("a rate of {rate}; rates must be above 0 and below 1e12"));
            }
        }
        if self.gpus.len() > MAX_GPUS {
            return Err(format!("{} GPUs; at most {MAX_GPUS} are possible", self.gpus.len()));
        }
        for (i, gpu) in self.gpus.iter().enumerate() {
            if gpu.device.is_empty() || gpu.device == CPU {
                return Err(format!(
                    "GPU {i} has the device {:?}; a device has a name such as wgpu:0",
                    gpu.device
                ));
            }
            if self.gpus[..i].iter().any(|other| other.device == gpu.device) {
                return Err(format!("two GPUs have the device {:?}", gpu.device));
            }
        }
        match self.memory {
            Some(MemoryProfile { total_bytes, available_bytes }) if available_bytes > total_bytes => Err(
                format!("{available_bytes} bytes of memory are available, but the total is {total_bytes}"),
            ),
            _ => Ok(()),
        }
    }

    /// Profiles this machine. Earlier measurements come from `cache_dir`; `measure` says what is measured now. The numbers
    /// of threads to measure are 1, half of the cores, all cores, and `threads`.
    pub fn detect(cache_dir: Option<&Path>, measure: Measure, threads: Option<usize>) -> Self {
        let logical_cores = std::thread::available_parallelism().ok().map(usize::from);
        let mut problems = Vec::new();
        let physical_cores = logical_cores.map(|_| cpu::physical_cores());
        if physical_cores.is_none() {
            problems.push("the system does not report the number of cores".to_owned());
        }
        let memory = MemoryProfile::detect();
        if memory.is_none() {
            problems.push("the system does not report its memory".to_owned());
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
                        Err(error) => problems.push(format!(
                            "cannot allocate the buffer that measures the memory bandwidth: {error}"
                        )),
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
            // Keep the list only if every runtime answered: a runtime that failed may answer next time.
            if failed.is_empty() {
                known.gpus.clone_from(&gpus);
                changed = true;
            }
            problems.extend(failed);
        }
        // Not kept, because a driver may be installed later.
        if measure != Measure::Nothing {
            problems.extend(devices::missing());
        }
        if changed && let Err(error) = known.write(cache_dir) {
            problems.push(format!("cannot keep the measurements: {error}"));
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

    /// Keeps the fractions of the predicted speeds that a run on the CPU reached, for later plans.
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

    /// The same profile without the fractions that earlier runs reached: for the plain roofline.
    pub fn without_efficiency(&self) -> Self {
        let mut machine = self.clone();
        for rate in &mut machine.cpu.rates {
            (rate.decode_efficiency, rate.prefill_efficiency) = (None, None);
        }
        machine
    }

    /// Bytes of main memory that stay free. Below that, the kernel manager regards memory as short.
    pub fn memory_reserve(&self) -> u64 {
        self.memory.map_or(0, |memory| memory.total_bytes / LOW_MEMORY)
    }

    /// The limits of a number of threads: as measured for that number, or scaled down from the next larger measured
    /// number, or the limits of the largest measured number.
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
    /// Whether it can hold a KV cache of this type. (Four int8 codes share a 32-bit word, so every GPU can hold int8.)
    pub fn holds(&self, cache_type: CacheType) -> bool {
        cache_type != CacheType::F16 || self.precisions.iter().any(|precision| precision == "f16")
    }
}

/// What [`MachineProfile::detect`] measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Nothing, so that the answer comes at once.
    Nothing,
    /// What was not measured before.
    Missing,
    /// Everything.
    Afresh,
}

impl MemoryProfile {
    /// The current main memory of the system or of the control group.
    pub fn detect() -> Option<Self> {
        let kind =
            sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
        let system = sysinfo::System::new_with_specifics(kind);
        let (total, available) = (system.total_memory(), system.available_memory());
        // Without memory, sysinfo's query of the control group would panic.
        (total > 0).then(|| {
            let group = system.cgroup_limits().filter(|group| group.total_memory > 0);
            within(total, available, group.map(|group| (group.total_memory, group.rss)))
        })
    }
}

/// The machine's memory within a control group: `group` is its limit and the bytes that its processes hold. The group's
/// page cache, where mapped models are, counts as available, because the system frees it when needed.
fn within(total: u64, available: u64, group: Option<(u64, u64)>) -> MemoryProfile {
    let (limit, held) = group.unwrap_or((u64::MAX, 0));
    let total_bytes = total.min(limit);
    MemoryProfile { total_bytes, available_bytes: available.min(limit.saturating_sub(held)).min(total_bytes) }
}

/// Size of the buffer that measures bandwidth: larger than the caches, and at most an eighth of the available memory.
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
    // A software GPU is never chosen for its speed.
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

/// The measurements of this machine, with this build's runtimes. If two processes write at the same time, the last one
/// wins, and the other one's measurements are made again later.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Measurements {
    rates: Vec<CpuRate>,
    /// `None` before the first search.
    gpus: Option<Vec<GpuProfile>>,
}

/// Version of the file format. It is part of the file's name, so that other versions are ignored.
const VERSION: u32 = 1;

impl Measurements {
    /// Digest of everything that the measurements depend on: processor, features, runtimes, and the choice of GPU drivers.
    fn key() -> String {
        let drivers =
            ["VK_ICD_FILENAMES", "VK_DRIVER_FILES", "CUDA_VISIBLE_DEVICES", "CUBECL_WGPU_DEFAULT_DEVICE"]
                .map(|variable| {
                    std::env::var_os(variable).unwrap_or_default().to_string_lossy().into_owned()
                });
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

    /// Reads the file. A damaged file is ignored with a warning, and its measurements are made again.
    fn read(cache_dir: Option<&Path>) -> Option<Self> {
        let path = Self::path(cache_dir)?;
        let text = match read_text(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "ignoring the damaged measurements of this machine");
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
                tracing::warn!(path = %path.display(), problem, "ignoring the damaged measurements of this machine");
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
        return Err(std::io::Error::other(format!("the file is longer than {MAX_BYTES} bytes")));
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
    fn many_gpus_are_planned_and_too_many_refused_at_once() {
        let gpus = |count| {
            (0..count)
                .map(|i| GpuProfile {
                    device: format!("wgpu:{i}"),
                    memory_bytes: Some(1 << 33),
                    ..GpuProfile::default()
                })
                .collect()
        };
        let machine = |count| MachineProfile { gpus: gpus(count), ..MachineProfile::default() };
        assert_eq!(machine(MAX_GPUS).validate(), Ok(()));
        let clock = std::time::Instant::now();
        let error = machine(1_000_000).validate().unwrap_err();
        assert_eq!(error, "1000000 GPUs; at most 256 are possible");
        // Comparing each with each would take minutes.
        assert!(clock.elapsed() < std::time::Duration::from_secs(20));
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
