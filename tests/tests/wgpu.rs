//! The same models through the default bodies, on a GPU or what stands in for one (lavapipe). Without an
//! adapter these tests fail: whoever builds the feature wants it tested.
#![cfg(feature = "wgpu")]

use std::path::Path;

use bitnet_burn::BitNet;
use bitnet_burn::ModelConfig;
use bitnet_burn::backends::ops;
use bitnet_burn::{
    BitLinearConfig, BitLinearWeight, CacheType, DenseWeight, FeedForward, Quantisation, WeightScale,
};
use bitnet_burn_engine::load::{ActivationRule, LoadOptions};
use bitnet_burn_tests::reference::{Forward, Mutation, Reference};
use bitnet_burn_tests::*;
use burn::tensor::{Device, Tensor, TensorData};

const TOLERANCE: f32 = 1e-3;

fn gpu() -> Device {
    Device::wgpu(Default::default())
}

/// Logits up to the first uncertain rounding; behind it only sanity.
fn compare(what: &str, got: &[f32], want: &Golden, forward: &Forward, at_least: usize) {
    let positions = forward.certain().min(want.shape[0]).max(at_least);
    let end = positions * want.shape[1];
    let (difference, all) =
        (max_difference(&got[..end], &want.values[..end]), max_difference(got, &want.values));
    println!("{what}: {difference:.1e} over {positions} positions, {all:.1e} over all {}", want.shape[0]);
    assert!(difference < TOLERANCE, "{what}: {difference:e}");
    assert!(all < 1.0, "{what}: {all:e} over all");
}

#[test]
fn logits_and_greedy_tokens_are_those_of_transformers() {
    let dir = repository_golden().join("hf/A-packed-auto");
    let model = load(&dir, &gpu(), &LoadOptions::default());
    let reference = Reference::from_hf(&dir);
    let goldens = read_goldens(&dir.join("goldens.safetensors"));
    for n in [1, 16, 64] {
        let get = |name: &str| &goldens[&format!("seq{n}.{name}")];
        let prompt = get("input_ids").ids();
        let want = get("gen_ids").ids();
        let forward = reference.forward(&[prompt.clone(), want.clone()].concat(), Mutation::None);
        for chunk in [256, 7] {
            let got = all_logits(&model, &prompt, chunk, CacheType::F32);
            // The goldens' README vouches for prompts of 1 and 16 tokens.
            let at_least = if n <= 16 { n } else { 0 };
            compare(&format!("seq{n} in chunks of {chunk}"), &got, get("logits"), &forward, at_least);
        }
        let tokens = greedy(&model, &prompt, 32);
        let margins = &get("gen_margin").values;
        let compared = (0..32).take_while(|&i| n - 1 + i < forward.certain() || margins[i] >= 0.5).count();
        println!("seq{n}: {compared} tokens compared");
        assert_eq!(tokens[..compared], want[..compared], "seq{n}");
    }
}

#[test]
fn a_gguf_file_gives_the_logits_of_the_float64_reference() {
    let dir = repository_golden().join("gguf");
    let path = dir.join("tiny_a-i2_s.gguf");
    let device = gpu();
    let [model, float] = [ActivationRule::Model, ActivationRule::Float]
        .map(|activations| load(&path, &device, &LoadOptions { activations, ..LoadOptions::default() }));
    let reference = Reference::from_gguf(&path);
    for n in [16, 37] {
        let ids = read_tokens(&dir.join(format!("tiny_a-tokens{n}.txt")));
        let golden = |kind: &str| read_npy(&Path::new(&dir).join(format!("tiny_a-{kind}-{n}.npy")));
        let forward = reference.forward(&ids, Mutation::None);
        let got = all_logits(&model, &ids, 256, CacheType::F32);
        let want = golden("ref_int8");
        compare(&format!("tiny_a {n}"), &got, &want, &forward, 0);
        if n == 16 {
            for (position, row) in got.chunks_exact(want.shape[1]).enumerate() {
                assert_eq!(argmax(row), argmax(want.row(position)), "position {position}");
            }
        }
        let got = all_logits(&float, &ids, 256, CacheType::F32);
        let difference = max_difference(&got, &golden("ref_none").values);
        println!("tiny_a {n} with float activations: {difference:.1e}");
        assert!(difference < 1e-3, "tiny_a {n} with float activations: {difference:e}");
    }
}

/// Experts, which the host chooses, sliding windows, and layers without RoPE.
#[test]
fn a_mixture_with_windows_gives_the_logits_of_its_reference() {
    let Some(golden) = golden_dir("a mixture on a GPU") else { return };
    let file = golden.join("2026/gguf/maple-small-q2_0.gguf");
    let model = load(&file, &gpu(), &LoadOptions::default());
    let goldens = read_goldens(&file.with_extension("goldens.safetensors"));
    let (ids, want) = (goldens["seq16.input_ids"].ids(), &goldens["seq16.logits"].values);
    for chunk in [256, 1] {
        let difference = max_difference(&all_logits(&model, &ids, chunk, CacheType::F32), want);
        println!("maple-small in chunks of {chunk}: {difference:.1e}");
        assert!(difference < TOLERANCE, "chunks of {chunk}: {difference:e}");
    }
}

