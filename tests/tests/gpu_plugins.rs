//! Plugins whose kernels are GPU source, from files, on a GPU or what stands in for one (lavapipe): the gate, and a model
//! that computes with them. Without an adapter these tests fail: whoever builds the feature wants it tested.
#![cfg(feature = "wgpu")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bitnet_burn::backends::manager;
use bitnet_burn::{BitLinear, BitLinearWeight, CacheType};
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::reference;
use bitnet_burn_manager::KernelManager;
use bitnet_burn_manager::gpu::{GpuOperands, close};
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_manager::plugin::{PluginError, Target};
use bitnet_burn_manager::store::PluginConfig;
use bitnet_burn_manager::{ManagerConfig, Status};
use bitnet_burn_tests::reference::{Mutation, Reference};
use bitnet_burn_tests::*;
use burn::tensor::Device;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The plugin of core/manager/testdata/gpu.c with these macros.
fn build(dir: &Path, name: &str, defines: &[&str]) -> PathBuf {
    let path = dir.join(format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX));
    let mut command = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    command.args(["-std=gnu11", "-O2", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC", "-I"]);
    command
        .arg(repository().join("plugins/abi/include"))
        .arg(repository().join("core/manager/testdata/gpu.c"));
    run(command.args(defines.iter().map(|define| format!("-D{define}"))).arg("-o").arg(&path));
    path
}

/// The template, as its authors build it.
fn build_template(dir: &Path) -> PathBuf {
    let template = repository().join("examples/plugin-gpu");
    let project = dir.join("project");
    std::fs::create_dir_all(project.join("src")).unwrap();
    for file in ["src/lib.rs", "src/matmul.wgsl", "src/matmul.cu"] {
        std::fs::copy(template.join(file), project.join(file)).unwrap();
    }
    let manifest = std::fs::read_to_string(template.join("Cargo.toml")).unwrap();
    let sdk = repository().join("plugins/abi");
    let manifest = manifest.replace("\"../../plugins/abi\"", &format!("{:?}", sdk.to_str().unwrap()));
    std::fs::write(project.join("Cargo.toml"), manifest).unwrap();
    let target = project.join("target");
    let mut command = Command::new(env!("CARGO"));
    run(command
        .args(["build", "--release", "--offline"])
        .current_dir(&project)
        .env("CARGO_TARGET_DIR", &target));
    target.join("release").join(format!(
        "{}example_gpu_kernels{}",
        std::env::consts::DLL_PREFIX,
        std::env::consts::DLL_SUFFIX
    ))
}

/// The library of the CubeCL kernels, which is built with the tests of the workspace.
fn cube_plugin() -> PathBuf {
    let name = format!("{}cube_plugin{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let profile = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
    let path = profile.join("examples").join(name);
    if !path.exists() {
        let package = ["build", "-p", "bitnet-burn-cube", "--features", "lower", "--example", "cube_plugin"];
        let target = profile.parent().unwrap();
        run(Command::new(env!("CARGO"))
            .args(package)
            .current_dir(repository())
            .env("CARGO_TARGET_DIR", target));
    }
    path
}

fn config(cache: &Path) -> ManagerConfig {
    ManagerConfig {
        threads: 2,
        tune_budget: Duration::ZERO,
        cache_dir: Some(cache.to_owned()),
        plugins: PluginConfig {
            helper: Some(env!("CARGO_BIN_EXE_gate-helper").into()),
            // A busy machine is no hanging plugin.
            patience: Duration::from_secs(60),
            ..PluginConfig::default()
        },
        ..ManagerConfig::default()
    }
}

/// Macros of core/manager/testdata/gpu.c, and what the refusal must say.
const HOSTILE: &[(&str, &[&str], &[&str])] = &[
    (
        "no_wgsl",
        &["BEFORE=this is no shader"],
        &["[1, 1] x [1, 1]ᵀ", "WGSL compilation failed", "expected global item"],
    ),
    ("type_error", &["TEXT=sum += 1.5f;"], &["WGSL compilation failed"]),
    ("other_entry", &["ENTRY=\"other\""], &["[1, 1] x [1, 1]ᵀ", "other"]),
    (
        "one_element",
        &["TEXT=if (p[1] == 33u && p[2] == 129u && n == 20u) { sum += 1; }"],
        &["kernel gpu/text, [1, 129] x [33, 129]ᵀ", "y[0, 20] = ", "the reference has "],
    ),
    // Right as far as rounding goes: the sums show it.
    ("last_bit", &["TEXT=if (abs(sum) > 100000) { sum += 1; }"], &["extreme values", "the reference has "]),
    ("left_out", &["TEXT=if (n == 40u) { return; }"], &["y[0, 40] was not written"]),
    ("beside", &["TEXT=y[m * p[4] + p[5] + p[1]] = 1.0;"], &["it wrote behind row 0 of its output"]),
    ("input", &["TEXT=w[0] = 0xffffffffu;"], &["wrote into the weights"]),
    ("huge_group", &["THREADS=4096", "GROUP={64, 1, 1}", "TILE_N=64"], &["[1, 1] x [1, 1]ᵀ", "4096"]),
    // Sixty-four times as many workgroups as it needs: slow, and right.
    ("large_grid", &["TILE_N=1"], &[]),
];

#[test]
fn texts_that_are_wrong_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let manager = KernelManager::new(config(&dir.path().join("cache"))).unwrap();
    for (name, defines, expected) in HOSTILE {
        let path = build(dir.path(), name, defines);
        let report = manager.verify_plugin(&path).unwrap();
        if expected.is_empty() {
            assert!(report.passed(), "{name}: {report:?}");
            continue;
        }
        let Some(refusal) = report.refusal else { panic!("{name} passed: {report:?}") };
        println!("{name}: {refusal}");
        for part in *expected {
            assert!(refusal.to_string().contains(part), "{name}: no {part:?} in {refusal}");
        }
        let error = manager.load_plugin(&path).unwrap_err();
        assert!(matches!(error, PluginError::Refused { .. }), "{name}: {error}");
    }
}

#[test]
fn a_text_that_hangs_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&dir.path().join("cache"));
    config.plugins.patience = Duration::from_secs(4);
    // Mesa ends all loops of a shader after 65535 turns in all, and these take long.
    let turn = "sum = (sum << 1u) ^ (sum >> 3u);".repeat(3000);
    let text = format!("TEXT=for (var i = 0u; p[0] >= 33u && i < 65000u; i++) {{ {turn} }}");
    let report =
        KernelManager::new(config).unwrap().verify_plugin(&build(dir.path(), "hangs", &[&text])).unwrap();
    let refusal = report.refusal.expect("it hangs").to_string();
    assert!(refusal.contains("it hangs"), "{refusal}");
}

