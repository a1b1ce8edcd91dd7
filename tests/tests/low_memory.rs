//! A model whose private packings are dropped while it is in use computes what it did.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bitnet_burn::backends::manager;
use bitnet_burn::bitnet::{BitNet, LoadOptions};
use bitnet_burn::checkpoint::Checkpoint;
use bitnet_burn::core::manager::{EventKind, Machine, ManagerConfig, Memory, Probe};
use bitnet_burn::nn::CacheType;
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

#[test]
fn packings_are_dropped_and_results_stay() {
    let probe = Arc::new(Short::default());
    let config = ManagerConfig {
        threads: 2,
        tune_budget: Duration::ZERO,
        // A kernel with a packing of its own, on every machine.
        force: Some("t2-scalar".into()),
        probe: probe.clone(),
        ..ManagerConfig::default()
    };
    let (manager, _) = manager::configure(config, &[]).unwrap();
    let path = repository_golden().join("gguf/tiny_a-i2_s.gguf");
    let checkpoint = Checkpoint::open(&path, &Default::default()).unwrap();
    let load = || {
        let device = Device::flex();
        BitNet::from_checkpoint(&checkpoint, &device, &LoadOptions::default(), &mut |_| {}).unwrap()
    };
    let mut model = load();
    let ids = [1, 5, 9, 2, 7];
    let before = all_logits(&model, &ids, 3, CacheType::F32);
    assert!(manager.report().kernels.iter().any(|k| k.kernel == "cpu/t2-scalar" && k.calls > 0));
    assert!(!manager.memory_is_low());
    probe.0.store(true, Ordering::Relaxed);
    std::thread::sleep(Duration::from_micros(10));
    assert!(manager.memory_is_low());
    assert!(model.release_packings(&checkpoint).unwrap() > 0);
    assert_same_bits(&all_logits(&model, &ids, 3, CacheType::F32), &before, "without packings");
    assert_eq!(model.release_packings(&checkpoint).unwrap(), 0, "nothing is left to drop");
    // A model that is loaded now makes none.
    let mut another = load();
    assert_eq!(another.release_packings(&checkpoint).unwrap(), 0);
    assert_same_bits(&all_logits(&another, &ids, 3, CacheType::F32), &before, "loaded while memory is short");
    assert_eq!(manager.report().events[0].kind, EventKind::LowMemory);
}
