//! Plugins with kernels that are GPU source, on a host without a GPU: what is refused by its descriptor, and what is
//! left of the others. How texts are compiled and compared is tested where there is a device
//! (`tests/tests/gpu_plugins.rs`).

use crate::support::*;
use bitnet_burn_manager::gate;
use bitnet_burn_manager::plugin::Target;
use bitnet_burn_manager::{ManagerConfig, ManagerError, Status};

/// Macros of testdata/gpu.c, and what the refusal must say.
const INVALID: &[(&str, &[&str], &str)] = &[
    ("no_gpu", &["NO_GPU"], "kernel `text` is for a GPU, and its `gpu` is null"),
    ("no_source", &["NO_SOURCE"], "the source of kernel `text` is no UTF-8 text of 1 to 1048576 bytes"),
    ("no_entry", &["ENTRY=NULL"], "the entry point of kernel `text` is no identifier of 1 to 127 characters"),
    ("entry", &["ENTRY=\"plain; drop\""], "the entry point of kernel `text` is no identifier"),
    ("empty_entry", &["ENTRY=\"\""], "the entry point of kernel `text` is no identifier"),
    ("small", &["GPU_SIZE=16"], "struct_size of the GPU part of kernel `text` is 16, ABI 1.1 has 48"),
    ("huge", &["GPU_SIZE=1ull << 40"], "struct_size of the GPU part of kernel `text` is 1099511627776"),
    ("group", &["GROUP={64, 64, 1}"], "workgroups of 64 x 64 x 1 threads; 1 to 1024 are possible"),
    ("overflow", &["GROUP={1u << 31, 2, 1}"], "workgroups of 2147483648 x 2 x 1 threads"),
    ("no_group", &["GROUP={64, 0, 1}"], "workgroups of 64 x 0 x 1 threads"),
    ("no_tile", &["TILE_N=0"], "a workgroup of kernel `text` computes 0 x 1 outputs"),
];

#[test]
fn a_gpu_part_that_breaks_the_abi_is_refused() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(&dir.path().join("cache"));
    for (name, defines, expected) in INVALID {
        let error = manager.load_plugin(&build_gpu(dir.path(), name, defines)).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("descriptor is invalid"), "{name}: {error}");
    }
}

#[test]
fn without_a_gpu_the_kernels_for_the_cpu_are_left() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(&dir.path().join("cache"));
    for (name, defines, reason) in [
        ("wgsl", &["NAME=\"wgsl\""][..], "it is for wgsl, and the gate's helper has no GPU runtime"),
        ("cuda", &["NAME=\"cuda\"", "TARGET=BITNET_TARGET_CUDA"], "it is for cuda, and the gate's helper"),
        // What a later minor version may know.
        ("later", &["NAME=\"later\"", "TARGET=9"], "it is for target 9, which this host does not know"),
        (
            "fused",
            &["NAME=\"fused\"", "OPERATION=3", "TARGET=BITNET_TARGET_CPU"],
            "it computes operation 3, which this host does not know (ABI 1.3 has 1, ternary matmul, and 2, ternary matmul with \
             many scales)",
        ),
    ] {
        let reports = manager.load_plugin(&build_gpu(dir.path(), name, defines)).unwrap();
        assert_eq!((reports[0].target.as_str(), &reports[0].status), ("cpu", &Status::Ready), "{name}");
        let Status::Unavailable(why) = &reports[1].status else { panic!("{name}: {reports:?}") };
        assert!(why.contains(reason), "{name}: {why}");
    }
    check(&manager, 3, 33, 129, "the kernel for the CPU");
    let report = manager.report();
    assert_eq!((report.kernels[0].kernel.as_str(), report.kernels[0].calls), ("wgsl/cpu", 1));
    assert!(manager.gpu_kernels(Target::Wgsl, (1, 64, 128)).is_empty());
    // The verdict says what was not tried.
    let sha256 = report.kernels[1].sha256.clone().unwrap();
    let verdict = manager.store().verdict(&sha256).unwrap();
    assert!(verdict.passed() && verdict.gate == gate::GATE_VERSION && verdict.plugin.unwrap().abi == "1.3");
    assert!(verdict.kernels[0].cases > 0 && verdict.kernels[0].device.is_none());
    assert!(verdict.kernels[1].unavailable.as_ref().unwrap().contains("no GPU runtime"));
    assert!(verdict.gpu.unwrap().contains("no GPU runtime"));
}

