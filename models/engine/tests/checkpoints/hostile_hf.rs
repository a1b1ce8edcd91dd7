//! Hugging Face directories that lie: configurations, indices and safetensors files, each refused with an
//! error that says what is wrong, without a panic and without an allocation out of proportion.

use bitnet_burn::ActivationRule;
use bitnet_burn::GatedActivation;
use bitnet_burn::Projection;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions, TokenizerSource};
use proptest::prelude::{Just, Strategy, any};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

use crate::hf::*;

#[test]
fn the_styles_mean_what_the_table_says() {
    let scale = |model: &Model| {
        let opened = model.open().unwrap();
        let tensor = opened.checkpoint.projection(0, Projection::Q).unwrap();
        (tensor.scale, tensor.stored_as)
    };
    assert_eq!(scale(&Model::packed()), (0.5, "U8 packed (autobitlinear)"));
    let class = |class: Value| Model::packed().set("quantization_config/linear_class", class);
    assert_eq!(scale(&class(json!("bitlinear"))), (2.0, "U8 packed (bitlinear)"));
    assert_eq!(scale(&class(Value::Null)), (2.0, "U8 packed (bitlinear)"));
    let offline = Model::packed().set("quantization_config/quantization_mode", json!("offline"));
    assert_eq!(scale(&offline), (0.5, "U8 packed (autobitlinear)"));
    let (s, stored_as) = scale(&Model::online());
    assert_eq!(stored_as, "F32 master (absmean)");
    assert!((s - 0.4).abs() < 0.02, "{s}");
    // A scale of shape [] instead of [1].
    let name = "model.layers.0.self_attn.q_proj.weight_scale";
    assert_eq!(scale(&Model::packed().tensor(name, "BF16", &[], vec![0x80, 0x3e])).0, 0.25);
}

#[test]
fn configurations_of_all_versions_are_read() {
    let opened = Model::packed().open().unwrap();
    let config = opened.checkpoint.config().clone();
    assert_eq!((config.head_dim, config.rope_theta, config.eos_tokens.clone()), (4, 500_000.0, vec![2]));
    assert_eq!(
        (config.activation, config.sub_norms, config.tied_embeddings),
        (GatedActivation::Relu2, true, true)
    );
    assert_eq!(opened.checkpoint.warnings(), &[] as &[String]);
    let TokenizerSource::Hf { dir } = opened.checkpoint.tokenizer_source() else { panic!("a directory") };
    assert_eq!(dir, opened.checkpoint.path());

    let v5 = Model::packed().without("rope_theta");
    let v5 = v5.set("rope_parameters", json!({"rope_theta": 10000.0, "rope_type": "default"}));
    assert_eq!(v5.open().unwrap().checkpoint.config().rope_theta, 10_000.0);
    let opened = Model::packed().without("rope_theta").set("rope_scaling", Value::Null).open().unwrap();
    assert_eq!((opened.checkpoint.config().rope_theta, opened.checkpoint.warnings().len()), (500_000.0, 1));

    // generation_config.json wins, and may hold a list.
    let dir = tempfile::tempdir().unwrap();
    Model::packed().write(dir.path());
    std::fs::write(
        dir.path().join("generation_config.json"),
        r#"{"eos_token_id": [3, 0], "bos_token_id": null}"#,
    )
    .unwrap();
    let checkpoint = Checkpoint::open(dir.path(), &OpenOptions::default()).unwrap();
    assert_eq!(
        (checkpoint.config().eos_tokens.clone(), checkpoint.config().bos_token),
        (vec![3, 0], Some(1))
    );

    // Untied: a missing tie_word_embeddings means false.
    let untied = Model::packed().without("tie_word_embeddings");
    let head = untied.tensor("lm_head.weight", "F32", &[4, 8], f32s(&[1.0; 32])).open().unwrap();
    assert_eq!(head.checkpoint.output().unwrap().unwrap().name, "lm_head.weight");
    // Tied, with a head that is not used: transformers ignores it too.
    let both = Model::packed().tensor("lm_head.weight", "F32", &[4, 8], f32s(&[1.0; 32])).open().unwrap();
    assert!(both.checkpoint.output().unwrap().is_none());
    assert!(both.checkpoint.warnings()[0].contains("lm_head.weight"));

    // Llama-shaped: no sub-norms, SiLU.
    let llama = Model::packed().set("model_type", json!("llama")).set("hidden_act", json!("silu"));
    let llama = llama
        .drop("model.layers.0.self_attn.attn_sub_norm.weight")
        .drop("model.layers.0.mlp.ffn_sub_norm.weight");
    let opened = llama.open().unwrap();
    assert!(!opened.checkpoint.config().sub_norms);
    // The option wins, and says so.
    let options = OpenOptions { hidden_act: Some(GatedActivation::Silu), ..Default::default() };
    let opened = Model::packed().open_with(&options).unwrap();
    assert_eq!(opened.checkpoint.config().activation, GatedActivation::Silu);
    assert!(opened.checkpoint.warnings()[0].contains("hidden_act"));
    assert!(Model::packed().without("hidden_act").open_with(&options).is_ok());
}

