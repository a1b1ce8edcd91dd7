//! Mixtures of experts and sliding windows: what the files of Qwen3 MoE and Maple become, and what each lie in them gets.

use bitnet_burn::{Experts, Projection, SlidingWindows};
use bitnet_burn_engine::checkpoint::Weights;
use serde_json::{Value, json};

use crate::gguf::{self, ARRAY, BOOL, Dir, F32, Raw, STRING, U32, array, f32s, i2_s, string};
use crate::hf::{self, Model};

/// `n` rows of K weights as Q2_0: a scale of 0.5, and the codes 0, 1, 2, 1, ...
fn q2_0(n: u64, k: u64) -> Vec<u8> {
    [vec![0x00, 0x38], vec![0b01_10_01_00; 16]].concat().repeat((n * k / 64) as usize)
}

/// Hidden 128, two layers (the first with a window of 4), two heads of 64, one KV head, vocabulary 4; three experts of 64,
/// two of them for a row.
fn mixture(architecture: &str) -> Raw {
    let mut raw = Raw::new().key("general.architecture", STRING, string(architecture));
    for (key, value) in [
        ("context_length", 64u32),
        ("embedding_length", 128),
        ("block_count", 2),
        ("feed_forward_length", 128),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("vocab_size", 4),
        ("expert_count", 3),
        ("expert_used_count", 2),
        ("expert_feed_forward_length", 64),
    ] {
        raw = raw.key(&format!("{architecture}.{key}"), U32, value.to_le_bytes());
    }
    raw = raw
        .key(&format!("{architecture}.attention.layer_norm_rms_epsilon"), F32, 1e-5f32.to_le_bytes())
        .key(&format!("{architecture}.rope.freq_base"), F32, 10_000f32.to_le_bytes())
        .tensor("token_embd.weight", &[128, 4], 1, vec![0x11; 1024])
        .tensor("output.weight", &[128, 4], 1, vec![0x11; 1024])
        .tensor("output_norm.weight", &[128], 0, f32s(&[1.0; 128]));
    for layer in 0..2 {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        for (norm, n) in [("attn_norm", 128), ("ffn_norm", 128), ("attn_q_norm", 64), ("attn_k_norm", 64)] {
            raw = raw.tensor(&name(norm), &[n], 0, f32s(&vec![1.0; n as usize]));
        }
        for (part, n) in [("attn_q", 128), ("attn_k", 64), ("attn_v", 64), ("attn_output", 128)] {
            raw = raw.tensor(&name(part), &[128, n], 42, q2_0(n, 128));
        }
        raw = raw.tensor(&name("ffn_gate_inp"), &[128, 3], 0, f32s(&[0.25; 3 * 128]));
        for (part, n, k) in [("ffn_gate_exps", 64, 128), ("ffn_up_exps", 64, 128), ("ffn_down_exps", 128, 64)]
        {
            raw = raw.tensor(&name(part), &[k, n, 3], 42, q2_0(3 * n, k));
        }
    }
    raw
}

fn maple() -> Raw {
    mixture("maple")
        .key("maple.attention.sliding_window", U32, 4u32.to_le_bytes())
        .key("maple.attention.sliding_window_pattern", ARRAY, array(BOOL, 2, &[1, 0]))
        .key("maple.swiglu_clamp_exp", ARRAY, array(F32, 2, &f32s(&[7.0, 0.0])))
}

