//! Models with gated DeltaNets: whatever is done to their states, a sequence's logits are those of the sequence alone.

use bitnet_burn::{
    BitNet, CacheError, CacheType, DeltaNet, FloatPart, ForwardError, GatedActivation, KvCache, ModelConfig,
    Quantisation, Row, SequenceId,
};
use bitnet_burn_engine::generate::{GenerateOptions, Generator, Step};
use bitnet_burn_tests::*;
use burn::tensor::Device;

const VOCABULARY: usize = 50;

/// A layer with attention between two with DeltaNets, with gates, norms of query and key heads and a partial RoPE.
fn config() -> ModelConfig {
    let mut config = ModelConfig {
        hidden_size: 32,
        intermediate_size: 48,
        n_layers: 3,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 16,
        vocab_size: VOCABULARY,
        context_length: 64,
        sub_norms: false,
        activation: GatedActivation::Silu,
        ..bitnet_burn_engine::synth::shape("tiny").unwrap()
    };
    config.options.qk_norms = true;
    config.options.attention_gate = true;
    config.options.rope_dim = Some(8);
    config.options.delta_net = Some(DeltaNet {
        layers: vec![true, false, true],
        key_heads: 2,
        value_heads: 4,
        key_dim: 8,
        value_dim: 12,
        taps: 4,
        tiled: false,
        grouped_output: false,
    });
    config
}

/// A frozen model. Its ternary weights have one magnitude, so that every device finds the same scale.
fn model(quantise: bool, device: &Device) -> BitNet {
    let (mut random, device) = (Random(6), device.clone().autodiff());
    let quantisation = quantise.then(Quantisation::default);
    let model = BitNet::trainable::<()>(&config(), quantisation, &device, &mut |name, shape| {
        let floats = ["embed", "in_proj_a", "in_proj_b", "conv1d"].iter().any(|part| name.contains(part));
        let ternary = shape.len() == 2 && !floats;
        let value = |v: f32| if ternary { 0.25f32.copysign(v) } else { v * 0.4 + 0.1 };
        Ok(random.floats(shape.iter().product()).into_iter().map(value).collect())
    });
    model.unwrap().pack().unwrap()
}

/// The model on every device that has the same bits.
fn models() -> Vec<BitNet> {
    devices().iter().map(|device| model(true, device)).collect()
}

fn tokens(seed: u64, n: usize) -> Vec<u32> {
    let mut random = Random(seed);
    (0..n).map(|_| random.below(VOCABULARY) as u32).collect()
}

fn append(model: &BitNet, cache: &mut KvCache, sequence: SequenceId, tokens: &[u32]) -> Vec<f32> {
    let position = cache.length(sequence).unwrap();
    let rows: Vec<Row> = tokens
        .iter()
        .enumerate()
        .map(|(i, &token)| Row { token, sequence, position: position + i })
        .collect();
    let wanted: Vec<usize> = (0..rows.len()).collect();
    model.forward(&rows, &wanted, cache).unwrap().into_data().try_to_vec().unwrap()
}

/// The logits of the last `last` tokens of a sequence that is alone.
fn alone(model: &BitNet, tokens: &[u32], last: usize) -> Vec<f32> {
    all_logits(model, tokens, 256, CacheType::F32)[(tokens.len() - last) * VOCABULARY..].to_vec()
}

#[test]
fn all_devices_in_host_memory_compute_the_same_bits() {
    let ids = tokens(1, 23);
    let logits: Vec<_> = models().iter().map(|model| all_logits(model, &ids, 256, CacheType::F32)).collect();
    for (i, other) in logits.iter().enumerate().skip(1) {
        assert_same_bits(other, &logits[0], &format!("device {i}"));
    }
}

#[test]
fn chunks_and_other_sequences_change_no_bit() {
    for model in models() {
        let ids = tokens(1, 23);
        let whole = all_logits(&model, &ids, 256, CacheType::F32);
        for chunk in [1, 2, 7, 22] {
            assert_same_bits(&all_logits(&model, &ids, chunk, CacheType::F32), &whole, "chunks");
        }
        let mut cache = model.cache(64, CacheType::F32).unwrap();
        let [a, b] = [cache.add_sequence(0), cache.add_sequence(0)];
        let other = tokens(2, 9);
        let mut rows: Vec<Row> =
            (0..).zip(&other).map(|(position, &token)| Row { token, sequence: a, position }).collect();
        rows.extend((0..).zip(&ids).map(|(position, &token)| Row { token, sequence: b, position }));
        let wanted: Vec<usize> = (9..32).collect();
        let batch: Vec<f32> =
            model.forward(&rows, &wanted, &mut cache).unwrap().into_data().try_to_vec().unwrap();
        assert_same_bits(&batch, &whole, "beside another sequence");
        // What training computes, without a cache.
        let sequences = model.forward_sequences(&[&ids[..], &ids].concat(), 23).unwrap();
        let sequences: Vec<f32> = sequences.into_data().try_to_vec().unwrap();
        assert!(max_difference(&sequences, &[&whole[..], &whole].concat()) < 1e-4);
    }
}

