//! LoRA adapters: PEFT's goldens, gradients through packed layers, the same bits however rows are computed, and directories
//! that are wrong. `models/engine/testdata/adapter` has the script that made the goldens.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitnet_burn::{
    ActivationRule, Adapter, AdapterValues, BitLinear, BitNet, CacheType, DenseMatrix, Projection, Row,
};
use bitnet_burn_backends::ops;
use bitnet_burn_engine::adapter::{self, AdapterOptions, targets_named};
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions, Weights};
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_tests::*;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/engine/testdata/adapter").join(name)
}

fn base() -> Checkpoint {
    Checkpoint::open(&golden("base"), &OpenOptions::default()).unwrap()
}

fn open(path: &Path) -> Result<adapter::Adapter, String> {
    adapter::Adapter::open(path, base().config()).map_err(|error| error.to_string())
}

/// The golden model with an adapter.
fn with_adapter(adapter: Option<&adapter::Adapter>, rule: ActivationRule, device: &Device) -> BitNet {
    let adapter = adapter.cloned().map(Arc::new);
    let options = LoadOptions { activations: rule, adapter, ..LoadOptions::default() };
    load(&golden("base"), device, &options)
}

fn logits(model: &BitNet, tokens: &[u32], chunk: usize) -> Vec<f32> {
    all_logits(model, tokens, chunk, CacheType::F32)
}

#[test]
fn what_peft_saved_computes_what_transformers_does() {
    let goldens = read_goldens(&golden("logits.safetensors"));
    let tokens = goldens["tokens"].ids();
    let gpus = [
        #[cfg(feature = "wgpu")]
        Device::wgpu(Default::default()),
    ];
    for device in devices().into_iter().chain(gpus) {
        for name in ["base", "plain", "patterns"] {
            let adapter = (name != "base").then(|| open(&golden(name)).unwrap());
            let model = with_adapter(adapter.as_ref(), ActivationRule::Float, &device);
            let found = logits(&model, &tokens, 256);
            close(&format!("{name} on {device:?}"), &found, &goldens[name].values, 1e-5);
            // With int8 activations, packed: near it, and far from the model without the adapter.
            let model = with_adapter(adapter.as_ref(), ActivationRule::Group(32), &device);
            assert!(model.blocks[0].projections().iter().all(|(_, layer)| layer.matrix().is_some()));
            close(&format!("{name}, int8"), &logits(&model, &tokens, 256), &goldens[name].values, 0.1);
        }
    }
    assert!(max_difference(&goldens["base"].values, &goldens["plain"].values) > 1.0);
}

#[test]
fn results_are_the_same_bits_in_any_chunk_and_batch() {
    let tokens = read_goldens(&golden("logits.safetensors"))["tokens"].ids();
    let adapter = open(&golden("plain")).unwrap();
    for device in devices() {
        let model = with_adapter(Some(&adapter), ActivationRule::Model, &device);
        let whole = logits(&model, &tokens, 256);
        for chunk in [1, 2, 5] {
            assert_same_bits(
                &whole,
                &logits(&model, &tokens, chunk),
                &format!("chunks of {chunk}, {device:?}"),
            );
        }
        // Beside another sequence.
        let mut cache = model.cache(64, CacheType::F32).unwrap();
        let rows: Vec<Row> = [&tokens[..], &tokens[3..9]]
            .into_iter()
            .flat_map(|tokens| {
                let sequence = cache.add_sequence(tokens.len());
                let row = move |(position, &token)| Row { token, sequence, position };
                tokens.iter().enumerate().map(row).collect::<Vec<_>>()
            })
            .collect();
        let wanted: Vec<usize> = (0..tokens.len()).collect();
        let beside = values(model.forward(&rows, &wanted, &mut cache).unwrap());
        assert_same_bits(&whole, &beside, &format!("beside another sequence, {device:?}"));
    }
}