#[test]
fn configurations_that_lie_are_refused() {
    let p = Model::packed;
    let q = |key: &str, value: Value| Model::packed().set(&format!("quantization_config/{key}"), value);
    let values = || Model::online().set("model_type", json!("llama")).without("quantization_config");
    let cases: Vec<(&str, Model, &[&str])> = vec![
        ("no model type", p().without("model_type"), &["model_type", "config.json"]),
        ("other model type", p().set("model_type", json!("mamba")), &["`mamba`", "bitnet, llama"]),
        ("no width", p().without("hidden_size"), &["hidden_size", "missing"]),
        ("a negative width", p().set("hidden_size", json!(-8)), &["hidden_size", "-8", "non-negative"]),
        (
            "a width of 2^60",
            p().set("hidden_size", json!(1u64 << 60)),
            &["hidden_size", "1152921504606846976"],
        ),
        ("a fractional width", p().set("hidden_size", json!(8.5)), &["hidden_size", "8.5"]),
        ("no heads", p().set("num_attention_heads", json!(0)), &["num_attention_heads", "divisor"]),
        ("zero layers", p().set("num_hidden_layers", json!(0)), &["n_layers"]),
        ("layers of 2^60", p().set("num_hidden_layers", json!(1u64 << 60)), &["n_layers"]),
        (
            "two layers",
            p().set("num_hidden_layers", json!(2)),
            &["model.layers.1.input_layernorm.weight", "missing"],
        ),
        ("eps as text", p().set("rms_norm_eps", json!("1e-5")), &["rms_norm_eps", "a number"]),
        (
            "a wrong vocabulary",
            p().set("vocab_size", json!(5)),
            &["model.embed_tokens.weight", "[4, 8]", "[5, 8]"],
        ),
        (
            "no activation",
            p().without("hidden_act"),
            &["hidden_act", "--hidden-act relu2", "--hidden-act silu"],
        ),
        ("other activation", p().set("hidden_act", json!("gelu_fast")), &["gelu_fast", "relu2, silu"]),
        ("a bias", p().set("attention_bias", json!(true)), &["attention_bias", "true"]),
        (
            "llama3, no factor",
            p().set("rope_scaling", json!({"rope_type": "llama3"})),
            &["rope_scaling.factor"],
        ),
        ("linear, no factor", p().set("rope_scaling", json!({"type": "linear"})), &["rope_scaling.factor"]),
        (
            "linear by less than nothing",
            p().set("rope_scaling", json!({"type": "linear", "factor": -2.0})),
            &["rope_scaling", "factor of -2"],
        ),
        (
            "yarn with another scale",
            p().set("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0, "mscale": 1.1})),
            &["`rope_scaling.mscale` is 1.1"],
        ),
        (
            "llama3, factors swapped",
            p().set(
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}),
            ),
            &["low_freq_factor 4", "smaller"],
        ),
        (
            "longrope, too few factors",
            p().set("rope_scaling", json!({"type": "longrope", "short_factor": [1], "long_factor": [1, 2]})),
            &["1 short factors", "have 2"],
        ),
        (
            "two kinds of rope",
            p().set("rope_scaling", json!({"type": "linear", "factor": 2}))
                .set("rope_parameters", json!({"rope_type": "linear", "factor": 4})),
            &["rope_parameters", "rope_scaling"],
        ),
        ("not causal", p().set("is_causal", json!(false)), &["is_causal", "false"]),
        (
            "bidirectional",
            p().set("use_bidirectional_attention", json!(true)),
            &["use_bidirectional_attention", "true"],
        ),
        ("windows", p().set("use_sliding_window", json!(true)), &["use_sliding_window", "true"]),
        (
            "dynamic",
            p().set("rope_scaling", json!({"rope_type": "dynamic", "factor": 1.0})),
            &["`rope_scaling.rope_type` is \"dynamic\"", "default, linear, llama3, yarn, longrope"],
        ),
        ("partial rope", p().set("partial_rotary_factor", json!(0.5)), &["partial_rotary_factor", "0.5"]),
        (
            "tie as text",
            p().set("tie_word_embeddings", json!("yes")),
            &["tie_word_embeddings", "yes", "true or false"],
        ),
        ("no head", p().set("tie_word_embeddings", json!(false)), &["lm_head.weight", "tie_word_embeddings"]),
        ("eos as text", p().set("eos_token_id", json!("x")), &["eos_token_id", "list"]),
        (
            "packed, no quantisation",
            p().without("quantization_config"),
            &["direction", "autobitlinear", "bitlinear"],
        ),
        (
            "masters, no quantisation",
            Model::online().without("quantization_config"),
            &["plain float", "online"],
        ),
        (
            "activations that are none",
            values().set("bitnet_burn", json!({"activations": "rows"})),
            &["bitnet_burn.activations", "rows", "model, row, group:N, float"],
        ),
        (
            "activations in odd groups",
            values().set("bitnet_burn", json!({"activations": "group:33"})),
            &["bitnet_burn.activations", "multiple of 32"],
        ),
        (
            "a number of activations",
            values().set("bitnet_burn", json!({"activations": 8})),
            &["activations", "8"],
        ),
        (
            "activations without a key",
            values().set("bitnet_burn", json!("row")),
            &["bitnet_burn", "an object"],
        ),
        (
            "a quantisation that is text",
            p().set("quantization_config", json!("x")),
            &["quant_method", "missing"],
        ),
        ("other method", q("quant_method", json!("gptq")), &["gptq", "\"bitnet\""]),
        ("other class", q("linear_class", json!("linear")), &["\"linear\"", "autobitlinear, bitlinear"]),
        ("other mode", q("quantization_mode", json!("lazy")), &["lazy", "online, offline"]),
        ("packed, online", q("quantization_mode", json!("online")), &["online", "q_proj.weight", "packed"]),
        (
            "masters, offline",
            Model::online().set("quantization_config/quantization_mode", json!("offline")),
            &["F32", "U8"],
        ),
        ("a norm inside", q("use_rms_norm", json!(true)), &["use_rms_norm"]),
        ("a projection left out", q("modules_to_not_convert", json!(["lm_head", "q_proj"])), &["q_proj"]),
    ];
    for (name, model, parts) in cases {
        assert_refused(name, model.open(), parts);
    }
    assert!(q("modules_to_not_convert", json!(["lm_head"])).open().is_ok());
    let stated = values().set("bitnet_burn", json!({"activations": "group:64"})).open().unwrap().checkpoint;
    let rule = |asked| stated.activations(asked);
    assert_eq!(rule(ActivationRule::Model), ActivationRule::Group(64));
    assert_eq!(rule(ActivationRule::Float), ActivationRule::Float);
}