#[test]
fn a_fork_and_its_origin_go_on_independently() {
    for model in models() {
        let (history, a, b) = (tokens(1, 20), tokens(2, 5), tokens(3, 5));
        let mut cache = model.cache(64, CacheType::F32).unwrap();
        let origin = cache.add_sequence(0);
        append(&model, &mut cache, origin, &history);
        let fork = cache.fork(origin).unwrap();
        for (a_token, b_token) in a.iter().zip(&b) {
            append(&model, &mut cache, origin, &[*a_token]);
            append(&model, &mut cache, fork, &[*b_token]);
        }
        let next = tokens(4, 1);
        for (id, tail) in [(origin, &a), (fork, &b)] {
            let whole = [&history, tail, &next].map(|part| &part[..]).concat();
            assert_same_bits(&append(&model, &mut cache, id, &next), &alone(&model, &whole, 1), "a fork");
        }
    }
}

#[test]
fn a_sequence_is_cut_to_its_snapshot_or_to_nothing() {
    for model in models() {
        let (history, wrong, right) = (tokens(4, 20), tokens(5, 9), tokens(6, 7));
        let mut cache = model.cache(64, CacheType::F32).unwrap();
        assert!(cache.needs_snapshots());
        let id = cache.add_sequence(0);
        append(&model, &mut cache, id, &history);
        cache.snapshot(id).unwrap();
        append(&model, &mut cache, id, &wrong);
        // Nothing to cut.
        assert_eq!(cache.truncate(id, 29).unwrap(), 29);
        // Behind the snapshot: to it, more than once.
        for length in [25, 20] {
            assert_eq!((cache.truncate(id, length).unwrap(), cache.length(id).unwrap()), (20, 20));
            let got = append(&model, &mut cache, id, &right);
            let whole = [&history[..], &right].concat();
            assert_same_bits(&got, &alone(&model, &whole, 7), "behind the snapshot");
        }
        // Before it: to nothing, and the snapshot is gone.
        assert_eq!((cache.truncate(id, 19).unwrap(), cache.length(id).unwrap()), (0, 0));
        let got = append(&model, &mut cache, id, &[&history[..], &right].concat());
        assert_same_bits(&got, &alone(&model, &[&history[..], &right].concat(), 27), "from the beginning");
        assert_eq!(cache.truncate(id, 21).unwrap(), 0);
        // A fork has its origin's snapshot.
        append(&model, &mut cache, id, &history);
        cache.snapshot(id).unwrap();
        append(&model, &mut cache, id, &wrong);
        let fork = cache.fork(id).unwrap();
        cache.remove(id).unwrap();
        assert_eq!(cache.truncate(fork, 22).unwrap(), 20);
        let got = append(&model, &mut cache, fork, &right);
        assert_same_bits(&got, &alone(&model, &[&history[..], &right].concat(), 7), "a fork");
    }
}

#[test]
fn a_pass_that_fails_changes_no_state() {
    for model in models() {
        let (history, right) = (tokens(7, 12), tokens(8, 4));
        let mut cache = model.cache(16, CacheType::F32).unwrap();
        let id = cache.add_sequence(0);
        append(&model, &mut cache, id, &history);
        let rows = |position: usize, count: usize| -> Vec<Row> {
            (0..count).map(|i| Row { token: 1, sequence: id, position: position + i }).collect()
        };
        let full = model.forward(&rows(12, 5), &[0], &mut cache).unwrap_err();
        assert!(matches!(full, ForwardError::Cache(CacheError::Full { capacity: 16, .. })), "{full}");
        assert!(model.forward(&rows(11, 1), &[0], &mut cache).is_err(), "a position that was there before");
        let got = append(&model, &mut cache, id, &right);
        assert_same_bits(&got, &alone(&model, &[&history[..], &right].concat(), 4), "behind errors");
    }
}

#[test]
fn a_prompt_that_comes_again_goes_on_before_its_last_token() {
    let model = model(true, &Device::flex());
    let prompt = tokens(9, 30);
    let options = GenerateOptions { max_new_tokens: 6, chunk: 8, ..GenerateOptions::default() };
    let mut cache = model.cache(64, CacheType::F32).unwrap();
    let id = cache.add_sequence(0);
    let run = |cache: &mut KvCache| {
        let mut generator = Generator::new(&model, &prompt, id, cache, &options).unwrap();
        let mut tokens = Vec::new();
        loop {
            match generator.step().unwrap() {
                Step::Prompt { .. } => {}
                Step::Token(token) => tokens.push(token),
                Step::Finished(_) => return tokens,
            }
        }
    };
    let first = run(&mut cache);
    assert_eq!(first.len(), 6);
    assert_eq!(cache.truncate(id, 29).unwrap(), 29);
    assert_eq!(run(&mut cache), first);
}

