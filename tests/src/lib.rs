//! What the tests share: golden data of peers, an oracle, and models on a device.

pub mod reference;

/// The programs of this page run with the tests.
#[cfg(doctest)]
#[doc = include_str!("../../docs/layers.md")]
struct LayersPage;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use bitnet_burn::BitNet;
use bitnet_burn::CacheType;
use bitnet_burn::backends::manager;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::generate;
use bitnet_burn_engine::generate::GenerateOptions;
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_manager::{KernelManager, ManagerConfig};
use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};

/// The process's kernel manager as tests want it: two threads, nothing on disk, and nothing measured,
/// so that every run takes the same kernels (the first that is registered, or `BITNET_KERNEL`);
/// `BITNET_THREADS` holds.
///
/// # Panics
/// If the manager was set up otherwise before.
pub fn setup() -> &'static KernelManager {
    static MANAGER: OnceLock<&'static KernelManager> = OnceLock::new();
    MANAGER.get_or_init(|| {
        let from_env = ManagerConfig::from_env().unwrap_or_else(|error| panic!("{error}"));
        let threads = if from_env.threads == 0 { 2 } else { from_env.threads };
        let config = ManagerConfig { threads, cache_dir: None, tune_budget: Duration::ZERO, ..from_env };
        let (manager, _) = manager::configure(config, &[]).unwrap_or_else(|error| panic!("{error}"));
        manager
    })
}

/// The devices in host memory that this build has.
pub fn host_devices() -> Vec<Device> {
    setup();
    vec![
        Device::flex(),
        #[cfg(feature = "ndarray")]
        #[allow(deprecated, reason = "Burn deprecates NdArray in favour of Flex, and still supports it")]
        Device::ndarray(),
    ]
}

/// The same, and that of a worker in this process, which is reached through the network.
///
/// # Panics
/// If there can be no worker.
pub fn devices() -> Vec<Device> {
    #[allow(unused_mut, reason = "without a worker")]
    let mut devices = host_devices();
    #[cfg(feature = "remote")]
    {
        static WORKER: OnceLock<bitnet_burn::backends::remote::Worker> = OnceLock::new();
        let worker = WORKER.get_or_init(|| worker().expect("a free port"));
        devices.push(bitnet_burn::backends::remote::open(&worker.address().to_string()).expect("it listens"));
    }
    devices
}

/// A worker for the CPU, in this process and at a free port.
///
/// # Errors
/// If the system has no port or thread for it.
#[cfg(feature = "remote")]
pub fn worker() -> Result<bitnet_burn::backends::remote::Worker, bitnet_burn::backends::remote::WorkerError> {
    use bitnet_burn::backends::remote::{Worker, WorkerError};
    setup();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(WorkerError::Start)?;
    Worker::start(listener, &Device::flex(), "flex")
}

/// The small golden sets, which are part of the repository.
pub fn repository_golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/engine/testdata/golden")
}

/// The large golden sets (`BITNET_GOLDEN_DIR`). Where the variable is unset or `none`, says that `what` was
/// skipped; in CI (`CI` set) an unset one is a failure.
///
/// # Panics
/// In CI without the variable, or if it names no directory.
pub fn golden_dir(what: &str) -> Option<PathBuf> {
    match std::env::var_os("BITNET_GOLDEN_DIR") {
        Some(dir) if dir != "none" => {
            let dir = PathBuf::from(dir);
            assert!(dir.is_dir(), "BITNET_GOLDEN_DIR={} is no directory", dir.display());
            Some(dir)
        }
        given => {
            assert!(given.is_some() || std::env::var_os("CI").is_none(), "BITNET_GOLDEN_DIR is unset in CI");
            eprintln!("SKIPPED: {what} (set BITNET_GOLDEN_DIR to the golden data)");
            None
        }
    }
}

/// Hugging Face model directories with goldens: all with `BITNET_GOLDEN_DIR`, else the repository's two.
pub fn hf_models() -> Vec<PathBuf> {
    let dir = golden_dir("the model directories that are not in the repository");
    let dir = dir.unwrap_or_else(repository_golden).join("hf");
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut models: Vec<_> = entries
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|d| d.join("goldens.safetensors").exists())
        .collect();
    models.sort();
    assert!(models.len() >= 2, "{} has {} models", dir.display(), models.len());
    models
}

/// The last component of a path.
pub fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A golden tensor, as f32 (integers converted).
#[derive(Clone, Debug)]
pub struct Golden {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values in row-major order.
    pub values: Vec<f32>,
}

impl Golden {
    /// Row i of a matrix.
    pub fn row(&self, i: usize) -> &[f32] {
        let k = self.shape[self.shape.len() - 1];
        &self.values[i * k..(i + 1) * k]
    }

    /// The values as token ids.
    pub fn ids(&self) -> Vec<u32> {
        self.values.iter().map(|&v| v as u32).collect()
    }
}

/// All tensors of a safetensors file.
///
/// # Panics
/// If the file is not what the tests need.
pub fn read_goldens(path: &Path) -> HashMap<String, Golden> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("golden safetensors");
    file.iter()
        .map(|(name, view)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => {
                    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
                }
                Dtype::I64 => {
                    data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
                }
                Dtype::BF16 => data
                    .chunks_exact(2)
                    .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b.try_into().unwrap())) << 16))
                    .collect(),
                Dtype::U8 => data.iter().map(|&b| f32::from(b)).collect(),
                Dtype::I8 => data.iter().map(|&b| f32::from(b as i8)).collect(),
                other => panic!("golden {name} of type {other:?}"),
            };
            (name.to_owned(), Golden { shape: view.shape().to_vec(), values })
        })
        .collect()
}