#[test]
fn an_adapter_of_zeros_changes_no_bit_and_merges_into_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let (model, device) = (base(), flex());
    let options = AdapterOptions { rank: 2, alpha: 4.0, rank_stabilised: false, base: "base".into() };
    let projections: Vec<_> = targets_named(&["all-linear".into()], model.config())
        .unwrap()
        .into_iter()
        .map(|(layer, which)| {
            let (n, k) = which.shape(model.config());
            let (a, b) = (Random(layer as u64).floats(2 * k), vec![0.0; 2 * n]);
            let values = AdapterValues { a, b, rank: 2, scale: options.scale() };
            adapter::AdaptedProjection { layer, which, values }
        })
        .collect();
    assert_eq!((options.scale(), projections.len()), (2.0, 14));
    adapter::write(dir.path(), &options, &projections).unwrap();
    let read = open(dir.path()).unwrap();
    assert_eq!(read.projections(), &projections[..]);
    let tokens = read_goldens(&golden("logits.safetensors"))["tokens"].ids();
    let plain = logits(&with_adapter(None, ActivationRule::Model, &device), &tokens, 256);
    let adapted = logits(&with_adapter(Some(&read), ActivationRule::Model, &device), &tokens, 256);
    assert_same_bits(&plain, &adapted, "an adapter of zeros");
    let (merged, losses) = model.merged(&read).unwrap();
    for layer in 0..2 {
        for which in Projection::ALL {
            let rows = |weights: Weights| -> Vec<f32> {
                let (n, k) = weights.shape();
                let mut values = vec![0.0; n * k];
                let rows = values.chunks_exact_mut(k).enumerate();
                rows.for_each(|(row, values)| weights.decode_row(row, values).unwrap());
                values
            };
            let [before, after] = [&base(), &merged].map(|of| rows(of.weights(layer, which).unwrap()));
            assert_same_bits(&before, &after, which.name());
        }
    }
    assert!(
        losses.len() == 15 && losses.iter().all(|loss| loss.error == 0.0 && loss.flipped == 0.0),
        "{losses:?}"
    );
}

#[test]
fn merging_loses_what_it_says() {
    for name in ["plain", "patterns"] {
        let adapter = open(&golden(name)).unwrap();
        let (merged, losses) = base().merged(&adapter).unwrap();
        let device = flex();
        for (of, loss) in adapter.projections().iter().zip(&losses) {
            let row = |of: &Weights, row: usize| {
                let mut values = vec![0.0; of.shape().1];
                of.decode_row(row, &mut values).unwrap();
                values
            };
            let weights = |of_model: &Checkpoint| of_model.weights(of.layer, of.which).unwrap();
            let (before, after) = (weights(&base()), weights(&merged));
            let (n, k) = before.shape();
            // B * A by Burn.
            let a = tensor(&of.values.a, [of.values.rank, k], &device);
            let update =
                values(tensor(&of.values.b, [n, of.values.rank], &device).matmul(a) * of.values.scale);
            let (mut error, mut size, mut flips) = (0f64, 0f64, 0);
            for n in 0..n {
                let (before, after) = (row(&before, n), row(&after, n));
                let scale = after.iter().fold(0f32, |a, v| a.max(v.abs()));
                assert!(after.iter().all(|v| *v == 0.0 || v.abs() == scale), "row {n} is ternary");
                for column in 0..k {
                    let wanted = f64::from(before[column] + update[n * k + column]);
                    error += (f64::from(after[column]) - wanted).powi(2);
                    size += wanted * wanted;
                    flips += usize::from(before[column].total_cmp(&0.0) != after[column].total_cmp(&0.0));
                }
            }
            let expected = (error / size).sqrt();
            assert!((loss.error / expected - 1.0).abs() < 1e-4, "{loss:?} {expected}");
            assert!((loss.flipped - flips as f64 / (n * k) as f64).abs() < 1e-9, "{loss:?} {flips}");
            assert!(loss.update > 0.0 && loss.kept > 0.0, "{loss:?}");
        }
        let model = bitnet_burn_engine::load::load(&merged, &device, &LoadOptions::default(), &mut |_| {});
        assert!(model.unwrap().blocks[0].projections().iter().all(|(_, layer)| layer.matrix().is_some()));
    }
}

