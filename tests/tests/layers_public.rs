//! The parts of a transformer as parts of anybody's model: shapes, types, biases, caches, and what is wrong with an input.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bitnet_burn::{
    Batch, BitAttention, BitAttentionConfig, BitBlockConfig, BitFeedForwardConfig, BitLinear,
    BitLinearConfig, BitNet, CacheType, ForwardError, GatedActivation, History, KvCache, ModelConfig,
    Quantisation, RmsNormConfig, RotaryEncoding, RotaryEncodingConfig, Row, WeightScale,
};
use bitnet_burn_tests::*;
use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};

/// The message of a panic.
fn panic_of<T>(work: impl FnOnce() -> T) -> String {
    let payload = catch_unwind(AssertUnwindSafe(|| drop(work()))).expect_err("it has to panic");
    match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => (*payload.downcast::<&str>().expect("a text")).to_owned(),
    }
}

fn rotary() -> RotaryEncoding {
    RotaryEncodingConfig::new(16).init()
}

fn attention(device: &Device) -> BitAttention {
    BitAttentionConfig::new(64, 4, 2, 16).with_qkv_bias(true).with_output_bias(true).init(device)
}

/// Rows over a cache give what whole sequences do, in both states, in any chunks.
#[test]
fn a_block_computes_whole_sequences_and_rows_over_a_cache() {
    for device in host_devices() {
        let config = BitBlockConfig::new(
            BitAttentionConfig::new(64, 4, 2, 16).with_qkv_bias(true),
            BitFeedForwardConfig::new(64, 96).with_activation(GatedActivation::Silu).with_bias(true),
        );
        let block = config.init(&device);
        let x = random_tensor(1, [6, 64], &device);
        let batch = Batch::whole_sequences(6, &rotary(), true, &device);
        let want = values(block.forward(x.clone(), 0, &batch, &mut History::None { length: 6 }).unwrap());
        let mut cache = KvCache::new([1, 2, 16], 64, CacheType::F32, &device).unwrap();
        let sequence = cache.add_sequence(0);
        let mut got = Vec::new();
        for (from, to) in [(0, 4), (4, 5), (5, 6)] {
            let rows: Vec<Row> = (from..to).map(|position| Row { token: 0, sequence, position }).collect();
            let batch = Batch::over_cache(&rows, &mut cache, &rotary(), true, &device).unwrap();
            let x = x.clone().slice([from..to, 0..64]);
            let y = block.forward(x, 0, &batch, &mut History::Cache(&mut cache)).unwrap();
            batch.finish(&mut cache).unwrap();
            got.extend(values(y));
        }
        assert_eq!(cache.length(sequence).unwrap(), 6);
        close("over a cache", &got, &want, 1e-4);
    }
}