#[test]
fn gguf_files_say_which_experts_and_windows_there_are() {
    let dir = Dir::new();
    let checkpoint = dir.open_and_check(&maple()).unwrap();
    let config = checkpoint.config();
    let experts = Experts {
        count: 3,
        used: 2,
        intermediate_size: 64,
        renormalise: true,
        shared: None,
        dense_layers: Vec::new(),
    };
    assert_eq!(config.options.experts.as_ref(), Some(&experts));
    let windows = SlidingWindows { positions: 4, layers: vec![true, false], global_rope: false };
    assert_eq!(config.options.windows.as_ref(), Some(&windows));
    assert_eq!(config.options.swiglu_clamp, [7.0, 0.0]);
    assert!(config.options.qk_norms && !config.tied_embeddings);
    let report = checkpoint.check().unwrap();
    // Two matrices, and of each layer four norms, four projections, a router and nine of experts.
    assert_eq!(report.tensors, 3 + 2 * (4 + 4 + 1 + 9));
    let weights = 128 * 128 * 2 + 128 * 64 * 2 + 9 * 128 * 64;
    assert_eq!(config.ternary_parameters(), 2 * weights);
    assert_eq!(config.ternary_parameters_per_token(), 2 * (weights - 3 * 128 * 64));
    assert_eq!(config.dense_parameters(), 2 * 4 * 128 + 2 * 3 * 128);

    // One limit for all layers; experts whose width follows from the feed-forward network's; a base for the windows.
    let scalar = maple().without("maple.swiglu_clamp_exp");
    let scalar = scalar.key("maple.swiglu_clamp_exp", F32, 5f32.to_le_bytes());
    assert_eq!(dir.open(&scalar).unwrap().config().options.swiglu_clamp, [5.0, 5.0]);
    let qwen = mixture("qwen3moe").without("qwen3moe.expert_feed_forward_length");
    let checkpoint = dir.open_and_check(&qwen).unwrap();
    assert_eq!(checkpoint.config().options.experts.as_ref().unwrap().intermediate_size, 128 / 2);
    assert_eq!((checkpoint.config().window(0), checkpoint.config().has_rope(1)), (None, true));
    let other_base = maple().key("maple.rope.freq_base_swa", F32, 5_000f32.to_le_bytes());
    assert_eq!(dir.open(&other_base).unwrap().config().rope_theta, 5_000.0);
}

#[test]
fn experts_are_views_of_one_tensor() {
    let dir = Dir::new();
    let mut raw = maple();
    // Experts that differ: scales of 0.5, 1 and 2.
    let tensor = raw.tensor_mut("blk.1.ffn_down_exps.weight");
    for (expert, rows) in tensor.data.chunks_exact_mut(128 * 18).enumerate() {
        rows.chunks_exact_mut(18).for_each(|block| block[1] = [0x38, 0x3c, 0x40][expert]);
    }
    let checkpoint = dir.open_and_check(&raw).unwrap();
    let experts: Vec<_> = (0..3)
        .map(|number| match checkpoint.weights(1, Projection::ExpertDown(number)).unwrap() {
            Weights::Dense(tensor) => tensor,
            Weights::Ternary(tensor) => panic!("{}", tensor.name),
        })
        .collect();
    for (number, tensor) in experts.iter().enumerate() {
        assert_eq!((tensor.n, tensor.k, tensor.data.len()), (128, 64, 128 * 18));
        assert_eq!(tensor.data.as_ptr().addr() - experts[0].data.as_ptr().addr(), number * 128 * 18);
        assert_eq!(tensor.name, format!("blk.1.ffn_down_exps.weight (expert {number})"));
        let mut row = [0.0; 64];
        tensor.format.decode_row(tensor.row(127).unwrap(), &mut row).unwrap();
        assert_eq!(row[..4], [-0.5, 0.0, 0.5, 0.0].map(|v| v * 2f32.powi(number as i32)));
    }
}

