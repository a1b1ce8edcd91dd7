//! Gated DeltaNets: what the files of Qwen3.5 become, and what each lie in them gets.

use bitnet_burn::{CacheType, DeltaNet, FloatPart, Norm, Row};
use bitnet_burn_engine::load::{ActivationRule, LoadOptions, load};
use burn::tensor::Device;
use serde_json::{Value, json};

use crate::gguf::{self, ARRAY, BOOL, Dir, F32, Raw, STRING, U32, array, f32s, string};
use crate::hf::{self, Model};

const KEY_HEADS: usize = 2;
const VALUE_HEADS: usize = 6;
const VALUE_DIM: usize = 32;
const INNER: usize = VALUE_HEADS * VALUE_DIM;

/// Numbers between -1 and 1 that look random and are the same everywhere.
fn numbers(name: &str, count: usize) -> Vec<f32> {
    let seed = name.bytes().fold(7u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let number = |i: usize| ((seed + i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) % 20_011;
    (0..count).map(|i| number(i) as f32 / 10_005.0 - 1.0).collect()
}

/// Hidden 64, vocabulary 8; a layer with a DeltaNet (two key heads of 16, six value heads of 32) and one with attention
/// (two heads of 32, of which RoPE turns 8 values).
fn hybrid() -> Raw {
    let mut raw = Raw::new().key("general.architecture", STRING, string("qwen35"));
    for (key, value) in [
        ("context_length", 64usize),
        ("embedding_length", 64),
        ("block_count", 2),
        ("feed_forward_length", 64),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 32),
        ("attention.value_length", 32),
        ("rope.dimension_count", 8),
        ("vocab_size", 8),
        ("full_attention_interval", 2),
        ("ssm.conv_kernel", 4),
        ("ssm.state_size", 16),
        ("ssm.group_count", KEY_HEADS),
        ("ssm.time_step_rank", VALUE_HEADS),
        ("ssm.inner_size", INNER),
    ] {
        raw = raw.key(&format!("qwen35.{key}"), U32, (value as u32).to_le_bytes());
    }
    raw = raw.key("qwen35.attention.layer_norm_rms_epsilon", F32, 1e-6f32.to_le_bytes()).key(
        "qwen35.rope.freq_base",
        F32,
        10_000f32.to_le_bytes(),
    );
    let mut add = |name: String, dims: &[u64]| {
        let values = numbers(&name, dims.iter().product::<u64>() as usize);
        let norm = name.ends_with("norm.weight");
        let value = |v: f32| match &name[..] {
            "blk.0.ssm_a" => -v.abs(),
            _ if norm => 1.0 + v / 4.0,
            _ => v / 4.0,
        };
        let values: Vec<f32> = values.into_iter().map(value).collect();
        raw.tensors.push(gguf::RawTensor {
            name: name.into(),
            dims: dims.to_vec(),
            kind: 0,
            offset: None,
            data: f32s(&values),
        });
    };
    add("token_embd.weight".into(), &[64, 8]);
    add("output.weight".into(), &[64, 8]);
    add("output_norm.weight".into(), &[64]);
    for layer in 0..2 {
        for (part, k, n) in [("ffn_gate", 64, 64), ("ffn_up", 64, 64), ("ffn_down", 64, 64)] {
            add(format!("blk.{layer}.{part}.weight"), &[k, n]);
        }
        add(format!("blk.{layer}.attn_norm.weight"), &[64]);
        add(format!("blk.{layer}.post_attention_norm.weight"), &[64]);
    }
    let inner = INNER as u64;
    for (part, dims) in [
        ("attn_qkv.weight", vec![64, 64 + inner]),
        ("attn_gate.weight", vec![64, inner]),
        ("ssm_out.weight", vec![inner, 64]),
        ("ssm_alpha.weight", vec![64, 6]),
        ("ssm_beta.weight", vec![64, 6]),
        ("ssm_conv1d.weight", vec![4, 64 + inner]),
        ("ssm_a", vec![6]),
        ("ssm_dt.bias", vec![6]),
        ("ssm_norm.weight", vec![32]),
    ] {
        add(format!("blk.0.{part}"), &dims);
    }
    for (part, dims) in [
        ("attn_q.weight", vec![64, 128]),
        ("attn_k.weight", vec![64, 32]),
        ("attn_v.weight", vec![64, 32]),
        ("attn_output.weight", vec![64, 64]),
        ("attn_q_norm.weight", vec![32]),
        ("attn_k_norm.weight", vec![32]),
    ] {
        add(format!("blk.1.{part}"), &dims);
    }
    raw
}

/// The logits of eight tokens.
fn logits(dir: &Dir, raw: &Raw) -> Vec<f32> {
    let checkpoint = dir.open_and_check(raw).unwrap();
    let options = LoadOptions { activations: ActivationRule::Float, ..LoadOptions::default() };
    let model = load(&checkpoint, &Device::flex(), &options, &mut |_| {}).unwrap();
    let mut cache = model.cache(16, CacheType::F32).unwrap();
    let sequence = cache.add_sequence(0);
    let rows: Vec<Row> = (0..8).map(|i| Row { token: i as u32 * 3 % 8, sequence, position: i }).collect();
    let wanted: Vec<usize> = (0..8).collect();
    model.forward(&rows, &wanted, &mut cache).unwrap().into_data().try_to_vec().unwrap()
}

#[test]
fn gguf_files_say_which_layers_have_one() {
    let dir = Dir::new();
    let checkpoint = dir.open_and_check(&hybrid()).unwrap();
    let config = checkpoint.config();
    let delta = DeltaNet {
        layers: vec![true, false],
        key_heads: 2,
        value_heads: 6,
        key_dim: 16,
        value_dim: 32,
        taps: 4,
        tiled: true,
        grouped_output: false,
    };
    assert_eq!(config.options.delta_net.as_ref(), Some(&delta));
    assert!(config.options.attention_gate && config.options.qk_norms);
    assert_eq!((config.options.rope_dim, config.rope_dim()), (Some(8), 8));
    // Two matrices and a norm; feed-forward networks and their norms; of the DeltaNet three projections, five parts that are
    // floats and two norms; of the attention four projections and three norms.
    assert_eq!(checkpoint.check().unwrap().tensors, 3 + 2 * 4 + 3 + 5 + 2 + 4 + 3);
    // The file has taps of channels, layers have channels of taps.
    let convolution = checkpoint.float_part(0, FloatPart::DeltaConvolution).unwrap();
    assert_eq!([convolution.n, convolution.k], FloatPart::DeltaConvolution.shape(config));
    let mut row = vec![0.0; convolution.k];
    convolution.format.decode_row(convolution.row(3).unwrap(), &mut row).unwrap();
    let stored = numbers("blk.0.ssm_conv1d.weight", 4 * row.len());
    assert_eq!(row[5], stored[5 * 4 + 3] / 4.0);
    // Without a statement, RoPE turns whole heads, and a layer of four has attention.
    let raw = hybrid().without("qwen35.rope.dimension_count");
    assert_eq!(dir.open(&raw).unwrap().config().options.rope_dim, None);
}

/// W as a file has it whose matrix takes H(s * x) of the heads in Hugging Face's order.
fn folded(stored: &[u8], signs: &[f32], block: usize) -> Vec<u8> {
    let each = VALUE_HEADS / KEY_HEADS;
    let values: Vec<f32> =
        stored.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let mut out = Vec::new();
    for row in values.chunks_exact(INNER) {
        // Value head j of a tiled layer belongs to key head j % KEY_HEADS.
        let grouped = (0..VALUE_HEADS).flat_map(|head| {
            let tiled = head % each * KEY_HEADS + head / each;
            row[tiled * VALUE_DIM..][..VALUE_DIM].to_vec()
        });
        let signed: Vec<f64> = grouped.zip(signs).map(|(w, s)| f64::from(w * s)).collect();
        for run in signed.chunks_exact(block) {
            out.extend((0..block).map(|j| {
                let sign = |i: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                let sum: f64 = run.iter().enumerate().map(|(i, w)| w * sign(i)).sum();
                (sum / (block as f64).sqrt()) as f32
            }));
        }
    }
    f32s(&out)
}

fn with_rotation(mut raw: Raw, names: &[&str], grouped: bool) -> Raw {
    let signs: Vec<i32> = numbers("signs", INNER).iter().map(|v| v.signum() as i32).collect();
    let floats: Vec<f32> = signs.iter().map(|&s| s as f32).collect();
    let stored = &mut raw.tensor_mut("blk.0.ssm_out.weight").data;
    *stored = folded(stored, &floats, 64);
    let names_array: Vec<u8> = names.iter().flat_map(string).collect();
    let ints = |values: &[i32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    let key = |name: &str| format!("prism.hadamard.{name}");
    const I32: u32 = 5;
    raw.key(&key("version"), U32, 1u32.to_le_bytes())
        .key(&key("block_size"), U32, 64u32.to_le_bytes())
        .key(&key("transform"), STRING, string("normalized-sylvester-walsh-hadamard"))
        .key(&key("axis"), STRING, string("input-last-dimension"))
        .key(&key("sign_mode"), STRING, string("explicit"))
        .key(&key("sign_widths"), ARRAY, array(I32, 1, &ints(&[INNER as i32])))
        .key(&key("sign_values"), ARRAY, array(I32, INNER as u64, &ints(&signs)))
        .key(&key("weight_names"), ARRAY, array(STRING, names.len() as u64, &names_array))
        .key(&key("gdn_v_grouped"), BOOL, [u8::from(grouped)])
}

#[test]
fn a_rotated_output_takes_the_heads_in_hugging_faces_order() {
    let dir = Dir::new();
    let plain = logits(&dir, &hybrid());
    assert!(plain.iter().any(|v| v.abs() > 0.1), "{plain:?}");
    let rotated = logits(&dir, &with_rotation(hybrid(), &["blk.0.ssm_out.weight"], true));
    for (i, (a, b)) in rotated.iter().zip(&plain).enumerate() {
        assert!((a - b).abs() < 1e-4, "{i}: {a} {b}");
    }
    // Without the flag, the heads stay in the file's order: other numbers.
    let other = logits(&dir, &with_rotation(hybrid(), &["blk.0.ssm_out.weight"], false));
    assert!(other.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-3));
}

#[test]
fn gguf_files_that_lie_are_refused() {
    let dir = Dir::new();
    let key = |name: &str, value: u32| {
        let name = format!("qwen35.{name}");
        hybrid().without(&name).key(&name, U32, value.to_le_bytes())
    };
    let without = |name: &str| hybrid().without(&format!("qwen35.{name}"));
    let renamed = |from: &str, to: &str| {
        let mut raw = hybrid();
        raw.tensor_mut(from).name = to.into();
        raw
    };
    let rates = |value: f32| {
        let mut raw = hybrid();
        raw.tensor_mut("blk.0.ssm_a").data = f32s(&[-1.0, -1.0, value, -1.0, -1.0, -1.0]);
        raw
    };
    let cases: Vec<(&str, Raw, &[&str])> = vec![
        ("no inner size", without("ssm.inner_size"), &["qwen35.ssm.inner_size", "missing"]),
        ("no value heads", without("ssm.time_step_rank"), &["qwen35.ssm.time_step_rank", "missing"]),
        ("no key heads", without("ssm.group_count"), &["qwen35.ssm.group_count", "missing"]),
        ("no key size", without("ssm.state_size"), &["qwen35.ssm.state_size", "missing"]),
        ("no taps", without("ssm.conv_kernel"), &["qwen35.ssm.conv_kernel", "missing"]),
        ("0 value heads", key("ssm.time_step_rank", 0), &["qwen35.ssm.time_step_rank", "0"]),
        ("five value heads", key("ssm.time_step_rank", 5), &["qwen35.ssm.time_step_rank", "5", "inner_size"]),
        ("0 key heads", key("ssm.group_count", 0), &["options.delta_net", "0 key heads"]),
        ("four key heads", key("ssm.group_count", 4), &["options.delta_net", "4 key heads do not divide"]),
        ("one tap", key("ssm.conv_kernel", 1), &["options.delta_net", "1 taps"]),
        ("five taps", key("ssm.conv_kernel", 5), &["blk.0.ssm_conv1d.weight", "[256, 4]", "[256, 5]"]),
        ("wide keys", key("ssm.state_size", 1 << 20), &["options.delta_net", "1048576"]),
        ("wide values", key("ssm.inner_size", 6 << 28), &["options.delta_net"]),
        ("no interval", key("full_attention_interval", 0), &["qwen35.full_attention_interval", "0"]),
        ("no layer with attention", key("full_attention_interval", 3), &["blk.1.ssm_norm.weight", "missing"]),
        ("an odd part of the head", key("rope.dimension_count", 7), &["options.rope_dim", "7"]),
        ("more than the head", key("rope.dimension_count", 64), &["options.rope_dim", "64"]),
        ("layers that predict", key("nextn_predict_layers", 1), &["qwen35.nextn_predict_layers", "1"]),
        ("rates that grow", rates(0.5), &["blk.0.ssm_a", "value head 2", "0.5"]),
        ("rates that are no number", rates(f32::NAN), &["blk.0.ssm_a"]),
        ("no rates", renamed("blk.0.ssm_a", "x"), &["blk.0.ssm_a", "missing"]),
        ("no bias", renamed("blk.0.ssm_dt.bias", "x"), &["blk.0.ssm_dt.bias", "missing"]),
        ("no norm", renamed("blk.0.ssm_norm.weight", "x"), &["blk.0.ssm_norm.weight", "missing"]),
        (
            "the norm of others",
            renamed("blk.0.post_attention_norm.weight", "blk.0.ffn_norm.weight"),
            &["blk.0.post_attention_norm.weight", "missing"],
        ),
        (
            "a DeltaNet in a layer with attention",
            hybrid().tensor("blk.1.ssm_a", &[6], 0, f32s(&[-1.0; 6])),
            &["blk.1.ssm_a", "no such tensor"],
        ),
        ("another model's", key_of_qwen3(), &["blk.0.attn_q_norm.weight", "missing"]),
    ];
    for (name, raw, parts) in cases {
        gguf::assert_refused(name, dir.open_and_check(&raw), parts);
    }
}

/// The same tensors under the name of Qwen3.
fn key_of_qwen3() -> Raw {
    let mut raw = hybrid();
    *raw.value("general.architecture") = string("qwen3");
    for (key, ..) in &mut raw.keys {
        *key = String::from_utf8(key.clone()).unwrap().replace("qwen35.", "qwen3.").into_bytes();
    }
    raw.without("qwen3.rope.dimension_count")
}

/// Hidden 8, one layer with a DeltaNet: one key head of 4, two value heads of 4.
fn directory() -> Model {
    let mut model = Model::new(Value::Null)
        .set("model_type", json!("qwen3_5_text"))
        .set("hidden_act", json!("silu"))
        .set("layer_types", json!(["linear_attention"]))
        .set("head_dim", json!(8))
        .set("rope_theta", json!(10000.0))
        .set("linear_num_key_heads", json!(1))
        .set("linear_num_value_heads", json!(2))
        .set("linear_key_head_dim", json!(4))
        .set("linear_value_head_dim", json!(4))
        .set("linear_conv_kernel_dim", json!(2))
        .without("quantization_config")
        .drop("model.layers.0.self_attn.attn_sub_norm.weight")
        .drop("model.layers.0.mlp.ffn_sub_norm.weight");
    let mut add = |name: &str, shape: &[usize]| {
        let values = f32s(&vec![0.5; shape.iter().product()]);
        model.tensors.push((format!("model.layers.0.{name}"), "F32", shape.to_vec(), values));
    };
    for (part, n, k) in [("gate_proj", 12, 8), ("up_proj", 12, 8), ("down_proj", 8, 12)] {
        add(&format!("mlp.{part}.weight"), &[n, k]);
    }
    for (part, shape) in [
        ("in_proj_qkv.weight", vec![16, 8]),
        ("in_proj_z.weight", vec![8, 8]),
        ("in_proj_a.weight", vec![2, 8]),
        ("in_proj_b.weight", vec![2, 8]),
        ("out_proj.weight", vec![8, 8]),
        ("conv1d.weight", vec![16, 1, 2]),
        ("A_log", vec![2]),
        ("dt_bias", vec![2]),
        ("norm.weight", vec![4]),
    ] {
        add(&format!("linear_attn.{part}"), &shape);
    }
    model
}

#[test]
fn directories_say_which_layers_have_one() {
    let opened = directory().open().unwrap();
    let (checkpoint, config) = (&opened.checkpoint, opened.checkpoint.config());
    let delta = config.options.delta_net.as_ref().unwrap();
    assert_eq!((&delta.layers[..], delta.tiled, delta.taps), (&[true][..], false, 2));
    // A quarter of the head, as in transformers.
    assert_eq!((config.options.attention_gate, config.options.rope_dim), (true, Some(2)));
    assert!(
        !directory()
            .set("attn_output_gate", json!(false))
            .open()
            .unwrap()
            .checkpoint
            .config()
            .options
            .attention_gate
    );
    let half =
        directory().set("rope_parameters", json!({"rope_theta": 10000.0, "partial_rotary_factor": 0.5}));
    assert_eq!(half.open().unwrap().checkpoint.config().options.rope_dim, Some(4));
    // transformers multiplies by one more than these norms' weights; not so that of the value heads.
    assert_eq!(checkpoint.norm(Norm::Attention(0)).unwrap(), [2.0; 8]);
    assert_eq!(checkpoint.norm(Norm::Delta(0)).unwrap(), [0.5; 4]);
    let rates = checkpoint.float_part(0, FloatPart::DeltaRate).unwrap();
    let mut row = [0.0; 2];
    rates.format.decode_row(rates.row(0).unwrap(), &mut row).unwrap();
    assert_eq!(row, [-0.5f32.exp(); 2]);
}

#[test]
fn directories_that_lie_are_refused() {
    let d = |key: &str, value: Value| directory().set(key, value);
    let tensor = |name: &str, shape: &[usize]| {
        directory().tensor(name, "F32", shape, f32s(&vec![0.5; shape.iter().product()]))
    };
    const CONVOLUTION: &str = "model.layers.0.linear_attn.conv1d.weight";
    const LOG: &str = "model.layers.0.linear_attn.A_log";
    let cases: Vec<(&str, Model, &[&str])> = vec![
        ("no kinds of layers", directory().without("layer_types"), &["layer_types", "missing"]),
        (
            "two kinds",
            d("layer_types", json!(["linear_attention", "linear_attention"])),
            &["layer_types", "one for each layer"],
        ),
        ("another kind", d("layer_types", json!(["mamba"])), &["layer_types", "mamba", "linear_attention"]),
        ("attention", d("layer_types", json!(["full_attention"])), &["self_attn", "missing"]),
        ("no key heads", directory().without("linear_num_key_heads"), &["linear_num_key_heads", "missing"]),
        ("three key heads", d("linear_num_key_heads", json!(3)), &["options.delta_net", "3 key heads"]),
        ("negative heads", d("linear_num_value_heads", json!(-2)), &["linear_num_value_heads", "-2"]),
        ("2^60 values", d("linear_value_head_dim", json!(1u64 << 60)), &["options.delta_net"]),
        (
            "a convolution of another shape",
            tensor(CONVOLUTION, &[16, 2]),
            &[CONVOLUTION, "[16, 2]", "[16, 1, 2]"],
        ),
        ("no convolution", directory().drop(CONVOLUTION), &[CONVOLUTION, "missing"]),
        (
            "a rate beyond all numbers",
            directory().tensor(LOG, "F32", &[2], f32s(&[1.0, 1000.0])),
            &[LOG, "value head 1", "inf"],
        ),
        ("half a pair", d("partial_rotary_factor", json!(0.4)), &["options.rope_dim", "3"]),
        ("nothing of the head", d("partial_rotary_factor", json!(0.0)), &["options.rope_dim", "0"]),
        (
            "two statements",
            d("partial_rotary_factor", json!(0.5))
                .set("rope_parameters", json!({"partial_rotary_factor": 0.25})),
            &["rope_parameters.partial_rotary_factor", "0.25", "0.5"],
        ),
        (
            "a part of the head elsewhere",
            Model::packed().set("partial_rotary_factor", json!(0.5)),
            &["partial_rotary_factor", "0.5", "1.0"],
        ),
    ];
    for (name, model, parts) in cases {
        hf::assert_refused(name, model.open(), parts);
    }
}

#[test]
fn what_an_unknown_architecture_has_more_is_named() {
    let dir = Dir::new();
    let mut raw = hybrid().key("new.attention.logit_softcapping", F32, 50f32.to_le_bytes()).tensor(
        "blk.1.attn_sinks.weight",
        &[2],
        0,
        f32s(&[0.0; 2]),
    );
    *raw.value("general.architecture") = string("new");
    let parts = [
        "architecture `new`",
        "qwen35",
        "tensors `blk.0.attn_sinks.weight`",
        "keys `attention.logit_softcapping`",
    ];
    gguf::assert_refused("more", dir.open(&raw), &parts);
    let mut renamed = hybrid();
    *renamed.value("general.architecture") = string("new");
    gguf::assert_refused("no more", dir.open(&renamed), &["`new`", "all of its tensors and keys are known"]);
    // A long list is cut.
    for i in 0..20 {
        renamed = renamed.key(&format!("new.number{i}"), U32, [0; 4]);
    }
    gguf::assert_refused("many", dir.open(&renamed), &["`number0`", "and 12 more"]);
    let new = directory().set("model_type", json!("new"));
    hf::assert_refused("no more", new.open(), &["`new`", "all of its tensors and keys are known"]);
    let new = new.tensor("model.layers.0.self_attn.sinks", "F32", &[2], f32s(&[0.0; 2]));
    hf::assert_refused(
        "more",
        new.open(),
        &["`new`", "qwen3_5_text", "tensors `model.layers.0.self_attn.sinks`"],
    );
}