#[test]
fn bit_linear_computes_and_differentiates_as_on_the_host() {
    setup();
    let (k, n, m) = (784, 100, 5);
    let (host, gpu) = (Device::flex().autodiff(), gpu().autodiff());
    let layer = BitLinearConfig::new(k, n).with_norm(true).init(&host);
    let mut random = Random(12);
    let (x, dy) = (random.floats(m * k), random.floats(m * n));
    let values = |tensor: Tensor<2>| tensor.into_data().try_to_vec::<f32>().unwrap();
    for packed in [false, true] {
        let mut results = Vec::new();
        for device in [&host, &gpu] {
            use burn::module::Module;
            let layer = layer.clone().to_device(device);
            let layer = if packed { layer.pack().unwrap() } else { layer };
            let tensor = |values: &[f32], shape: [usize; 2]| -> Tensor<2> {
                Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
            };
            let input = tensor(&x, [m, k]).require_grad();
            let y = layer.forward(input.clone());
            let gradients = (y.clone() * tensor(&dy, [m, n])).sum().backward();
            results.push((values(y), values(input.grad(&gradients).expect("a gradient for the input"))));
        }
        let largest = |values: &[f32]| values.iter().fold(0f32, |a, v| a.max(v.abs()));
        let (host, gpu) = (&results[0], &results[1]);
        for (what, a, b) in [("output", &gpu.0, &host.0), ("gradient", &gpu.1, &host.1)] {
            let difference = max_difference(a, b);
            assert!(
                difference <= 1e-4 * largest(b),
                "{what}, packed {packed}: {difference:e} of {:e}",
                largest(b)
            );
        }
    }
}

#[test]
fn a_model_trains_as_on_the_host() {
    setup();
    let config = ModelConfig {
        hidden_size: 64,
        intermediate_size: 96,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 16,
        vocab_size: 50,
        context_length: 16,
        ..bitnet_burn_engine::synth::shape("tiny").unwrap()
    };
    let (length, mut random) = (16, Random(5));
    let tokens: Vec<u32> = (0..3 * length).map(|_| random.below(50) as u32).collect();
    let targets: Vec<u32> = (0..3 * length).map(|_| random.below(50) as u32).collect();
    let kind = |scale, activations| Some(Quantisation { scale, activations });
    for quantise in [
        None,
        Some(Quantisation::default()),
        kind(WeightScale::Row, ActivationRule::Row),
        kind(WeightScale::Group(32), ActivationRule::Model),
        kind(WeightScale::Group(32), ActivationRule::Float),
    ] {
        let run = |device: &Device| {
            let mut random = Random(6);
            let model = BitNet::trainable::<()>(&config, quantise, device, &mut |_, shape| {
                Ok(random.floats(shape.iter().product()).iter().map(|v| v * 0.3 + 0.1).collect())
            });
            let model = model.unwrap();
            let logits = model.forward_sequences(&tokens, length).unwrap();
            let loss = ops::cross_entropy(logits, &targets).mean();
            let value = loss.clone().into_data().iter::<f32>().next().unwrap();
            let grads = loss.backward();
            let block = &model.blocks[0];
            let q_proj = &block.attention.softmax().unwrap().q_proj;
            let BitLinearWeight::Latent(q) = &q_proj.weight else { panic!("training") };
            let FeedForward::One(network) = &block.feed_forward else { panic!("no experts") };
            let BitLinearWeight::Latent(down) = &network.down_proj.weight else { panic!("training") };
            let DenseWeight::Float(embedding) = &model.embedding.weight else { panic!("training") };
            let of = |weight: Tensor<2>| -> Vec<f32> {
                weight.grad(&grads).expect("a gradient").into_data().iter::<f32>().collect()
            };
            let norm = block.attention.input_norm().gamma.val().grad(&grads).expect("a gradient");
            (
                value,
                [of(q.val()), of(down.val()), of(embedding.val()), norm.into_data().iter::<f32>().collect()],
            )
        };
        let (host, gpu) = (run(&Device::flex().autodiff()), run(&gpu().autodiff()));
        assert!((host.0 - gpu.0).abs() < 1e-3 * host.0, "{quantise:?}: loss {} and {}", host.0, gpu.0);
        for (i, (a, b)) in host.1.iter().zip(&gpu.1).enumerate() {
            let largest = a.iter().fold(0f32, |m, v| m.max(v.abs()));
            // A rounding that falls to the other side moves quantised gradients.
            let tolerance = if quantise.is_some() { 0.1 } else { 1e-3 };
            let difference = max_difference(a, b);
            assert!(
                largest > 0.0 && difference <= tolerance * largest,
                "{quantise:?} {i}: {difference:e} of {largest:e}"
            );
        }
    }
}