/// The gradients of a packed layer with an adapter, against the same computation with float weights by Burn.
#[test]
fn gradients_are_those_of_float_weights() {
    let (n, k, m, rank) = (96, 256, 5, 3);
    let plain = flex();
    let device = plain.clone().autodiff();
    let mut random = Random(5);
    let codes = random.ternary(n * k);
    for (groups, rule) in [
        (0, ActivationRule::Row),
        (0, ActivationRule::Float),
        (1, ActivationRule::Row),
        (4, ActivationRule::Group(32)),
        (4, ActivationRule::Float),
    ] {
        let what = format!("{groups} scales a row, {rule}");
        let scales: Vec<f32> =
            (0..if groups == 0 { 1 } else { n * groups }).map(|_| 0.5 + random.float().abs()).collect();
        let shape = if groups == 0 { [1, 1] } else { [n, groups] };
        let data = TensorData::new(codes.iter().map(|&c| i32::from(c)).collect(), [n, k]);
        let packed = Tensor::<2, Int>::from_data(data, &plain);
        let layer = BitLinear::from_ternary(packed, tensor(&scales, shape, &plain), rule).unwrap();
        let adapter =
            AdapterValues { a: random.floats(rank * k), b: random.floats(n * rank), rank, scale: 0.5 };
        let layer = layer.with_adapter(Adapter::trainable(&adapter, [1, 2], &device)).train();
        let (inputs, weights_of_y) = (random.floats(m * k), random.floats(m * n));
        let x = tensor::<2>(&inputs, [m, k], &device).require_grad();
        let dy = tensor::<2>(&weights_of_y, [m, n], &device);
        let grads = (layer.forward(x.clone()) * dy.clone()).sum().backward();
        let found = layer.adapter.as_ref().unwrap();
        let gradient = |matrix: &DenseMatrix| {
            values(matrix.float_weight().expect("it is trained").val().grad(&grads).unwrap())
        };
        let found = [values(x.grad(&grads).unwrap()), gradient(&found.a), gradient(&found.b)];

        let scale =
            |at: usize| if groups == 0 { scales[0] } else { scales[at / k * groups + at % k * groups / k] };
        let floats: Vec<f32> = codes.iter().enumerate().map(|(at, &c)| f32::from(c) * scale(at)).collect();
        let w = tensor::<2>(&floats, [n, k], &device);
        let x = tensor::<2>(&inputs, [m, k], &device).require_grad();
        let a = tensor::<2>(&adapter.a, [rank, k], &device).require_grad();
        let b = tensor::<2>(&adapter.b, [n, rank], &device).require_grad();
        let quantised = match layer.activation_group() {
            Some(group) => ops::fake_quantise(x.clone(), group),
            None => x.clone(),
        };
        let product = x.clone().matmul(a.clone().transpose()).matmul(b.clone().transpose());
        let y = quantised.matmul(w.transpose()) + product * adapter.scale;
        close(&what, &values(layer.forward(x.clone())), &values(y.clone()), 1e-5);
        let grads = (y * dy).sum().backward();
        for (name, found, wanted) in [("x", &found[0], &x), ("A", &found[1], &a), ("B", &found[2], &b)] {
            close(&format!("{what}: {name}"), found, &values(wanted.grad(&grads).unwrap()), 1e-5);
        }
    }
}

