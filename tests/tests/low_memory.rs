//! A model whose private packings are dropped while it is in use computes what it did.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bitnet_burn::CacheType;
use bitnet_burn::Projection;
use bitnet_burn::backends::manager;
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::load::{LoadOptions, release_packings};
use bitnet_burn_manager::{EventKind, LayoutPolicy, Machine, ManagerConfig, Memory, Probe};
use bitnet_burn_tests::*;
use burn::tensor::Device;

/// The machine's clock, and memory that is short when the test says so.
#[derive(Debug, Default)]
struct Short(AtomicBool);

impl Probe for Short {
    fn now(&self) -> Duration {
        // Every look at the memory is a second after the last.
        Machine.now() * 1_000_000
    }

    fn memory(&self) -> Option<Memory> {
        let available = if self.0.load(Ordering::Relaxed) { 1 << 20 } else { 8 << 30 };
        Some(Memory { available, total: 16 << 30 })
    }
}

/// Measurements after which a kernel with a packing of its own, which every machine has, is the fastest for all
/// shapes.
fn prefer_packing(config: &ManagerConfig, checkpoint: &Checkpoint) {
    let config = ManagerConfig { probe: Arc::new(Machine), ..config.clone() };
    let manager = manager::with_built_in_kernels(config).unwrap();
    for which in Projection::ALL {
        let matrix = checkpoint.projection(0, which).unwrap();
        let choice = manager.choose((matrix.n, matrix.k), LayoutPolicy::Any).unwrap();
        manager.warm_up(&choice, 64);
    }
    let file = manager.report().cache_file.unwrap();
    let mut cache: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for measurement in
        cache["measurements"].as_object_mut().unwrap().values_mut().flat_map(|m| m.as_array_mut().unwrap())
    {
        let name = measurement["kernel"].as_str().unwrap();
        let time = if name.ends_with("/t2-scalar") { 1000 } else { 9000 };
        (measurement["median_ns"], measurement["min_ns"]) = (time.into(), time.into());
    }
    std::fs::write(file, cache.to_string()).unwrap();
}

#[test]
fn packings_are_dropped_and_results_stay() {
    let probe = Arc::new(Short::default());
    let path = repository_golden().join("gguf/tiny_a-i2_s.gguf");
    let checkpoint = Checkpoint::open(&path, &Default::default()).unwrap();
    let cache = tempfile::tempdir().unwrap();
    let config = ManagerConfig {
        threads: 2,
        cache_dir: Some(cache.path().into()),
        probe: probe.clone(),
        ..ManagerConfig::default()
    };
    prefer_packing(&config, &checkpoint);
    let (manager, _) = manager::configure(config, &[]).unwrap();
    let load = || {
        let device = Device::flex();
        bitnet_burn_engine::load::load(&checkpoint, &device, &LoadOptions::default(), &mut |_| {}).unwrap()
    };
    let mut model = load();
    let ids = [1, 5, 9, 2, 7];
    let before = all_logits(&model, &ids, 3, CacheType::F32);
    assert!(manager.report().kernels.iter().any(|k| k.kernel == "cpu/t2-scalar" && k.calls > 0));
    assert!(!manager.memory_is_low());
    probe.0.store(true, Ordering::Relaxed);
    std::thread::sleep(Duration::from_micros(10));
    assert!(manager.memory_is_low());
    assert!(release_packings(&mut model, &checkpoint).unwrap() > 0);
    assert_same_bits(&all_logits(&model, &ids, 3, CacheType::F32), &before, "without packings");
    assert_eq!(manager.report().reference_calls, 0, "other kernels read canonical weights");
    assert_eq!(release_packings(&mut model, &checkpoint).unwrap(), 0, "nothing is left to drop");
    // A model that is loaded now makes none.
    let mut another = load();
    assert_eq!(release_packings(&mut another, &checkpoint).unwrap(), 0);
    assert_same_bits(&all_logits(&another, &ids, 3, CacheType::F32), &before, "loaded while memory is short");
    assert_eq!(manager.report().events[0].kind, EventKind::LowMemory);
}
