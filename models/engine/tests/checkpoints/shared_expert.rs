//! A mixture with a shared expert (Qwen2 MoE), and with GELU in its networks, in both formats, against its formula in f64.

use bitnet_burn::{BitNet, CacheType, GatedActivation, Row};
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::load::{ActivationRule, LoadOptions, load};
use serde_json::json;

use crate::gguf::{self, BOOL, Dir, F32, Raw, STRING, U32, f32s, string};
use crate::hf::{self, Model};
use crate::projection_norms::support;

const HIDDEN: usize = 8;
const HEAD: usize = 4;
const VOCABULARY: usize = 4;
const EXPERTS: usize = 3;
const USED: usize = 2;
const INNER: usize = 12;
const SHARED: usize = 20;
const EPS: f64 = 1e-5;
const TOLERANCE: f64 = 2e-5;

/// The tensors of a model of one layer: the name in GGUF, in a directory, [rows, columns], and values.
fn tensors() -> Vec<(&'static str, String, [usize; 2], Vec<f32>)> {
    let mut state = 1u64;
    let mut number = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let layer = |name: &str| format!("model.layers.0.{name}");
    let mut all = Vec::new();
    let mut add = |gguf, hf: String, [n, k]: [usize; 2]| {
        all.push((gguf, hf, [n, k], (0..n * k).map(|_| number()).collect()));
    };
    add("token_embd.weight", "model.embed_tokens.weight".into(), [VOCABULARY, HIDDEN]);
    add("output_norm.weight", "model.norm.weight".into(), [1, HIDDEN]);
    add("blk.0.attn_norm.weight", layer("input_layernorm.weight"), [1, HIDDEN]);
    add("blk.0.ffn_norm.weight", layer("post_attention_layernorm.weight"), [1, HIDDEN]);
    for (gguf, bias, part, n) in [
        ("blk.0.attn_q.weight", "blk.0.attn_q.bias", "q", 2 * HEAD),
        ("blk.0.attn_k.weight", "blk.0.attn_k.bias", "k", HEAD),
        ("blk.0.attn_v.weight", "blk.0.attn_v.bias", "v", HEAD),
    ] {
        add(gguf, layer(&format!("self_attn.{part}_proj.weight")), [n, HIDDEN]);
        add(bias, layer(&format!("self_attn.{part}_proj.bias")), [1, n]);
    }
    add("blk.0.attn_output.weight", layer("self_attn.o_proj.weight"), [HIDDEN, 2 * HEAD]);
    add("blk.0.ffn_gate_inp.weight", layer("mlp.gate.weight"), [EXPERTS, HIDDEN]);
    for (gguf, part, n, k) in [
        ("blk.0.ffn_gate_exps.weight", "gate", INNER, HIDDEN),
        ("blk.0.ffn_up_exps.weight", "up", INNER, HIDDEN),
        ("blk.0.ffn_down_exps.weight", "down", HIDDEN, INNER),
    ] {
        (0..EXPERTS).for_each(|e| add(gguf, layer(&format!("mlp.experts.{e}.{part}_proj.weight")), [n, k]));
    }
    for (gguf, part, n, k) in [
        ("blk.0.ffn_gate_shexp.weight", "gate", SHARED, HIDDEN),
        ("blk.0.ffn_up_shexp.weight", "up", SHARED, HIDDEN),
        ("blk.0.ffn_down_shexp.weight", "down", HIDDEN, SHARED),
    ] {
        add(gguf, layer(&format!("mlp.shared_expert.{part}_proj.weight")), [n, k]);
    }
    add("blk.0.ffn_gate_inp_shexp.weight", layer("mlp.shared_expert_gate.weight"), [1, HIDDEN]);
    all
}

/// The activations by the names in files, as functions.
fn activation(name: &str, x: f64) -> f64 {
    let v = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
    match name {
        "silu" => x / (1.0 + (-x).exp()),
        "gelu" => x * phi(x),
        "gelu_new" | "gelu_pytorch_tanh" => 0.5 * x * (1.0 + v.tanh()),
        other => panic!("{other}"),
    }
}

/// The normal distribution: the integral of its density from 0 by Simpson's rule.
fn phi(x: f64) -> f64 {
    let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let (n, h) = (1000, x / 1000.0);
    let inner: f64 = (1..n).map(|i| density(f64::from(i) * h) * if i % 2 == 0 { 2.0 } else { 4.0 }).sum();
    0.5 + h / 3.0 * (density(0.0) + inner + density(x))
}

fn directory(renormalise: bool) -> Model {
    let mut model = Model::new(json!(null)).without("quantization_config");
    for (key, value) in [
        ("model_type", json!("qwen2_moe")),
        ("hidden_act", json!("silu")),
        ("num_experts", json!(EXPERTS)),
        ("num_experts_per_tok", json!(USED)),
        ("moe_intermediate_size", json!(INNER)),
        ("shared_expert_intermediate_size", json!(SHARED)),
        ("norm_topk_prob", json!(renormalise)),
        ("head_dim", json!(HEAD)),
    ] {
        model = model.set(key, value);
    }
    let is_vector = |hf: &str| hf.ends_with("norm.weight") || hf.ends_with(".bias");
    let shape = |hf: &str, [n, k]: [usize; 2]| if is_vector(hf) { vec![k] } else { vec![n, k] };
    model.tensors = tensors()
        .into_iter()
        .map(|(_, hf, dims, values)| (hf.clone(), "F32", shape(&hf, dims), f32s(&values)))
        .collect();
    model
}

