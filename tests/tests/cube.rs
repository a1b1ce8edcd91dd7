//! The CubeCL kernels, on a GPU or what stands in for one (lavapipe): a model that computes with them alone, and what
//! they are as text. Without an adapter this fails: whoever builds the feature wants it tested.
#![cfg(feature = "wgpu")]

use bitnet_burn::CacheType;
use bitnet_burn::backends::manager;
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::reference;
use bitnet_burn_manager::gpu::{GpuOperands, close};
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_manager::plugin::{Plugin, Target};
use bitnet_burn_manager::{KernelManager, ManagerConfig};
use bitnet_burn_plugin::abi;
use bitnet_burn_plugin::sdk::build_plugin;
use bitnet_burn_tests::reference::{Mutation, Reference};
use bitnet_burn_tests::*;
use burn::tensor::Device;

#[test]
fn logits_and_greedy_tokens_are_those_of_transformers() {
    let config = ManagerConfig { threads: 2, force: Some("cube".into()), ..ManagerConfig::default() };
    let (manager, refused) = manager::configure(config, &[]).unwrap();
    assert!(refused.is_empty(), "{refused:?}");
    let dir = repository_golden().join("hf/A-packed-auto");
    let checkpoint = Checkpoint::open(&dir, &Default::default()).unwrap();
    let device = Device::wgpu(Default::default());
    let model =
        bitnet_burn_engine::load::load(&checkpoint, &device, &LoadOptions::default(), &mut |_| {}).unwrap();
    let goldens = read_goldens(&dir.join("goldens.safetensors"));
    let reference = Reference::from_hf(&dir);
    for n in [16, 64] {
        let get = |name: &str| &goldens[&format!("seq{n}.{name}")];
        let (prompt, generated) = (get("input_ids").ids(), get("gen_ids").ids());
        let forward = reference.forward(&[prompt.clone(), generated.clone()].concat(), Mutation::None);
        let want = get("logits");
        let certain = forward.certain().min(n).max(if n == 16 { 16 } else { 0 }) * want.shape[1];
        // Both kinds of kernels: for a few rows, and for many.
        for chunk in [256, 7, 1] {
            let got = all_logits(&model, &prompt, chunk, CacheType::F32);
            let difference = max_difference(&got[..certain], &want.values[..certain]);
            println!("seq{n} in chunks of {chunk}: {difference:.1e}");
            assert!(difference < 1e-3, "seq{n} in chunks of {chunk}: {difference:e}");
        }
        let tokens = greedy(&model, &prompt, 32);
        let margins = &get("gen_margin").values;
        let compared = (0..32).take_while(|&i| n - 1 + i < forward.certain() || margins[i] >= 0.5).count();
        assert_eq!(tokens[..compared], generated[..compared], "seq{n}");
    }
    let report = manager.report();
    assert!(report.fallbacks.is_empty() && report.reference_calls == 0, "{report:?}");
    for kernel in report.kernels.iter().filter(|kernel| kernel.calls > 0) {
        // The first result of each shape is compared with a kernel of the CPU.
        println!("{}: {} calls", kernel.kernel, kernel.calls);
        assert!(
            kernel.target == "cubecl" && kernel.failures.total() == 0 || kernel.target == "cpu",
            "{kernel:?}"
        );
    }
    let used = |prefix: &str| report.kernels.iter().any(|k| k.kernel.starts_with(prefix) && k.calls > 0);
    assert!(used("cube/gemv") && used("cube/gemm"), "{report:?}");
}

/// The plugin of the CubeCL kernels as text.
fn lowered() -> &'static abi::Plugin {
    let kernels = bitnet_burn_cube::texts();
    build_plugin(c"cube-text", c"0.1.0", kernels.iter().flat_map(|kernel| kernel.descriptors()).collect())
}

#[test]
fn the_kernels_texts_compute_what_the_kernels_do() {
    let manager = KernelManager::new(ManagerConfig { threads: 1, ..ManagerConfig::default() }).unwrap();
    manager.register(Plugin::built_in(lowered()).unwrap()).unwrap();
    let device = bitnet_burn_backends::gpu::open_gpu().unwrap();
    let mut random = SplitMix64::new(7);
    let mut tried = 0;
    for (m, n, k) in [(1, 1, 1), (1, 33, 129), (3, 17, 700), (17, 70, 256), (65, 130, 384)] {
        let weights = random.weights(n, k);
        let x: Vec<f32> = (0..m * k).map(|_| random.below(2001) as f32 / 100.0 - 10.0).collect();
        let x = Activations::from_rows(&x, k);
        let mut want = vec![0f32; m * n];
        reference::matmul(&weights, n, k, 0.37, x.q(), x.stride(), x.scale(), m, &mut want, n);
        for kernel in manager.gpu_kernels(Target::Wgsl, (m, n, k)) {
            let mut y = vec![f32::NAN; m * n];
            let operands = GpuOperands::new(&weights, 0.37, &x, n, n, 0);
            device.run(kernel.kernel(), &operands, &mut y).unwrap();
            let id = kernel.kernel().id();
            for (i, (got, want)) in y.iter().zip(&want).enumerate() {
                assert!(close(*got, *want), "{id} [{m}, {n}, {k}] {i}: {got:e} {want:e}");
            }
            tried += 1;
        }
    }
    assert_eq!(tried, 7 + 7 + 8 + 2 + 2);
}
