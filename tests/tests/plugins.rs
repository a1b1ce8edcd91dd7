//! Hostile plugins under a model: it runs on, with the kernels that are left, and computes what it should.
//! The plugins are built here, with the system's C compiler; core's tests have the rest of them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bitnet_burn::CacheType;
use bitnet_burn::backends::manager;
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_engine::report::Execution;
use bitnet_burn_manager::store::PluginConfig;
use bitnet_burn_manager::{ManagerConfig, Status};
use bitnet_burn_tests::*;
use burn::tensor::Device;

/// The plugin of core/manager/testdata/plugin.c with these macros.
fn build(dir: &Path, name: &str, defines: &[&str]) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let path = dir.join(format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX));
    let mut command = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    command.args(["-std=gnu11", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]);
    command.arg("-I").arg(root.join("plugins/abi/include")).arg(root.join("core/manager/testdata/plugin.c"));
    command
        .args(defines.iter().map(|define| format!("-D{define}")))
        .args(["-lm", "-lpthread", "-o"])
        .arg(&path);
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    path
}

/// The process's manager, as an embedder sets it up, with refused and, later, quarantined plugins.
#[test]
fn a_model_runs_on_with_the_kernels_that_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.so");
    std::fs::write(&text, "not a library at all").unwrap();
    let plugins = [
        text,
        build(dir.path(), "major", &["MAJOR=2"]),
        build(dir.path(), "crash", &["NAME=\"crash\"", "IN_RUN=abort()"]),
        build(dir.path(), "wrong", &["NAME=\"wrong\"", "WRONG=1"]),
        build(dir.path(), "good", &["NAME=\"good\""]),
        // Right for all shapes that the gate tries: none has six rows.
        build(
            dir.path(),
            "later",
            &[
                "NAME=\"later\"",
                "PRIVATE",
                "IN_RUN=if (x->m == 6) y->y[tile->m0 * y->stride + tile->n0] += 1",
            ],
        ),
    ];
    let config = ManagerConfig {
        threads: 2,
        tune_budget: Duration::ZERO,
        // So that the hostile one is what computes.
        force: Some("later/plain".into()),
        plugins: PluginConfig {
            helper: Some(env!("CARGO_BIN_EXE_gate-helper").into()),
            ..PluginConfig::default()
        },
        ..ManagerConfig::default()
    };
    let (manager, refused) = manager::configure(config.clone(), &plugins).unwrap();
    let expected = ["not a loadable library", "built for ABI 2.", "SIGABRT", "the reference has"];
    assert_eq!(refused.len(), expected.len(), "{refused:?}");
    for (error, expected) in refused.iter().zip(expected) {
        assert!(error.to_string().contains(expected), "{error}");
    }
    let model_dir = repository_golden().join("hf/A-packed-auto");
    let checkpoint = Checkpoint::open(&model_dir, &Default::default()).unwrap();
    let device = Device::flex();
    let model =
        bitnet_burn_engine::load::load(&checkpoint, &device, &LoadOptions::default(), &mut |_| {}).unwrap();
    let goldens = read_goldens(&model_dir.join("goldens.safetensors"));
    let ids = goldens["seq16.input_ids"].ids();
    let before = manager.report();
    let logits = all_logits(&model, &ids, 6, CacheType::F32);
    assert!(max_difference(&logits, &goldens["seq16.logits"].values) < 1e-3);
    let report = manager.report();
    let status =
        |id: &str| report.kernels.iter().find(|k| k.kernel == id).map(|k| (k.status.clone(), k.calls));
    assert!(status("wrong/plain").is_none() && status("crash/plain").is_none());
    assert_eq!(status("good/plain"), Some((Status::Ready, 0)));
    let Some((Status::Quarantined(reason), _)) = status("later/plain") else { panic!("{report:?}") };
    assert!(reason.contains("kernel later/plain, [6, "), "{reason}");
    // A program's report tells, too.
    let execution = Execution::between("flex", &before, &report);
    assert!(execution.to_string().contains("later/plain quarantined, 1 x: "), "{execution}");
    assert!(execution.to_string().contains("later/plain -> reference"), "{execution}");
    assert!(Execution::between("flex", &report, &report).events.is_empty());
    // Forced alone, it leaves nothing but the reference.
    assert!(report.reference_calls > 0);
    assert!(report.fallbacks.iter().all(|f| f.kernel == "later/plain" && f.replacement == "reference"));
    // Once in use it can't be configured again.
    let config = ManagerConfig { force: None, ..config };
    assert!(manager::configure(config, &[]).unwrap_err().to_string().contains("in use already"));
}