/// A NumPy file of f32 or f64, as f32.
///
/// # Panics
/// If the file is not what the tests need.
pub fn read_npy(path: &Path) -> Golden {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(&bytes[..6], b"\x93NUMPY");
    let (start, length) = match bytes[6] {
        1 => (10, u16::from_le_bytes([bytes[8], bytes[9]]) as usize),
        _ => (12, u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize),
    };
    let header = std::str::from_utf8(&bytes[start..start + length]).unwrap();
    let shape = header.split('(').nth(1).unwrap().split(')').next().unwrap();
    let shape = shape.split(',').filter_map(|s| s.trim().parse().ok()).collect();
    let data = &bytes[start + length..];
    let values = if header.contains("<f8") {
        data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
    } else {
        assert!(header.contains("<f4"), "{header}");
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    Golden { shape, values }
}

/// Token ids separated by commas or white space.
///
/// # Panics
/// If the file is not what the tests need.
pub fn read_tokens(path: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let ids = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|s| !s.is_empty());
    ids.map(|s| s.parse().unwrap()).collect()
}

/// Loads a model, on the process's manager as [`setup`] makes it.
///
/// # Panics
/// If it can't be loaded.
pub fn load(path: &Path, device: &Device, options: &LoadOptions) -> BitNet {
    setup();
    let checkpoint =
        Checkpoint::open(path, &OpenOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    bitnet_burn_engine::load::load(&checkpoint, device, options, &mut |_| {})
        .unwrap_or_else(|error| panic!("{error}"))
}

/// The logits of all positions, the prompt cut into chunks.
///
/// # Panics
/// If the forward pass fails.
pub fn all_logits(model: &BitNet, tokens: &[u32], chunk: usize, cache_type: CacheType) -> Vec<f32> {
    let mut cache = model.cache(tokens.len(), cache_type).unwrap();
    let sequence = cache.add_sequence(0);
    let mut logits = Vec::new();
    generate::logits(model, tokens, sequence, &mut cache, chunk, &mut |_, rows| {
        logits.extend_from_slice(rows)
    })
    .unwrap_or_else(|error| panic!("{error}"));
    logits
}

/// The types of KV caches that the model's devices have.
pub fn cache_types(model: &BitNet) -> Vec<CacheType> {
    let all = [CacheType::F32, CacheType::F16, CacheType::Int8];
    all.into_iter().filter(|&cache_type| model.cache(1, cache_type).is_ok()).collect()
}

/// Small pseudo-random numbers (SplitMix64), the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 33) as usize % n
    }

    /// A number in -1 .. 1.
    pub fn float(&mut self) -> f32 {
        ((self.bits() >> 40) as f32 / (1 << 23) as f32) - 1.0
    }

    /// Numbers in -1 .. 1.
    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }

    /// Ternary weights.
    pub fn ternary(&mut self, count: usize) -> Vec<i8> {
        (0..count).map(|_| self.below(3) as i8 - 1).collect()
    }
}

/// Canonical rows of ternary weights.
pub fn canonical_rows(weights: &[i8], k: usize) -> Vec<u8> {
    use bitnet_burn_formats::canonical;
    let mut bytes = vec![0; weights.len() / k * canonical::row_bytes(k)];
    for (row, out) in weights.chunks_exact(k).zip(bytes.chunks_exact_mut(canonical::row_bytes(k))) {
        canonical::pack_row(row, out);
    }
    bytes
}

/// The same numbers, bit for bit.
///
/// # Panics
/// If they are not.
pub fn assert_same_bits(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    if let Some(i) = (0..a.len()).find(|&i| a[i].to_bits() != b[i].to_bits()) {
        panic!("{what}: value {i} of {} is {:e} and {:e}", a.len(), a[i], b[i]);
    }
}

/// The position of the largest value.
pub fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// The largest absolute difference, and NaN if one of the two has a NaN.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst: f32, (x, y)| {
        let d = (x - y).abs();
        if d.is_nan() || worst.is_nan() { f32::NAN } else { worst.max(d) }
    })
}

/// The most likely tokens behind a prompt.
///
/// # Panics
/// If the model can't generate so many.
pub fn greedy(model: &BitNet, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut cache = model.cache(prompt.len() + count, CacheType::F32).unwrap();
    let sequence = cache.add_sequence(0);
    let options = GenerateOptions { max_new_tokens: count, ..GenerateOptions::default() };
    let go_on = &mut |_: u32, _: &[f32]| ControlFlow::Continue(());
    generate::generate(model, prompt, sequence, &mut cache, &options, go_on).unwrap().tokens
}

/// Burn's Flex.
pub fn flex() -> Device {
    host_devices().swap_remove(0)
}

/// A tensor of these values.
pub fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

/// A tensor of values that a seed stands for.
pub fn random_tensor<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    tensor(&Random(seed).floats(shape.iter().product()), shape, device)
}

/// The values of a tensor of floats.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// That values differ by at most `tolerance` of the largest.
///
/// # Panics
/// If they do not.
pub fn close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
    let difference = max_difference(got, want);
    assert!(difference <= tolerance * largest, "{what}: {difference:e} of {largest:e}");
}