#[test]
fn gguf_files_that_lie_about_experts_and_windows_are_refused() {
    let dir = Dir::new();
    let key = |key: &str, value: u32| {
        let mut raw = maple();
        *raw.value(&format!("maple.{key}")) = value.to_le_bytes().into();
        raw
    };
    let without = |key: &str| maple().without(&format!("maple.{key}"));
    let with = |key: &str, value: u32| maple().key(&format!("maple.{key}"), U32, value.to_le_bytes());
    let pattern = |element: u32, flags: &[u8]| {
        let value = array(element, (flags.len() / if element == U32 { 4 } else { 1 }) as u64, flags);
        without("attention.sliding_window_pattern").key(
            "maple.attention.sliding_window_pattern",
            ARRAY,
            value,
        )
    };
    let clamp = |values: &[f32]| {
        let value = array(F32, values.len() as u64, &f32s(values));
        without("swiglu_clamp_exp").key("maple.swiglu_clamp_exp", ARRAY, value)
    };
    let tensor = |name: &str, dims: &[u64], kind: u32, data: Vec<u8>| {
        let mut raw = maple();
        let tensor = raw.tensor_mut(name);
        (tensor.dims, tensor.kind, tensor.data) = (dims.to_vec(), kind, data);
        raw
    };
    let renamed = |name: &str, other: &str| {
        let mut raw = maple();
        raw.tensor_mut(name).name = other.into();
        raw
    };
    let mut router_of_nan = maple();
    router_of_nan.tensor_mut("blk.1.ffn_gate_inp.weight").data[512..516].fill(0xff);
    let mut scale_of_nan = maple();
    scale_of_nan.tensor_mut("blk.0.ffn_up_exps.weight").data[2 * 64 * 36 + 37] = 0x7e;
    let cases: Vec<(&str, Raw, &[&str])> = vec![
        ("no experts", key("expert_count", 0), &["options.experts", "has 0 experts", "between 1 and"]),
        ("2^32 experts", key("expert_count", u32::MAX), &["options.experts", "4294967295 experts"]),
        (
            "more for a row",
            key("expert_used_count", 4),
            &["options.experts", "4 experts for a row", "1 and 3"],
        ),
        ("none for a row", key("expert_used_count", 0), &["options.experts", "0 experts for a row"]),
        ("no width", key("expert_feed_forward_length", 0), &["options.experts", "has 0 values"]),
        ("no key of the count", without("expert_count"), &["maple.expert_count", "missing"]),
        ("no key of the number used", without("expert_used_count"), &["maple.expert_used_count", "missing"]),
        (
            "no key of the width",
            without("expert_feed_forward_length"),
            &["expert_feed_forward_length", "missing"],
        ),
        (
            "another count",
            key("expert_count", 4),
            &["blk.0.ffn_gate_exps.weight", "[3, 64, 128]", "[4, 64, 128]"],
        ),
        (
            "another width",
            key("expert_feed_forward_length", 128),
            &["blk.0.ffn_gate_exps.weight", "[3, 128, 128]"],
        ),
        ("a shared expert", with("expert_shared_count", 1), &["maple.expert_shared_count", "is 1", "0"]),
        ("the sigmoid", with("expert_gating_func", 2), &["maple.expert_gating_func", "2"]),
        ("groups", with("expert_group_count", 8), &["maple.expert_group_count", "8"]),
        (
            "scaled weights",
            maple().key("maple.expert_weights_scale", F32, 2.5f32.to_le_bytes()),
            &["maple.expert_weights_scale", "2.5"],
        ),
        (
            "weights that are not renormalised",
            maple().key("maple.expert_weights_norm", BOOL, [0]),
            &["maple.expert_weights_norm", "false"],
        ),
        (
            "no router",
            renamed("blk.1.ffn_gate_inp.weight", "blk.1.x"),
            &["blk.1.ffn_gate_inp.weight", "missing"],
        ),
        (
            "a router to four",
            tensor("blk.0.ffn_gate_inp.weight", &[128, 4], 0, f32s(&[0.0; 512])),
            &["blk.0.ffn_gate_inp.weight", "[4, 128]", "[3, 128]"],
        ),
        ("a router with a NaN", router_of_nan, &["blk.1.ffn_gate_inp.weight", "row 1, column 0", "NaN"]),
        (
            "one network for all",
            renamed("blk.0.ffn_up_exps.weight", "blk.0.ffn_up.weight"),
            &["blk.0.ffn_up_exps.weight", "missing"],
        ),
        (
            "two experts",
            tensor("blk.1.ffn_down_exps.weight", &[64, 128, 2], 42, q2_0(256, 64)),
            &["blk.1.ffn_down_exps.weight", "[2, 128, 64]", "[3, 128, 64]"],
        ),
        (
            "experts as one matrix",
            tensor("blk.1.ffn_up_exps.weight", &[128, 192], 42, q2_0(192, 128)),
            &["blk.1.ffn_up_exps.weight", "[192, 128]", "[3, 64, 128]"],
        ),
        (
            "experts with one scale",
            tensor("blk.1.ffn_up_exps.weight", &[128, 64, 3], 36, i2_s(3 * 64 * 128)),
            &["blk.1.ffn_up_exps.weight", "I2_S", "experts"],
        ),
        (
            "an expert with a NaN",
            scale_of_nan,
            &["blk.0.ffn_up_exps.weight (expert 2)", "row 1, column 0", "NaN"],
        ),
        (
            "scales of experts",
            maple().tensor("blk.0.ffn_up_exps.scale", &[3], 0, f32s(&[1.0; 3])),
            &["blk.0.ffn_up_exps.scale", "no such tensor"],
        ),
        (
            "a scale beside weights with scales of their own",
            maple().tensor("blk.0.attn_q.scale", &[1], 0, f32s(&[2.0])),
            &["blk.0.attn_q.scale", "blk.0.attn_q.weight", "Q2_0"],
        ),
        ("a tied head", renamed("output.weight", "x"), &["output.weight", "missing"]),
        ("a window of 0", key("attention.sliding_window", 0), &["options.windows", "window of 0 positions"]),
        ("no window", without("attention.sliding_window"), &["maple.attention.sliding_window", "missing"]),
        (
            "no pattern",
            without("attention.sliding_window_pattern"),
            &["maple.attention.sliding_window_pattern", "missing"],
        ),
        ("a short pattern", pattern(BOOL, &[1]), &["sliding_window_pattern", "one for each layer"]),
        (
            "numbers as pattern",
            pattern(U32, &[1, 0, 0, 0, 0, 0, 0, 0]),
            &["sliding_window_pattern", "array of bool"],
        ),
        ("no limit", without("swiglu_clamp_exp"), &["maple.swiglu_clamp_exp", "missing"]),
        ("limits for three layers", clamp(&[7.0; 3]), &["maple.swiglu_clamp_exp", "one for each layer"]),
        ("a negative limit", clamp(&[7.0, -7.0]), &["options.swiglu_clamp", "-7"]),
        ("a limit that is no number", clamp(&[f32::NAN, 7.0]), &["options.swiglu_clamp", "NaN"]),
        (
            "a limit elsewhere",
            mixture("qwen3moe").key("qwen3moe.swiglu_clamp_exp", F32, 7f32.to_le_bytes()),
            &["qwen3moe.swiglu_clamp_exp", "7", "no such key"],
        ),
        (
            "a window elsewhere",
            mixture("qwen3moe").key("qwen3moe.attention.sliding_window", U32, 4u32.to_le_bytes()),
            &["qwen3moe.attention.sliding_window", "4"],
        ),
    ];
    for (name, raw, parts) in cases {
        gguf::assert_refused(name, dir.open_and_check(&raw), parts);
    }
}

