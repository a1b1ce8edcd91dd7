//! The files in which the manager keeps what it knows: tuning results, verdicts on plugins, and pins. Whatever they hold
//! costs a new measurement or a new look at the plugin, and nothing else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bitnet_burn_manager::gate::{
    Confinement, Description, GATE_VERSION, KernelResult, Refusal, Report, Stage,
};
use bitnet_burn_manager::store::{PluginConfig, PluginStore, read_pins, write_pins};
use bitnet_burn_manager::{KernelManager, ManagerConfig, cpu};
use bitnet_burn_plugin::abi::{ABI_MAJOR, ABI_MINOR};

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn manager(dir: &Path) -> KernelManager {
    let cache_dir = Some(dir.to_owned());
    let config = ManagerConfig {
        threads: 1,
        cache_dir,
        tune_budget: Duration::from_micros(1),
        ..ManagerConfig::default()
    };
    KernelManager::new(config).expect("a manager of one thread")
}

/// The only file in a directory.
fn only_file(dir: &Path) -> PathBuf {
    let files =
        std::fs::read_dir(dir).expect("the directory is there").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> = files.filter(|path| path.is_file()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

/// Whether the tuning results were taken.
pub fn tuning(data: &[u8]) -> bool {
    let dir = scratch();
    let path = manager(dir.path()).report().cache_file.expect("the cache has a file");
    std::fs::write(path, data).expect("the file is written");
    let manager = manager(dir.path());
    manager.measurements("a signature");
    manager.report().cache_problem.is_none()
}

const SHA256: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn store(dir: &Path) -> PluginStore {
    PluginStore::new(PluginConfig::default(), Some(dir))
}

/// Whether the verdict was taken.
pub fn verdict(data: &[u8]) -> bool {
    let dir = scratch();
    store(dir.path()).remember(&report());
    let path = only_file(&dir.path().join("plugins").join(SHA256));
    std::fs::write(&path, data).expect("the file is written");
    let Some(report) = store(dir.path()).verdict(SHA256) else { return false };
    assert_eq!(report.sha256, SHA256);
    assert_eq!(report.gate, GATE_VERSION);
    // What was read is kept as it is.
    std::fs::remove_file(&path).expect("the file is removed");
    store(dir.path()).remember(&report);
    let again = store(dir.path()).verdict(SHA256).expect("what was written can be read");
    assert_eq!(again.passed(), report.passed());
    assert_eq!(again.refusal, report.refusal);
    true
}

/// Whether the pins were taken.
pub fn pins(data: &[u8]) -> bool {
    let dir = scratch();
    let path = dir.path().join("pins.txt");
    std::fs::write(&path, data).expect("the file is written");
    let Ok(pins) = read_pins(&path) else { return false };
    write_pins(&path, &pins).expect("the file is written");
    let again = read_pins(&path).expect("what was written can be read");
    let hashes = |pins: &[(String, String)]| pins.iter().map(|(hash, _)| hash.clone()).collect::<Vec<_>>();
    assert_eq!(hashes(&again), hashes(&pins));
    true
}

/// A tuning cache of this machine.
pub fn tuning_seed() -> Vec<u8> {
    let measurement = |kernel: &str, median_ns| {
        serde_json::json!({
            "kernel": kernel, "median_ns": median_ns, "min_ns": 900, "runs": 12, "note": "stopped early"
        })
    };
    let file = serde_json::json!({
        "version": 1,
        "cpu": cpu::model(),
        "features": cpu::features(),
        "measurements": { "a signature": [measurement("a@1/b", 1000), measurement("c@2/d", 2000)] },
    });
    serde_json::to_vec(&file).expect("plain data")
}

/// A verdict of this machine.
pub fn verdict_seed() -> Vec<u8> {
    let dir = scratch();
    store(dir.path()).remember(&report());
    std::fs::read(only_file(&dir.path().join("plugins").join(SHA256))).expect("the verdict was written")
}

fn report() -> Report {
    let kernel = KernelResult {
        kernel: "plugin/kernel".into(),
        declared: "canonical cpu [] aligned to 64, granule 1".into(),
        cases: 12,
        device: None,
        unavailable: None,
    };
    let refusal =
        Refusal { stage: Stage::FirstUse, trying: Some("m = 1".into()), reason: "one wrong value".into() };
    Report {
        gate: GATE_VERSION,
        abi: format!("{ABI_MAJOR}.{ABI_MINOR}"),
        sha256: SHA256.into(),
        file: "plugin.so".into(),
        plugin: Some(Description { name: "plugin".into(), version: "1".into(), abi: "1.0".into() }),
        gpu: None,
        helper: "helper".into(),
        confinement: Confinement { layers: vec!["a layer".into()], missing: Vec::new() },
        kernels: vec![kernel],
        refusal: Some(refusal),
        warnings: vec!["a warning".into()],
        log: Vec::new(),
        seconds: 0.5,
    }
}