fn raw() -> Raw {
    let mut raw = Raw::new().key("general.architecture", STRING, string("qwen2moe"));
    for (key, value) in [
        ("context_length", 32),
        ("embedding_length", HIDDEN),
        ("block_count", 1),
        ("feed_forward_length", 64),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("vocab_size", VOCABULARY),
        ("expert_count", EXPERTS),
        ("expert_used_count", USED),
        ("expert_feed_forward_length", INNER),
        ("expert_shared_feed_forward_length", SHARED),
    ] {
        raw = raw.key(&format!("qwen2moe.{key}"), U32, (value as u32).to_le_bytes());
    }
    raw = raw.key("qwen2moe.attention.layer_norm_rms_epsilon", F32, (EPS as f32).to_le_bytes()).key(
        "qwen2moe.rope.freq_base",
        F32,
        10_000f32.to_le_bytes(),
    );
    let mut experts: Vec<(&str, [usize; 2], Vec<f32>)> = Vec::new();
    for (name, _, [n, k], values) in tensors() {
        if name.ends_with("_exps.weight") {
            match experts.iter_mut().find(|(known, ..)| *known == name) {
                Some((.., all)) => all.extend(values),
                None => experts.push((name, [n, k], values)),
            }
            continue;
        }
        let vector = name.contains("norm") || name.ends_with(".bias") || name.ends_with("inp_shexp.weight");
        let dims = if vector { vec![k as u64] } else { vec![k as u64, n as u64] };
        raw = raw.tensor(name, &dims, 0, f32s(&values));
    }
    for (name, [n, k], values) in experts {
        raw = raw.tensor(name, &[k as u64, n as u64, EXPERTS as u64], 0, f32s(&values));
    }
    raw
}

/// The logits of each token alone: at the first position, attention gives its value.
fn expected(renormalise: bool, hidden_act: &str) -> Vec<f64> {
    let all = tensors();
    let get = |name: &str| -> Vec<f64> {
        let found = all.iter().find(|(gguf, hf, ..)| *gguf == name || hf.ends_with(name)).unwrap();
        found.3.iter().map(|&v| f64::from(v)).collect()
    };
    let product = |w: &[f64], x: &[f64]| -> Vec<f64> {
        w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    };
    let norm = |x: &[f64], w: &[f64]| -> Vec<f64> {
        let scale = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + EPS).sqrt();
        x.iter().zip(w).map(|(x, w)| x / scale * w).collect()
    };
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let network = |x: &[f64], module: &str| {
        let of = |part: &str| get(&format!("mlp.{module}.{part}_proj.weight"));
        let (gate, up) = (product(&of("gate"), x), product(&of("up"), x));
        let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| activation(hidden_act, *g) * u).collect();
        product(&of("down"), &inner)
    };
    let embedding = get("token_embd.weight");
    let mut logits = Vec::new();
    for token in 0..VOCABULARY {
        let mut x = embedding[token * HIDDEN..][..HIDDEN].to_vec();
        let n = norm(&x, &get("blk.0.attn_norm.weight"));
        let bias = get("blk.0.attn_v.bias");
        let v: Vec<f64> =
            product(&get("blk.0.attn_v.weight"), &n).iter().zip(bias).map(|(v, b)| v + b).collect();
        let y = product(&get("blk.0.attn_output.weight"), &[v.clone(), v].concat());
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        let n = norm(&x, &get("blk.0.ffn_norm.weight"));
        let router = product(&get("blk.0.ffn_gate_inp.weight"), &n);
        let mut order: Vec<usize> = (0..EXPERTS).collect();
        order.sort_by(|&a, &b| router[b].total_cmp(&router[a]));
        let counted = if renormalise { &order[..USED] } else { &order[..] };
        let total: f64 = counted.iter().map(|&e| router[e].exp()).sum();
        for &e in &order[..USED] {
            let y = network(&n, &format!("experts.{e}"));
            x.iter_mut().zip(y).for_each(|(x, y)| *x += router[e].exp() / total * y);
        }
        let weight = sigmoid(product(&get("blk.0.ffn_gate_inp_shexp.weight"), &n)[0]);
        let y = network(&n, "shared_expert");
        x.iter_mut().zip(y).for_each(|(x, y)| *x += weight * y);
        logits.extend(product(&embedding, &norm(&x, &get("output_norm.weight"))));
    }
    logits
}

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let options = LoadOptions { activations: ActivationRule::Float, ..LoadOptions::default() };
    let model: BitNet = load(checkpoint, &support::device(), &options, &mut |_| {}).unwrap();
    let mut cache = model.cache(4, CacheType::F32).unwrap();
    let mut rows = Vec::new();
    for token in 0..VOCABULARY as u32 {
        rows.push(Row { token, sequence: cache.add_sequence(1), position: 0 });
    }
    let wanted: Vec<usize> = (0..VOCABULARY).collect();
    model.forward(&rows, &wanted, &mut cache).unwrap().into_data().try_to_vec::<f32>().unwrap()
}