#[test]
fn what_the_device_lacks_leaves_the_kernels_for_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let manager = KernelManager::new(config(&dir.path().join("cache"))).unwrap();
    for (name, defines, reason) in [
        ("feature", &["NAME=\"feature\"", "FEATURES=\"tensor-cores\""][..], "needs tensor-cores"),
        ("cuda", &["NAME=\"cuda\"", "TARGET=BITNET_TARGET_CUDA"], "it is for cuda, and "),
    ] {
        let reports = manager.load_plugin(&build(dir.path(), name, defines)).unwrap();
        assert_eq!((reports[0].target.as_str(), &reports[0].status), ("cpu", &Status::Ready), "{name}");
        let Status::Unavailable(why) = &reports[1].status else { panic!("{name}: {reports:?}") };
        assert!(why.contains(reason), "{name}: {why}");
    }
    for (name, defines) in
        [("canonical", &["NAME=\"canonical\""][..]), ("private", &["NAME=\"private\"", "PRIVATE"])]
    {
        let path = build(dir.path(), name, defines);
        let reports = manager.load_plugin(&path).unwrap();
        assert_eq!((reports[1].target.as_str(), &reports[1].status), ("wgsl", &Status::Ready), "{name}");
        let verdict = manager.verify_plugin(&path).unwrap();
        assert!(verdict.kernels[1].cases == 68 && verdict.kernels[1].device.is_some(), "{verdict:?}");
    }
}

/// CubeCL's kernels without the program's CubeCL.
#[test]
fn the_cubecl_kernels_load_from_a_library() {
    let dir = tempfile::tempdir().unwrap();
    let manager = KernelManager::new(config(&dir.path().join("cache"))).unwrap();
    let reports = manager.load_plugin(&cube_plugin()).unwrap();
    let of = |target: &str| reports.iter().filter(|kernel| kernel.target == target).collect::<Vec<_>>();
    let (wgsl, cuda) = (of("wgsl"), of("cuda"));
    assert_eq!((wgsl.len(), cuda.len()), (9, 9), "{reports:?}");
    for kernel in cuda {
        assert!(matches!(kernel.status, Status::Unavailable(_)), "CUDA on wgpu: {kernel:?}");
    }
    let ready = wgsl.iter().filter(|kernel| kernel.status == Status::Ready).count();
    // Those that need subgroups may be unavailable.
    assert!(ready >= 7, "{wgsl:?}");
    // Two rows, and a shape that the gate has not.
    let (mut random, (m, n, k)) = (SplitMix64::new(5), (2, 70, 300));
    let weights = random.weights(n, k);
    let x: Vec<f32> = (0..m * k).map(|_| random.below(2001) as f32 / 100.0 - 10.0).collect();
    let x = Activations::from_rows(&x, k);
    let mut want = vec![0f32; m * n];
    reference::matmul(&weights, n, k, 0.37, x.q(), x.stride(), x.scale(), m, &mut want, n);
    let device = bitnet_burn::backends::gpu::open_gpu().unwrap();
    let kernels = manager.gpu_kernels(Target::Wgsl, (m, n, k));
    assert!(kernels.len() >= 5, "{} kernels", kernels.len());
    for kernel in kernels {
        let mut y = vec![f32::NAN; m * n];
        device.run(kernel.kernel(), &GpuOperands::new(&weights, 0.37, &x, n, n, 0), &mut y).unwrap();
        let id = kernel.kernel().id();
        assert!(y.iter().zip(&want).all(|(got, want)| close(*got, *want)), "{id}: {y:?}, {want:?}");
    }
}

