//! What the tests share: golden data of peers, and models on a device.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bitnet_burn::bitnet::{BitNet, LoadOptions};
use bitnet_burn::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn::generate;
use bitnet_burn::nn::CacheType;
use burn::tensor::Device;
use safetensors::{Dtype, SafeTensors};

/// The small golden sets, which are part of the repository.
pub fn repository_golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/testdata/golden")
}

/// The large golden sets (`BITNET_GOLDEN_DIR`). Where the variable is unset, says that `what` was
/// skipped; in CI (`CI` set) that is a failure.
///
/// # Panics
/// In CI without the variable, or if it names no directory.
pub fn golden_dir(what: &str) -> Option<PathBuf> {
    match std::env::var_os("BITNET_GOLDEN_DIR") {
        Some(dir) => {
            let dir = PathBuf::from(dir);
            assert!(dir.is_dir(), "BITNET_GOLDEN_DIR={} is no directory", dir.display());
            Some(dir)
        }
        None => {
            assert!(std::env::var_os("CI").is_none(), "BITNET_GOLDEN_DIR is unset in CI");
            eprintln!("SKIPPED: {what} (set BITNET_GOLDEN_DIR to the golden data)");
            None
        }
    }
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
                Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
                Dtype::I64 => {
                    data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
                }
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

/// Loads a model.
///
/// # Panics
/// If it can't be loaded.
pub fn load(path: &Path, device: &Device, options: &LoadOptions) -> BitNet {
    let checkpoint = Checkpoint::open(path, &OpenOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    BitNet::from_checkpoint(&checkpoint, device, options, &mut |_| {}).unwrap_or_else(|error| panic!("{error}"))
}

/// The logits of all positions, the prompt cut into chunks.
///
/// # Panics
/// If the forward pass fails.
pub fn all_logits(model: &BitNet, tokens: &[u32], chunk: usize, cache_type: CacheType) -> Vec<f32> {
    let mut cache = model.cache(tokens.len(), cache_type).unwrap();
    let sequence = cache.add_sequence(0);
    let mut logits = Vec::new();
    generate::logits(model, tokens, sequence, &mut cache, chunk, &mut |_, rows| logits.extend_from_slice(rows))
        .unwrap_or_else(|error| panic!("{error}"));
    logits
}

/// The largest absolute difference, and NaN if one of the two has a NaN.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst: f32, (x, y)| {
        let d = (x - y).abs();
        if d.is_nan() || worst.is_nan() { f32::NAN } else { worst.max(d) }
    })
}