/// Biases and norms of each projection do something, in both states, and the same.
#[test]
fn biases_and_norms_of_projections_are_applied() {
    let device = flex();
    let batch = Batch::whole_sequences(3, &rotary(), true, &device);
    let x = random_tensor(2, [3, 64], &device);
    let with = |layer: &BitLinear, which: &str| {
        let (n, k) = (layer.d_output(), layer.d_input());
        match which {
            "bias" => layer.clone().with_bias(Param::from_tensor(random_tensor(3, [n], &device) * 100.0)),
            _ => {
                let mut norm = RmsNormConfig::new(k).init(&device);
                norm.gamma = Param::from_tensor(random_tensor(4, [k], &device));
                layer.clone().with_norm(norm)
            }
        }
    };
    let attend = |layer: &BitAttention| {
        values(layer.forward(x.clone(), 0, &batch, &mut History::None { length: 3 }).unwrap())
    };
    let plain = attention(&device);
    for which in ["bias", "norm"] {
        for at in 0..4 {
            let mut changed = plain.clone();
            let part = [&mut changed.q_proj, &mut changed.k_proj, &mut changed.v_proj, &mut changed.o_proj]
                .into_iter()
                .nth(at)
                .unwrap();
            *part = with(part, which);
            let got = attend(&changed);
            assert_ne!(got, attend(&plain), "{which} of projection {at}");
            for part in [&mut changed.q_proj, &mut changed.k_proj, &mut changed.v_proj, &mut changed.o_proj] {
                *part = part.clone().pack().unwrap();
            }
            close(&format!("packed, {which} of projection {at}"), &attend(&changed), &got, 1e-4);
        }
        let plain = BitFeedForwardConfig::new(64, 96).init(&device);
        for at in 0..3 {
            let mut changed = plain.clone();
            let part =
                [&mut changed.gate_proj, &mut changed.up_proj, &mut changed.down_proj].into_iter().nth(at);
            let part = part.unwrap();
            *part = with(part, which);
            let got = values(changed.forward(x.clone(), true).unwrap());
            assert_ne!(got, values(plain.forward(x.clone(), true).unwrap()), "{which} of projection {at}");
            for part in [&mut changed.gate_proj, &mut changed.up_proj, &mut changed.down_proj] {
                *part = part.clone().pack().unwrap();
            }
            let packed = values(changed.forward(x.clone(), true).unwrap());
            close(&format!("packed, {which} of projection {at}"), &packed, &got, 1e-4);
        }
    }
}

#[test]
fn a_wrong_shape_names_the_layer_and_both_shapes() {
    let device = flex();
    let linear = BitLinearConfig::new(256, 8).init(&device);
    for layer in [linear.clone(), linear.pack().unwrap()] {
        // As many values as the layer takes.
        let message = panic_of(|| layer.forward(random_tensor::<3>(1, [2, 4, 128], &device)));
        assert_eq!(message, "BitLinear: expected an input of [..., 256], found [2, 4, 128]");
    }
    let network = BitFeedForwardConfig::new(64, 96).init(&device);
    let message = panic_of(|| network.forward(random_tensor(1, [2, 32], &device), true));
    assert_eq!(message, "BitFeedForward: expected an input of [..., 64], found [2, 32]");
    let attention = attention(&device);
    let batch = Batch::whole_sequences(2, &rotary(), true, &device);
    let none = || History::None { length: 2 };
    let message = panic_of(|| attention.forward(random_tensor(1, [2, 32], &device), 0, &batch, &mut none()));
    assert_eq!(message, "BitAttention: expected an input of [..., 64], found [2, 32]");
    let other = Batch::whole_sequences(2, &RotaryEncodingConfig::new(8).init(), true, &device);
    let message = panic_of(|| attention.forward(random_tensor(1, [2, 64], &device), 0, &other, &mut none()));
    assert!(message.contains("RoPE turns 16 values of a head") && message.contains("for 8"), "{message}");
    for (config, expected) in [
        (BitLinearConfig::new(0, 8), "d_input is 0"),
        (BitLinearConfig::new(8, 0), "d_output 0"),
        (BitLinearConfig::new(100, 8).with_scale(WeightScale::Group(64)), "does not divide rows of 100"),
    ] {
        for init in [BitLinearConfig::init, BitLinearConfig::init_packed] {
            let message = panic_of(|| init(&config, &device));
            assert!(message.contains("BitLinearConfig") && message.contains(expected), "{message}");
        }
    }
    let message = panic_of(|| BitAttentionConfig::new(64, 4, 3, 16).init(&device));
    assert_eq!(message, "BitAttention: 4 query heads over 3 key heads");
}