#[test]
fn tensors_that_lie_are_refused() {
    let p = Model::packed;
    const NAME: &str = "model.layers.0.mlp.up_proj.weight";
    const SCALE: &str = "model.layers.0.mlp.up_proj.weight_scale";
    let mut code_3 = vec![0b01_01_01_01u8; 24];
    code_3[9] = 0b01_11_01_01; // packed row 1, column 1, third quarter: row 2 * 3 + 1
    let inverse_of = |value: f32| {
        p().set("quantization_config/linear_class", json!("bitlinear")).tensor(
            SCALE,
            "F32",
            &[1],
            f32s(&[value]),
        )
    };
    let mut masters = vec![0.5f32; 96];
    masters[17] = f32::INFINITY;
    let cases: Vec<(&str, Model, &[&str])> = vec![
        ("missing", p().drop(NAME), &[NAME, "missing"]),
        ("no scale", p().drop(SCALE), &[SCALE, "missing"]),
        ("unpacked shape", p().tensor(NAME, "U8", &[12, 8], vec![0x55; 96]), &[NAME, "[12, 8]", "[3, 8]"]),
        ("transposed", p().tensor(NAME, "U8", &[8, 3], vec![0x55; 24]), &[NAME, "[8, 3]", "[3, 8]"]),
        ("signed", p().tensor(NAME, "I8", &[3, 8], vec![0x55; 24]), &[NAME, "I8", "U8"]),
        ("code 3", p().tensor(NAME, "U8", &[3, 8], code_3), &[NAME, "row 7, column 1", "code 3"]),
        ("integer scale", p().tensor(SCALE, "I32", &[1], vec![0; 4]), &[SCALE, "I32", "F32, F16, BF16"]),
        ("many scales", p().tensor(SCALE, "F32", &[12], f32s(&[1.0; 12])), &[SCALE, "[12]", "[1]"]),
        ("a scale of NaN", p().tensor(SCALE, "F32", &[1], f32s(&[f32::NAN])), &[SCALE, "NaN"]),
        ("a negative scale", p().tensor(SCALE, "F32", &[1], f32s(&[-1.0])), &[SCALE, "-1"]),
        ("an inverse scale of 0", inverse_of(0.0), &[SCALE, "0", "divides"]),
        ("an inverse scale too small", inverse_of(1e-45), &[SCALE, "inf"]),
        (
            "a norm of NaN",
            p().tensor("model.norm.weight", "F32", &[8], f32s(&[f32::NAN; 8])),
            &["model.norm.weight", "NaN"],
        ),
        (
            "a norm of integers",
            p().tensor("model.norm.weight", "I64", &[8], vec![0; 64]),
            &["model.norm.weight", "I64"],
        ),
        ("a short norm", p().tensor("model.norm.weight", "F32", &[7], f32s(&[1.0; 7])), &["[7]", "[8]"]),
        ("a bias", p().tensor("model.layers.0.mlp.up_proj.bias", "F32", &[12], f32s(&[0.0; 12])), &["bias"]),
        (
            "an unknown norm",
            p().tensor("model.layers.0.self_attn.q_norm.weight", "F32", &[4], f32s(&[0.0; 4])),
            &["q_norm"],
        ),
        (
            "a master with a scale",
            Model::online().tensor(SCALE, "F32", &[1], f32s(&[1.0])),
            &[SCALE, "float master"],
        ),
        (
            "an infinite master",
            Model::online().tensor(NAME, "F32", &[12, 8], f32s(&masters)),
            &[NAME, "row 2, column 1", "inf"],
        ),
    ];
    for (case, model, parts) in cases {
        assert_refused(case, model.open(), parts);
    }
    let rotary = "model.layers.0.self_attn.rotary_emb.inv_freq";
    assert_eq!(
        p().tensor(rotary, "F32", &[2], f32s(&[1.0, 0.1])).open().unwrap().checkpoint.warnings().len(),
        0
    );
}