/// Changes of a good adapter, each with a part of the error.
#[test]
fn wrong_adapters_are_refused_by_name() {
    let keys = |key: &str, value: Value| {
        let dir = copy();
        let path = dir.path().join(adapter::CONFIG);
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        match value {
            Value::String(text) if text == "REMOVED" => {
                config.as_object_mut().unwrap().remove(key);
            }
            value => config[key] = value,
        }
        std::fs::write(&path, config.to_string()).unwrap();
        open(dir.path())
    };
    for (key, value, expected) in [
        ("peft_type", json!("LOHA"), "\"LOHA\""),
        ("peft_type", json!("REMOVED"), "missing"),
        ("task_type", json!("SEQ_CLS"), "CAUSAL_LM"),
        ("use_dora", json!(true), "`use_dora` is true"),
        ("bias", json!("lora_only"), "`bias` is \"lora_only\""),
        ("lora_bias", json!(true), "`lora_bias`"),
        ("modules_to_save", json!(["lm_head"]), "`modules_to_save` is [\"lm_head\"]"),
        ("layer_replication", json!([[0, 1]]), "`layer_replication`"),
        ("fan_in_fan_out", json!(true), "`fan_in_fan_out`"),
        ("a_key_of_tomorrow", json!(1), "`a_key_of_tomorrow` is 1"),
        ("init_lora_weights", json!("pissa"), "plain one"),
        (
            "rank_pattern",
            json!({"q_proj": 3}),
            "is [4, 32]; the model and `r` (or rank_pattern) ask for [3, 32]",
        ),
        ("rank_pattern", json!({".*q_proj": 4}), "regular expressions"),
        ("rank_pattern", json!({"q_proj": 0.5}), "`rank_pattern`"),
        ("alpha_pattern", json!({"q_proj": 4, "self_attn.q_proj": 5}), "both fit"),
        ("r", json!(0), "1 to 65536"),
        ("r", json!(5), "ask for [5, 32]"),
        ("r", json!("REMOVED"), "`r` is missing"),
        ("lora_alpha", json!("x"), "a number"),
    ] {
        let error = keys(key, value.clone()).err().unwrap_or_else(|| panic!("{key} {value} is taken"));
        assert!(error.contains(expected), "{key} {value}: {error}");
    }
    // What changes nothing.
    for (key, value) in [
        ("rank_pattern", json!({"q_proj": 4})),
        ("layers_to_transform", json!([0, 1])),
        ("a_key_of_tomorrow", json!(null)),
        ("init_lora_weights", json!("gaussian")),
    ] {
        keys(key, value.clone()).unwrap_or_else(|error| panic!("{key} {value}: {error}"));
    }
    for (change, expected) in [
        (("layers.1.mlp", "layers.7.mlp"), "has 2 layers"),
        (("q_proj.lora_A", "q_norm.lora_A"), "lora_A.weight` is missing; its lora_B is there"),
        (("lora_B.weight", "lora_magnitude_vector"), "is missing"),
        (("F32", "I32"), "F32, F16 and BF16"),
        (("[4,32]", "[32,4]"), "is [32, 4]"),
    ] {
        let dir = copy();
        let path = dir.path().join(adapter::WEIGHTS);
        let bytes = std::fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
        let header = header.replacen(change.0, change.1, if change.0 == "layers.1.mlp" { 100 } else { 1 });
        let mut new = (header.len() as u64).to_le_bytes().to_vec();
        new.extend(header.as_bytes());
        new.extend(&bytes[8 + length..]);
        std::fs::write(&path, new).unwrap();
        let error = open(dir.path()).expect_err(expected);
        assert!(error.contains(expected), "{change:?}: {error}");
    }
    let dir = copy();
    let path = dir.path().join(adapter::WEIGHTS);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    assert!(open(dir.path()).unwrap_err().contains("holds NaN at row"));
    std::fs::write(&path, &bytes[..at]).unwrap();
    assert!(open(dir.path()).unwrap_err().contains("truncated"));
    std::fs::write(&path, "no file of its kind").unwrap();
    open(dir.path()).unwrap_err();
    std::fs::remove_file(&path).unwrap();
    assert!(open(dir.path()).unwrap_err().contains("there is no adapter_model.safetensors"));
    std::fs::write(dir.path().join(adapter::CONFIG), "[]").unwrap();
    open(dir.path()).unwrap_err();
    assert!(open(&golden("base")).unwrap_err().contains("there is no adapter_config.json"));
}

/// Damage at any place gives an error or an adapter, and nothing else.
#[test]
fn damaged_adapters_do_no_harm() {
    let mut random = Random(9);
    for name in [adapter::CONFIG, adapter::WEIGHTS] {
        let dir = copy();
        let good = std::fs::read(dir.path().join(name)).unwrap();
        let mut refused = 0;
        for _ in 0..400 {
            let mut bytes = good.clone();
            // The header of the matrices is what is read with care.
            let within = bytes.len().min(3000);
            for _ in 0..=random.below(3) {
                let at = random.below(within);
                bytes[at] = if random.below(2) == 0 {
                    random.below(256) as u8
                } else {
                    b"0129[]{},:\""[random.below(11)]
                };
            }
            if random.below(8) == 0 {
                bytes.truncate(random.below(good.len()));
            }
            std::fs::write(dir.path().join(name), bytes).unwrap();
            refused += usize::from(open(dir.path()).is_err());
        }
        assert!(refused > 100, "{name}: {refused}");
    }
}

/// The golden adapter, in a directory of its own.
fn copy() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in [adapter::CONFIG, adapter::WEIGHTS] {
        std::fs::copy(golden("plain").join(name), dir.path().join(name)).unwrap();
    }
    dir
}