#[test]
fn a_batch_of_no_rows_gives_no_rows() {
    for device in devices() {
        let layer = BitLinearConfig::new(64, 8).with_bias(true).with_norm(true).init(&device);
        for layer in [layer.clone(), layer.pack().unwrap()] {
            assert_eq!(layer.forward(Tensor::<2>::zeros([0, 64], &device)).dims(), [0, 8]);
            assert_eq!(layer.forward(Tensor::<3>::zeros([3, 0, 64], &device)).dims(), [3, 0, 8]);
            assert_eq!(layer.forward(Tensor::<1>::zeros([64], &device)).dims(), [8]);
        }
        let network = BitFeedForwardConfig::new(64, 96).init(&device);
        assert_eq!(network.forward(Tensor::zeros([0, 64], &device), true).unwrap().dims(), [0, 64]);
    }
}

#[test]
fn half_precision_in_gives_half_precision_out() {
    let device = flex();
    for dtype in [DType::F16, DType::BF16] {
        let x = random_tensor::<2>(5, [3, 64], &device);
        let half = x.clone().cast(dtype);
        let layer = BitLinearConfig::new(64, 8).with_bias(true).with_norm(true).init(&device);
        for layer in [layer.clone(), layer.pack().unwrap()] {
            let y = layer.forward(half.clone());
            assert_eq!((y.dtype(), y.dims()), (dtype, [3, 8]));
            let want = layer.forward(half.clone().cast(DType::F32)).cast(dtype);
            assert_eq!(values(y), values(want));
        }
        let (network, batch) = (
            BitFeedForwardConfig::new(64, 96).init(&device),
            Batch::whole_sequences(3, &rotary(), true, &device),
        );
        assert_eq!(network.forward(half.clone(), true).unwrap().dtype(), dtype);
        let block =
            BitBlockConfig::new(BitAttentionConfig::new(64, 4, 2, 16), BitFeedForwardConfig::new(64, 96));
        let mut none = History::None { length: 3 };
        let y = block.init(&device).forward(half.clone(), 0, &batch, &mut none).unwrap();
        assert_eq!(y.dtype(), dtype);
        // With gradients of the same type.
        let autodiff = device.clone().autodiff();
        let x = Tensor::from_inner(half).require_grad();
        let layer = BitLinearConfig::new(64, 8).init(&autodiff);
        let gradients = layer.forward(x.clone()).sum().backward();
        assert_eq!(x.grad(&gradients).expect("a gradient").dtype(), dtype);
    }
}