#[test]
fn directories_that_are_no_model_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| Checkpoint::open(path, &OpenOptions::default());
    assert_refused("nothing", open(&dir.path().join("nowhere")), &["nowhere", "cannot open"]);
    assert_refused("empty", open(dir.path()), &["neither a config.json nor a GGUF file"]);
    let config = dir.path().join("config.json");
    Model::packed().write(dir.path());
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert_refused("no weights", open(dir.path()), &["model.safetensors", "index.json"]);
    for (name, text) in
        [("not JSON", "{"), ("a list", "[1]"), ("nested", &"[".repeat(100_000)), ("not UTF-8", "\u{0}")]
    {
        std::fs::write(&config, text).unwrap();
        assert_refused(name, open(dir.path()), &["config.json"]);
    }
    std::fs::File::create(&config).unwrap().set_len(1 << 40).unwrap(); // a hole: nothing is read of it
    assert_refused("a terabyte", open(dir.path()), &["config.json", "1099511627776", "at most"]);
    std::fs::remove_file(&config).unwrap();
    for name in ["a.gguf", "b.gguf"] {
        std::fs::write(dir.path().join(name), "GGUF").unwrap();
    }
    assert_refused("two files", open(dir.path()), &["a.gguf, b.gguf", "name one of them"]);
    for name in ["a", "b"] {
        let part = format!("m-0000{}-of-00002.gguf", if name == "a" { 1 } else { 2 });
        std::fs::rename(dir.path().join(format!("{name}.gguf")), dir.path().join(part)).unwrap();
    }
    assert_refused("two parts", open(dir.path()), &["m-00001-of-00002.gguf", "truncated"]);
    for (name, part) in [("a", 1), ("b", 2)] {
        let part = dir.path().join(format!("m-0000{part}-of-00002.gguf"));
        std::fs::rename(part, dir.path().join(format!("{name}.gguf"))).unwrap();
    }
    std::fs::remove_file(dir.path().join("b.gguf")).unwrap();
    assert_refused("one file, and that truncated", open(dir.path()), &["a.gguf", "truncated"]);
    std::fs::remove_file(dir.path().join("a.gguf")).unwrap();
    Model::packed().write(dir.path());
    assert_refused("the weights alone", open(&dir.path().join("model.safetensors")), &["give the directory"]);
}