/// The process's manager, and a model that computes with the template's kernels alone.
#[test]
fn a_models_logits_through_a_plugin_are_those_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let template = build_template(dir.path());
    // Right for all shapes that the gate tries: none has six rows.
    let later = build(dir.path(), "later", &["NAME=\"later\"", "TEXT=if (p[0] == 6u) { sum += 1; }"]);
    let config = ManagerConfig { force: Some("gemm".into()), ..config(&dir.path().join("cache")) };
    let (manager, refused) = manager::configure(config, &[template, later]).unwrap();
    assert!(refused.is_empty(), "{refused:?}");
    let status = |id: &str| manager.report().kernels.into_iter().find(|k| k.kernel == id).unwrap();
    for (id, target) in [("example-gpu/gemv", "wgsl"), ("example-gpu/gemm", "wgsl"), ("later/text", "wgsl")] {
        assert_eq!((status(id).target.as_str(), status(id).status), (target, Status::Ready), "{id}");
    }
    let Status::Unavailable(why) = status("example-gpu/cuda-gemm").status else { panic!("CUDA on wgpu") };
    assert!(why.contains("it is for cuda"), "{why}");

    let model_dir = repository_golden().join("hf/A-packed-auto");
    let device = Device::wgpu(Default::default());
    let load = |device: &Device| {
        let checkpoint = Checkpoint::open(&model_dir, &Default::default()).unwrap();
        bitnet_burn_engine::load::load(&checkpoint, device, &LoadOptions::default(), &mut |_| {}).unwrap()
    };
    let model = load(&device);
    let BitLinearWeight::Packed(weight) = &model.blocks[0].attention.softmax().unwrap().q_proj.weight else {
        panic!("packed")
    };
    let words = weight.codes.val().dims();
    assert_eq!(words[0], 1, "q_proj is in the plugin's packing, not in canonical rows: {words:?}");
    let goldens = read_goldens(&model_dir.join("goldens.safetensors"));
    let reference = Reference::from_hf(&model_dir);
    let ids = goldens["seq16.input_ids"].ids();
    let want = &goldens["seq16.logits"];
    let forward = reference.forward(&ids, Mutation::None);
    let certain = forward.certain().min(want.shape[0]).max(ids.len()) * want.shape[1];
    // The first pass compares every shape, the second one computes.
    for chunk in [16, 16, 5] {
        let got = all_logits(&model, &ids, chunk, CacheType::F32);
        let difference = max_difference(&got[..certain], &want.values[..certain]);
        println!("in chunks of {chunk}: {difference:.1e}");
        assert!(difference < 1e-3, "in chunks of {chunk}: {difference:e}");
    }
    let report = manager.report();
    let kernel = status("example-gpu/gemm");
    assert!(kernel.calls > 0 && kernel.failures.total() == 0 && kernel.sha256.is_some(), "{kernel:?}");
    assert_eq!((kernel.version.as_str(), kernel.layout.as_str()), ("0.1.0", "example-gpu/interleaved32"));
    assert!(report.fallbacks.is_empty() && report.reference_calls == 0, "{report:?}");
    assert!(
        report.kernels.iter().all(|k| k.calls == 0 || k.kernel == "example-gpu/gemm" || k.target == "cpu")
    );

    // Saved and moved as any other: canonical codes, and on the host the same results.
    let layer: BitLinear =
        model.blocks[0].attention.softmax().unwrap().q_proj.clone().into_canonical().unwrap();
    let BitLinearWeight::Packed(weight) = &layer.weight else { panic!("packed") };
    let n = layer.d_output();
    assert_eq!(weight.codes.val().dims()[0], n);
    let flex = load(&Device::flex());
    let host = flex.blocks[0].attention.softmax().unwrap().q_proj.clone().into_canonical().unwrap();
    let BitLinearWeight::Packed(host) = &host.weight else { panic!("packed") };
    let codes = |weight: &bitnet_burn::PackedWeight| -> Vec<u32> {
        weight.codes.val().into_data().iter::<i64>().map(|word| word as u32).collect()
    };
    assert_eq!(codes(weight), codes(host));
}