#[test]
fn parameters_come_back_as_they_were_given_and_all_have_gradients() {
    let mut given = Vec::new();
    let mut random = Random(11);
    let device = Device::flex().autodiff();
    let model = BitNet::trainable::<()>(&config(), None, &device, &mut |name, shape| {
        let values: Vec<f32> = random.floats(shape.iter().product()).iter().map(|v| v * 0.4 + 0.1).collect();
        given.push((name.to_owned(), shape.to_vec(), values.clone()));
        Ok(values)
    });
    let model = model.unwrap();
    let mut back = model.parameters();
    let by_name = |a: &(String, Vec<usize>, Vec<f32>), b: &(String, Vec<usize>, Vec<f32>)| a.0.cmp(&b.0);
    given.sort_by(by_name);
    back.sort_by(by_name);
    assert_eq!(given.len(), back.len());
    for (given, back) in given.iter().zip(&back) {
        assert_eq!((&given.0, &given.1), (&back.0, &back.1));
        assert!(max_difference(&given.2, &back.2) < 1e-6, "{}", given.0);
    }
    let names: Vec<_> = given.iter().map(|(name, ..)| &name[..]).collect();
    for part in ["conv1d.weight", "A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight", "norm.weight"] {
        assert!(names.contains(&&*format!("model.layers.2.linear_attn.{part}")), "{part}");
    }

    // By differences: the loss along a step in each parameter.
    let ids = tokens(12, 10);
    let loss = |model: &BitNet| -> f64 {
        let logits = model.forward_sequences(&ids, 5).unwrap();
        let targets: Vec<u32> = ids.iter().map(|id| (id + 1) % VOCABULARY as u32).collect();
        f64::from(
            bitnet_burn::backends::ops::cross_entropy(logits, &targets)
                .mean()
                .into_data()
                .iter::<f32>()
                .next()
                .unwrap(),
        )
    };
    let logits = model.forward_sequences(&ids, 5).unwrap();
    let targets: Vec<u32> = ids.iter().map(|id| (id + 1) % VOCABULARY as u32).collect();
    let gradients = bitnet_burn::backends::ops::cross_entropy(logits, &targets).mean().backward();
    let bitnet_burn::Attention::DeltaNet(delta) = &model.blocks[0].attention else { panic!("a DeltaNet") };
    let of = |gradient: Option<burn::tensor::Tensor<2>>| -> Vec<f32> {
        gradient.expect("a gradient").into_data().iter::<f32>().collect()
    };
    let parts = [
        (FloatPart::DeltaConvolution, of(delta.convolution.val().grad(&gradients))),
        (FloatPart::DeltaRate, of(delta.rate.val().grad(&gradients))),
        (FloatPart::DeltaBias, of(delta.bias.val().grad(&gradients))),
    ];
    for (part, gradient) in parts {
        let size = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(size > 1e-6, "{part:?}: {size:e}");
        // A step along the gradient.
        let moved = |step: f64| {
            let mut model = model.clone();
            let bitnet_burn::Attention::DeltaNet(delta) = &mut model.blocks[0].attention else { panic!() };
            let parameter = match part {
                FloatPart::DeltaConvolution => &mut delta.convolution,
                FloatPart::DeltaRate => &mut delta.rate,
                _ => &mut delta.bias,
            };
            let values: Vec<f32> = (parameter.val().into_data().iter::<f32>().zip(&gradient))
                .map(|(v, g)| v + (step * f64::from(*g) / size) as f32)
                .collect();
            let shape = parameter.val().dims();
            let data = burn::tensor::TensorData::new(values, shape);
            *parameter = burn::module::Param::from_tensor(burn::tensor::Tensor::from_data(data, &device));
            loss(&model)
        };
        let slope = (moved(3e-3) - moved(-3e-3)) / 6e-3;
        assert!((slope - size).abs() < 0.05 * size + 2e-4, "{part:?}: {slope} {size}");
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn a_gpu_computes_the_same() {
    setup();
    {
        let ids = tokens(13, 17);
        let host = all_logits(&model(false, &Device::flex()), &ids, 256, CacheType::F32);
        let gpu = model(false, &Device::wgpu(Default::default()));
        for chunk in [256, 4, 1] {
            let difference = max_difference(&all_logits(&gpu, &ids, chunk, CacheType::F32), &host);
            assert!(difference < 2e-4, "chunks of {chunk}: {difference:e}");
        }
    }
}