#[test]
fn what_a_helper_without_a_gpu_did_not_try_is_tried_by_one_that_has_it() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build_gpu(dir.path(), "gpu", &[]);
    let with = |gpu: bool, helper: Option<&str>| {
        let mut config = config(&dir.path().join("cache"));
        config.plugins.gpu = gpu.then_some(|| "the GPU at hand".into());
        if let Some(helper) = helper {
            config.plugins.helper = (!helper.is_empty()).then(|| helper.into());
        }
        bitnet_burn_manager::KernelManager::new(config).unwrap()
    };
    with(false, None).load_plugin(&path).unwrap();
    // The verdict is enough for who has no GPU either, or no helper, or the one that has none.
    assert!(with(true, None).load_plugin(&path).is_ok());
    for (gpu, helper) in [(false, "/nonexistent/helper"), (true, "")] {
        assert!(with(gpu, Some(helper)).load_plugin(&path).is_ok(), "{gpu} {helper}");
    }
    let error = with(true, Some("/nonexistent/helper")).load_plugin(&path).unwrap_err().to_string();
    assert!(error.contains("can't be started"), "{error}");
}

#[test]
fn a_verdict_of_another_gpu_is_none() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = build_gpu(dir.path(), "gpu", &[]);
    let with = |gpu: bool, helper: bool| {
        let mut config = config(&dir.path().join("cache"));
        config.plugins.gpu = gpu.then_some(|| "the GPU at hand".into());
        config.plugins.helper = config.plugins.helper.filter(|_| helper);
        bitnet_burn_manager::KernelManager::new(config).unwrap()
    };
    let manager = with(false, true);
    manager.load_plugin(&path).unwrap();
    // As if it had been tried on a GPU that has left.
    let library = manager.store().admit(&path).unwrap().library;
    let files = std::fs::read_dir(library.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let file = files.into_iter().find(|file| file.extension().is_some_and(|e| e == "json")).unwrap();
    let mut verdict: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    verdict["report"]["gpu"] = "Another GPU".into();
    verdict["report"]["kernels"][1].as_object_mut().unwrap().remove("unavailable");
    std::fs::write(&file, verdict.to_string()).unwrap();
    let status =
        |manager: bitnet_burn_manager::KernelManager| manager.load_plugin(&path).unwrap().remove(1).status;
    assert_eq!(status(with(false, false)), Status::Ready, "no GPU runtime, no difference");
    let reason = "it was tried on Another GPU, and this is the GPU at hand".into();
    assert_eq!(status(with(true, false)), Status::Unavailable(reason));
    // It is tried again where there is a helper: this one has no runtime.
    let Status::Unavailable(reason) = status(with(true, true)) else { panic!("it has no runtime") };
    assert!(reason.contains("no GPU runtime"), "{reason}");
}

#[test]
fn a_forced_gpu_kernel_leaves_nothing_on_the_cpu() {
    if !has_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = ManagerConfig { force: Some("gpu/text".into()), ..config(&dir.path().join("cache")) };
    let manager = bitnet_burn_manager::KernelManager::new(config).unwrap();
    manager.load_plugin(&build_gpu(dir.path(), "gpu", &[])).unwrap();
    manager.validate().unwrap();
    check(&manager, 1, 8, 128, "the reference");
    assert_eq!(manager.report().reference_calls, 1);
    let other = ManagerConfig { force: Some("gpu/nothing".into()), ..crate::support::config(dir.path()) };
    let manager = bitnet_burn_manager::KernelManager::new(other).unwrap();
    assert!(matches!(manager.validate(), Err(ManagerError::UnknownKernel { .. })));
}