fn assert_close(ours: &[f32], expected: &[f64]) {
    for (at, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        let difference = (f64::from(*ours) - expected).abs();
        assert!(difference < TOLERANCE * expected.abs().max(1.0), "{at}: {ours} {expected}");
    }
}

#[test]
fn gelu_is_computed_by_its_names_in_both_formats() {
    let dir = Dir::new();
    for (name, is) in [
        ("gelu", GatedActivation::Gelu),
        ("gelu_new", GatedActivation::GeluTanh),
        ("gelu_pytorch_tanh", GatedActivation::GeluTanh),
    ] {
        let gguf = dir.open_and_check(&raw().key("qwen2moe.hidden_act", STRING, string(name))).unwrap();
        let opened = directory(false).set("hidden_act", json!(name)).open().unwrap();
        for checkpoint in [&gguf, &opened.checkpoint] {
            assert_eq!(checkpoint.config().activation, is, "{name}");
            assert_close(&logits(checkpoint), &expected(false, name));
        }
    }
    // Others would be noticed.
    let [silu, gelu, tanh] = ["silu", "gelu", "gelu_pytorch_tanh"].map(|name| expected(false, name));
    for (a, b) in [(&silu, &gelu), (&gelu, &tanh)] {
        let difference = a.iter().zip(b).fold(0f64, |most, (a, b)| most.max((a - b).abs()));
        assert!(difference > 2.0 * TOLERANCE, "{difference:e}");
    }
}

#[test]
fn a_shared_expert_is_added_with_the_sigmoid_of_its_gate() {
    let dir = Dir::new();
    let gguf = dir.open_and_check(&raw()).unwrap();
    for (checkpoint, renormalise) in [
        (&gguf, false),
        (&directory(false).open().unwrap().checkpoint, false),
        (&directory(true).open().unwrap().checkpoint, true),
    ] {
        let config = checkpoint.config();
        let experts = config.options.experts.as_ref().unwrap();
        assert_eq!((experts.shared, experts.renormalise), (Some(SHARED), renormalise));
        assert!(config.options.qkv_bias && !config.options.output_bias);
        let weights = 8 * 8 * 2 + 4 * 8 * 2 + (3 * EXPERTS * INNER + 3 * SHARED) * HIDDEN;
        assert_eq!(config.ternary_parameters(), weights as u64);
        assert_close(&logits(checkpoint), &expected(renormalise, "silu"));
    }
}

#[test]
fn files_that_lie_about_a_shared_expert_are_refused() {
    let dir = Dir::new();
    let renamed = |name: &str, other: &str| {
        let mut raw = raw();
        raw.tensor_mut(name).name = other.into();
        raw
    };
    let mut wide = raw();
    *wide.value("qwen2moe.expert_shared_feed_forward_length") = 24u32.to_le_bytes().into();
    let mut none = raw();
    *none.value("qwen2moe.expert_shared_feed_forward_length") = 0u32.to_le_bytes().into();
    const INPUT: &str = "blk.0.ffn_gate_inp_shexp.weight";
    let cases: Vec<(&str, Raw, &[&str])> = vec![
        ("no gate", renamed(INPUT, "blk.0.x"), &[INPUT, "missing"]),
        ("no up", renamed("blk.0.ffn_up_shexp.weight", "blk.0.x"), &["ffn_up_shexp", "missing"]),
        ("another width", wide, &["blk.0.ffn_gate_shexp.weight", "[20, 8]", "[24, 8]"]),
        ("no width", none, &["options.experts", "0 values between the projections of the shared expert"]),
        (
            "several",
            raw().key("qwen2moe.expert_shared_count", U32, 2u32.to_le_bytes()),
            &["expert_shared_count", "2"],
        ),
        (
            "weights that are renormalised",
            raw().key("qwen2moe.expert_weights_norm", BOOL, [1]),
            &["expert_weights_norm", "true", "false"],
        ),
    ];
    for (name, raw, parts) in cases {
        gguf::assert_refused(name, dir.open_and_check(&raw), parts);
    }
    const SIZE: &str = "shared_expert_intermediate_size";
    const GATE: &str = "model.layers.0.mlp.shared_expert_gate.weight";
    let cases: Vec<(&str, Model, &[&str])> = vec![
        ("no width", directory(true).without(SIZE), &[SIZE, "missing"]),
        ("another width", directory(true).set(SIZE, json!(24)), &["shared_expert.gate_proj", "[20, 8]"]),
        ("no gate", directory(true).drop(GATE), &[GATE, "missing"]),
        ("a gate for two", directory(true).tensor(GATE, "F32", &[2, 8], f32s(&[0.5; 16])), &[GATE, "[1, 8]"]),
    ];
    for (name, model, parts) in cases {
        hf::assert_refused(name, model.open(), parts);
    }
}