#[test]
fn rows_batches_and_caches_that_do_not_fit_are_errors() {
    let device = flex();
    let layer = attention(&device);
    let x = |rows: usize| random_tensor::<2>(6, [rows, 64], &device);
    let whole = Batch::whole_sequences(3, &rotary(), true, &device);
    let error = |result: Result<Tensor<2>, ForwardError>| result.unwrap_err().to_string();
    let none = |length| History::None { length };
    for (rows, length, expected) in
        [(4, 3, "no whole sequences of 3"), (4, 4, "sequences of 4 rows"), (0, 0, "of 0 rows")]
    {
        let error = error(layer.forward(x(rows), 0, &whole, &mut none(length)));
        assert!(error.contains(expected), "{error}");
    }
    let cache = |shape| KvCache::new(shape, 8, CacheType::F32, &device).unwrap();
    let mut own = cache([1, 2, 16]);
    let error_of = error(layer.forward(x(3), 0, &whole, &mut History::Cache(&mut own)));
    assert!(error_of.contains("use History::None"), "{error_of}");
    let sequence = own.add_sequence(0);
    let rows: Vec<Row> = (0..3).map(|position| Row { token: 0, sequence, position }).collect();
    let batch = Batch::over_cache(&rows, &mut own, &rotary(), true, &device).unwrap();
    for (result, expected) in [
        (layer.forward(x(3), 0, &batch, &mut none(3)), "use History::Cache"),
        (layer.forward(x(2), 0, &batch, &mut History::Cache(&mut own)), "2 rows for a batch of 3"),
        (
            layer.forward(x(3), 1, &batch, &mut History::Cache(&mut own)),
            "layer 1 of a model; the cache has 1",
        ),
        (layer.forward(x(3), 0, &batch, &mut History::Cache(&mut cache([1, 4, 16]))), "2 key heads of 16"),
        (
            layer.forward(x(3), 0, &batch, &mut History::Cache(&mut cache([1, 2, 16]))),
            "belongs to another cache",
        ),
    ] {
        let error = error(result);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let empty = Batch::over_cache(&[], &mut own, &rotary(), true, &device).unwrap_err();
    assert!(empty.to_string().contains("at least one row"), "{empty}");
}

fn model(device: &Device) -> BitNet {
    let config = ModelConfig {
        architecture: "bitnet".into(),
        name: None,
        hidden_size: 32,
        intermediate_size: 48,
        n_layers: 2,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 16,
        vocab_size: 10,
        context_length: 32,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        activation: GatedActivation::Relu2,
        sub_norms: true,
        tied_embeddings: true,
        bos_token: None,
        eos_tokens: Vec::new(),
        options: Default::default(),
    };
    let mut random = Random(9);
    let values = &mut |_: &str, shape: &[usize]| Ok::<_, ()>(random.floats(shape.iter().product()));
    BitNet::trainable(&config, Some(Quantisation::default()), device, values).unwrap()
}

#[test]
fn what_a_model_can_not_give_is_an_error() {
    let device = flex();
    let model = model(&device).pack().unwrap();
    let cache = || model.cache(16, CacheType::F32).unwrap();
    let mut own = cache();
    let sequence = own.add_sequence(0);
    let rows: Vec<Row> = (0..3).map(|position| Row { token: 1, sequence, position }).collect();
    assert!(matches!(
        model.forward(&rows, &[0, 3], &mut own),
        Err(ForwardError::Wanted { wanted: 3, rows: 3 })
    ));
    assert!(matches!(model.forward(&rows, &[], &mut own), Err(ForwardError::NothingWanted)));
    let foreign = |cache: &mut KvCache| model.forward(&rows, &[2], cache).unwrap_err().to_string();
    let mut other = cache();
    other.add_sequence(0);
    assert!(foreign(&mut other).contains("belongs to another cache"));
    let mut small = KvCache::new([1, 1, 16], 16, CacheType::F32, &device).unwrap();
    assert!(foreign(&mut small).contains("it has 1 layers, and the model 2"));
    assert_eq!(own.length(sequence).unwrap(), 0);
    assert_eq!(model.forward(&rows, &[2, 0], &mut own).unwrap().dims(), [2, 10]);
}

#[test]
fn hidden_states_and_layers_are_there_for_distillation() {
    let device = flex().autodiff();
    let student = model(&device);
    let tokens = [1, 2, 3, 4, 5, 6];
    let states = student.hidden_states(&tokens, 3).unwrap();
    assert_eq!(states.dims(), [6, 32]);
    let pooled = states.reshape([2, 3, 32]).mean_dim(1);
    assert_eq!(pooled.dims(), [2, 1, 32]);
    let (logits, seen) = student.forward_sequences_seen(&tokens, 3).unwrap();
    assert_eq!(values(logits), values(student.forward_sequences(&tokens, 3).unwrap()));
    let last = &seen.iter().rfind(|seen| seen.layer == 1).unwrap().values;
    let gradients = last.clone().square().mean().backward();
    let embedding = match &student.embedding.weight {
        bitnet_burn::DenseWeight::Float(weight) => weight.val(),
        bitnet_burn::DenseWeight::Stored(_) => panic!("it is trained"),
    };
    assert!(embedding.grad(&gradients).is_some_and(|gradient| values(gradient).iter().any(|&g| g != 0.0)));
}

/// Packing changes how weights are stored, not how many there are.
#[test]
fn a_packed_model_has_as_many_parameters() {
    let model = model(&flex());
    let count = model.num_params();
    let packed = model.pack().unwrap();
    assert_eq!(packed.num_params(), count);
    assert!(packed.to_string().contains(&format!("params: {count}")), "{packed}");
}