/// Hidden 8, one layer, two heads of 4, one KV head, vocabulary 4; three experts of 12, two of them for a row.
fn directory() -> Model {
    let mut model = Model::new(Value::Null)
        .set("model_type", json!("qwen3_moe"))
        .set("hidden_act", json!("silu"))
        .set("num_experts", json!(3))
        .set("num_experts_per_tok", json!(2))
        .set("moe_intermediate_size", json!(12))
        .set("norm_topk_prob", json!(true))
        .without("quantization_config")
        .drop("model.layers.0.self_attn.attn_sub_norm.weight")
        .drop("model.layers.0.mlp.ffn_sub_norm.weight");
    let floats = |shape: &[usize]| f32s(&vec![0.5; shape.iter().product()]);
    let mut add = |name: String, shape: &[usize]| {
        model.tensors.push((format!("model.layers.0.{name}.weight"), "F32", shape.to_vec(), floats(shape)));
    };
    for (part, n) in [("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)] {
        add(format!("self_attn.{part}"), &[n, 8]);
    }
    add("self_attn.q_norm".into(), &[4]);
    add("self_attn.k_norm".into(), &[4]);
    add("mlp.gate".into(), &[3, 8]);
    for expert in 0..3 {
        for (part, n, k) in [("gate_proj", 12, 8), ("up_proj", 12, 8), ("down_proj", 8, 12)] {
            add(format!("mlp.experts.{expert}.{part}"), &[n, k]);
        }
    }
    model
}

fn maple_directory() -> Model {
    directory()
        .set("model_type", json!("maple"))
        .set("layer_types", json!(["sliding_attention"]))
        .set("sliding_window", json!(4))
        .set("nope_on_global_attention", json!(true))
}

#[test]
fn directories_say_which_experts_and_windows_there_are() {
    let config = |model: Model| model.open().unwrap().checkpoint.config().clone();
    let qwen = config(directory());
    let experts = Experts {
        count: 3,
        used: 2,
        intermediate_size: 12,
        renormalise: true,
        shared: None,
        dense_layers: Vec::new(),
    };
    assert_eq!(qwen.options.experts.as_ref(), Some(&experts));
    assert!(qwen.options.qk_norms && qwen.options.windows.is_none() && qwen.options.swiglu_clamp.is_empty());
    // transformers' default is plain softmax; Maple's is not.
    let renormalises =
        |model: Model| config(model.without("norm_topk_prob")).options.experts.unwrap().renormalise;
    assert_eq!((renormalises(directory()), renormalises(maple_directory())), (false, true));
    let other_name = directory().without("num_experts").set("num_local_experts", json!(3));
    assert_eq!(config(other_name).options.experts.unwrap().count, 3);

    let maple = config(maple_directory());
    let windows = SlidingWindows { positions: 4, layers: vec![true], global_rope: false };
    assert_eq!((maple.options.windows, maple.options.swiglu_clamp), (Some(windows), vec![7.0]));
    let global = maple_directory().set("layer_types", json!(["full_attention"])).without("sliding_window");
    let with_rope = config(global.set("nope_on_global_attention", json!(false)));
    assert_eq!((with_rope.window(0), with_rope.has_rope(0)), (None, true));

    // A layer without experts.
    let mut dense = directory().set("mlp_only_layers", json!([0]));
    for (part, n, k) in [("gate_proj", 12, 8), ("up_proj", 12, 8), ("down_proj", 8, 12)] {
        dense = dense.tensor(&format!("model.layers.0.mlp.{part}.weight"), "F32", &[n, k], f32s(&[0.5; 96]));
    }
    dense.tensors.retain(|(name, ..)| !name.contains("experts") && !name.ends_with("mlp.gate.weight"));
    assert!(config(dense).experts(0).is_none());
}

#[test]
fn directories_that_lie_about_experts_and_windows_are_refused() {
    let d = |key: &str, value: Value| directory().set(key, value);
    let m = |key: &str, value: Value| maple_directory().set(key, value);
    let tensor = |name: &str, shape: &[usize]| {
        directory().tensor(name, "F32", shape, f32s(&vec![0.5; shape.iter().product()]))
    };
    const ROUTER: &str = "model.layers.0.mlp.gate.weight";
    const UP: &str = "model.layers.0.mlp.experts.2.up_proj.weight";
    let mut fused = directory();
    fused.tensors.retain(|(name, ..)| !name.contains("experts"));
    let fused =
        fused.tensor("model.layers.0.mlp.experts.gate_up_proj", "F32", &[3, 24, 8], f32s(&[0.5; 576]));
    let cases: Vec<(&str, Model, &[&str])> = vec![
        ("no experts", d("num_experts", json!(0)), &["options.experts", "has 0 experts"]),
        ("no count", directory().without("num_experts"), &["num_experts", "missing"]),
        (
            "no number for a row",
            directory().without("num_experts_per_tok"),
            &["num_experts_per_tok", "missing"],
        ),
        ("more for a row", d("num_experts_per_tok", json!(4)), &["4 experts for a row", "between 1 and 3"]),
        ("none for a row", d("num_experts_per_tok", json!(0)), &["0 experts for a row"]),
        ("no width", directory().without("moe_intermediate_size"), &["moe_intermediate_size", "missing"]),
        (
            "another count",
            d("num_experts", json!(4)),
            &["model.layers.0.mlp.experts.3.gate_proj.weight", "missing"],
        ),
        ("fewer", d("num_experts", json!(2)), &["model.layers.0.mlp.experts.2.", "no such tensor"]),
        ("no router", directory().drop(ROUTER), &[ROUTER, "missing"]),
        ("a router to two", tensor(ROUTER, &[2, 8]), &[ROUTER, "[2, 8]", "[3, 8]"]),
        ("no expert", directory().drop(UP), &[UP, "missing"]),
        ("an expert of another shape", tensor(UP, &[8, 12]), &[UP, "[8, 12]", "[12, 8]"]),
        (
            "fused experts",
            fused,
            &["experts.0.gate_proj.weight", "experts.gate_up_proj", "all experts in one tensor"],
        ),
        ("a shared expert", d("num_shared_experts", json!(1)), &["num_shared_experts", "1", "0"]),
        (
            "a shared expert by its width",
            d("shared_expert_intermediate_size", json!(64)),
            &["shared_expert_intermediate_size", "64"],
        ),
        ("a factor", d("routed_scaling_factor", json!(2.5)), &["routed_scaling_factor", "2.5"]),
        ("groups", d("n_group", json!(4)), &["n_group", "4"]),
        ("the sigmoid", d("scoring_func", json!("sigmoid")), &["scoring_func", "sigmoid", "softmax"]),
        ("no step", d("decoder_sparse_step", json!(0)), &["decoder_sparse_step", "0", "positive"]),
        ("a layer beyond", d("mlp_only_layers", json!([1])), &["options.experts", "layer 1", "1 layers"]),
        (
            "a layer that is no number",
            d("mlp_only_layers", json!(["0"])),
            &["mlp_only_layers", "a list of layers"],
        ),
        (
            "a dense layer without its network",
            d("mlp_only_layers", json!([0])),
            &["model.layers.0.mlp.gate_proj.weight", "missing"],
        ),
        (
            "2^60 layers, half of them dense",
            d("num_hidden_layers", json!(1u64 << 60)).set("decoder_sparse_step", json!(2)),
            &["1152921504606846976"],
        ),
        ("a window", d("use_sliding_window", json!(true)), &["use_sliding_window", "false"]),
        ("a limit", d("swiglu_limit", json!(7.0)), &["swiglu_limit", "7.0", "without"]),
        ("no kinds of layers", maple_directory().without("layer_types"), &["layer_types", "missing"]),
        (
            "two kinds",
            m("layer_types", json!(["full_attention", "full_attention"])),
            &["layer_types", "one for each layer"],
        ),
        (
            "another kind",
            m("layer_types", json!(["chunked_attention"])),
            &["layer_types", "chunked_attention", "sliding_attention"],
        ),
        ("no window", maple_directory().without("sliding_window"), &["sliding_window", "missing"]),
        ("a window of 0", m("sliding_window", json!(0)), &["options.windows", "0 positions"]),
        ("windows that are off", m("use_sliding_window", json!(false)), &["use_sliding_window", "false"]),
        ("another limit", m("swiglu_limit", json!(9.0)), &["swiglu_limit", "9.0", "7"]),
    ];
    for (name, model, parts) in cases {
        hf::assert_refused(name, model.open(), parts);
    }
}