#[test]
fn shards_are_found_and_stay_in_their_directory() {
    let dir = tempfile::tempdir().unwrap();
    let model = Model::packed();
    std::fs::write(dir.path().join("config.json"), model.config.to_string()).unwrap();
    let (first, second) = model.tensors.split_at(5);
    std::fs::write(dir.path().join("x-1.safetensors"), safetensors(first)).unwrap();
    std::fs::write(dir.path().join("x-2.safetensors"), safetensors(second)).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let write = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut map = Map::new();
        for (i, t) in model.tensors.iter().enumerate() {
            map.insert(t.0.clone(), json!(if i < 5 { "x-1.safetensors" } else { "x-2.safetensors" }));
        }
        change(&mut map);
        std::fs::write(&index, json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    };
    let open = || {
        let checkpoint = Checkpoint::open(dir.path(), &OpenOptions::default())?;
        checkpoint.check().map(|report| report.tensors)
    };
    write(&|_| {});
    assert_eq!(open().unwrap(), 13);
    for escape in [
        "../x-1.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "",
        "a\\x.safetensors",
        "c:x.safetensors",
        "x.bin",
    ] {
        write(&|map| {
            map.insert("extra".into(), json!(escape));
        });
        assert_refused(escape, open(), &["index", &format!("{escape:?}"), "plain file name"]);
    }
    write(&|map| {
        map.insert("model.norm.weight".into(), json!("x-2.safetensors"));
    });
    assert_refused("in the other shard", open(), &["model.norm.weight", "x-2.safetensors"]);
    write(&|map| {
        map.insert("extra".into(), json!("x-3.safetensors"));
    });
    assert_refused("a missing shard", open(), &["x-3.safetensors"]);
    std::fs::write(dir.path().join("x-3.safetensors"), safetensors(&first[..1])).unwrap();
    assert_refused("a tensor in two shards", open(), &["occurs twice", &first[0].0]);
    for text in ["{}", "[]", r#"{"weight_map": {"a": 1}}"#, r#"{"weight_map": "x"}"#] {
        std::fs::write(&index, text).unwrap();
        assert_refused(text, open(), &["index.json"]);
    }
}

