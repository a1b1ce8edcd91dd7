//! A model that computes with the CubeCL kernels alone, on a GPU or what stands in for one (lavapipe). Without an adapter
//! this fails: whoever builds the feature wants it tested.
#![cfg(feature = "wgpu")]

use std::ops::ControlFlow;

use bitnet_burn::backends::manager;
use bitnet_burn::bitnet::{BitNet, LoadOptions};
use bitnet_burn::checkpoint::Checkpoint;
use bitnet_burn::core::manager::ManagerConfig;
use bitnet_burn::generate::{self, GenerateOptions};
use bitnet_burn::nn::CacheType;
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
    let model = BitNet::from_checkpoint(&checkpoint, &device, &LoadOptions::default(), &mut |_| {}).unwrap();
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
        let mut cache = model.cache(n + 32, CacheType::F32).unwrap();
        let sequence = cache.add_sequence(0);
        let options = GenerateOptions { max_new_tokens: 32, ..GenerateOptions::default() };
        let generation = generate::generate(&model, &prompt, sequence, &mut cache, &options, &mut |_, _| {
            ControlFlow::Continue(())
        });
        let tokens = generation.unwrap().tokens;
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