fn write_weights(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    Model::packed().write(dir.path());
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[test]
fn safetensors_files_that_lie_are_refused() {
    let one = |info: Value| json!({ "t": info }).to_string();
    let wrapping: Map<String, Value> = (0..9u64)
        .map(|i| {
            // Nine tensors of 2^61 - 1 bytes each: their sum wraps around 2^64.
            let size = (1u64 << 61) - 1;
            let (start, end) = (i.wrapping_mul(size), (i + 1).saturating_mul(size));
            (format!("t{i}"), json!({"dtype": "U8", "shape": [size], "data_offsets": [start, end]}))
        })
        .collect();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["length of the header", "the file has 0"]),
        ("seven bytes", vec![0; 7], &["length of the header", "the file has 7"]),
        ("a header of 2^60", (1u64 << 60).to_le_bytes().to_vec(), &["1152921504606846976"]),
        ("a header of 2^64 - 1", u64::MAX.to_le_bytes().to_vec(), &["18446744073709551615"]),
        (
            "a header beyond the end",
            [&100u64.to_le_bytes()[..], b"{}"].concat(),
            &["the header", "100", "truncated"],
        ),
        ("not JSON", with_header("{\"t\":", &[]), &["JSON"]),
        ("a list", with_header("[]", &[]), &["JSON"]),
        ("not UTF-8", [&4u64.to_le_bytes()[..], b"{\"\xff}"].concat(), &["JSON"]),
        ("a bomb", with_header(&"[".repeat(1 << 20), &[]), &["JSON"]),
        ("no dtype", with_header(&one(json!({"shape": [1], "data_offsets": [0, 1]})), &[0]), &["dtype"]),
        ("no shape", with_header(&one(json!({"dtype": "U8", "data_offsets": [0, 1]})), &[0]), &["shape"]),
        (
            "other dtype",
            with_header(&one(json!({"dtype": "Q9", "shape": [1], "data_offsets": [0, 1]})), &[0]),
            &["Q9"],
        ),
        (
            "a dimension of -1",
            with_header(&one(json!({"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]})), &[0]),
            &["-1"],
        ),
        (
            "elements overflow",
            with_header(
                &one(json!({"dtype": "U8", "shape": [1u64 << 33, 1u64 << 33], "data_offsets": [0, 1]})),
                &[0],
            ),
            &["verflow"],
        ),
        (
            "too long for its shape",
            with_header(&one(json!({"dtype": "U8", "shape": [1], "data_offsets": [0, 2]})), &[0; 2]),
            &["t"],
        ),
        (
            "backwards",
            with_header(&one(json!({"dtype": "U8", "shape": [1], "data_offsets": [1, 0]})), &[0]),
            &["t"],
        ),
        (
            "beyond the end",
            with_header(&one(json!({"dtype": "U8", "shape": [9], "data_offsets": [0, 9]})), &[0; 8]),
            &["9", "8", "truncated"],
        ),
        (
            "more data than tensors",
            with_header(&one(json!({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})), &[0; 2]),
            &["model.safetensors"],
        ),
        (
            "offsets that wrap around",
            with_header(&Value::Object(wrapping).to_string(), &[0; 64]),
            &["offset"],
        ),
        (
            "overlapping",
            with_header(
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                    "b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
                &[0; 3],
            ),
            &["model.safetensors"],
        ),
    ];
    for (name, bytes, parts) in cases {
        let (dir, _) = write_weights(&bytes);
        assert_refused(name, Checkpoint::open(dir.path(), &OpenOptions::default()), parts);
    }
}

#[test]
fn cutting_or_changing_a_file_anywhere_does_no_harm() {
    let bytes = safetensors(&Model::packed().tensors);
    let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let (dir, path) = write_weights(&bytes);
    let open = || Checkpoint::open(dir.path(), &OpenOptions::default());
    open().unwrap().check().unwrap();
    for at in 0..header {
        let mut changed = bytes.clone();
        for byte in [bytes[at] ^ 1, b'9', 0xff] {
            changed[at] = byte;
            std::fs::write(&path, &changed).unwrap();
            if let Ok(checkpoint) = open() {
                let _ = (checkpoint.check(), checkpoint.tensors(), checkpoint.metadata());
            }
        }
    }
    std::fs::write(&path, &bytes).unwrap();
    for length in (0..bytes.len()).rev() {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(length as u64).unwrap();
        assert!(open().is_err(), "{length} of {} bytes accepted", bytes.len());
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]

    #[test]
    fn no_value_of_any_field_does_harm(
        field in 0usize..15,
        value in proptest::prop_oneof![
            Just(json!(null)), Just(json!([])), Just(json!({})), Just(json!("text")), Just(json!(true)),
            any::<i64>().prop_map(|v| json!(v)), any::<f64>().prop_map(|v| json!(v)),
            (0u64..64).prop_map(|b| json!(1u64 << b)), (0i64..20).prop_map(|v| json!(v)),
        ],
    ) {
        let mut model = Model::packed();
        let key = model.config.as_object().unwrap().keys().nth(field).unwrap().clone();
        model = model.set(&key, value);
        let _ = model.open();
    }
}
