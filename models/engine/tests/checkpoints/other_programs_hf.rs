//! Hugging Face directories as other programs write them: what is read although it looks otherwise, and
//! errors that lead to a model that opens.

use bitnet_burn::{Norm, Projection};
use serde_json::{Value, json};

use crate::hf::*;

#[test]
fn rope_that_is_scaled_by_1_is_accepted() {
    let plain = Model::packed().open().unwrap().checkpoint.config().clone();
    for rope in [
        json!({"type": "linear", "factor": 1.0}),
        json!({"rope_type": "linear", "factor": 1}),
        json!({"rope_type": "yarn", "factor": 1.0, "beta_fast": 16, "attention_factor": null}),
        json!({"rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        json!({"rope_type": "default", "factor": 4.0}),
    ] {
        let opened = Model::packed().set("rope_scaling", rope.clone()).open().unwrap();
        assert_eq!(opened.checkpoint.config(), &plain, "{rope}");
        assert_eq!(opened.checkpoint.warnings(), &[] as &[String]);
    }
}

/// Of 1bitLLM's models: a Llama's configuration, other names for the sub-norms, no `quantization_config`.
fn one_bit_llm() -> Model {
    let mut model = Model::online().set("model_type", json!("llama")).without("quantization_config");
    model.config["weight_bits"] = json!(1);
    model.config["input_bits"] = json!(8);
    for (name, _, _, data) in &mut model.tensors {
        let older = name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm");
        if *name != older {
            // Values of their own, so that none passes for another.
            *data = data.chunks(4).enumerate().flat_map(|(i, _)| (1.0 + i as f32).to_le_bytes()).collect();
            *name = older;
        }
    }
    model
}

#[test]
fn the_models_of_1bitllm_are_read() {
    let renamed = Model::online().open().unwrap();
    let opened = one_bit_llm().open().unwrap();
    let (ours, theirs) = (&opened.checkpoint, &renamed.checkpoint);
    assert_eq!(ours.warnings(), &[] as &[String]);
    assert!(ours.config().sub_norms);
    for which in Projection::ALL {
        let [a, b] = [ours, theirs].map(|c| c.projection(0, which).unwrap());
        assert_eq!((a.codes, a.scale, a.stored_as), (b.codes, b.scale, b.stored_as));
    }
    assert_eq!(ours.norm(Norm::AttentionSub(0)).unwrap(), (1..=8).map(|i| i as f32).collect::<Vec<_>>());
    assert_eq!(ours.norm(Norm::FeedForwardSub(0)).unwrap(), (1..=12).map(|i| i as f32).collect::<Vec<_>>());
    for (bits, value) in [("weight_bits", 2), ("input_bits", 4)] {
        let other = one_bit_llm().set(bits, json!(value));
        assert_refused(bits, other.open(), &[bits, &value.to_string(), "supported"]);
    }
    // Both names for one norm.
    let both = one_bit_llm().tensor("model.layers.0.mlp.ffn_sub_norm.weight", "F32", &[12], f32s(&[1.0; 12]));
    assert_refused("both names", both.open(), &["ffn_layernorm", "has no such tensor"]);
}

/// What an error says to add makes the model open: nothing else is found wrong after that.
#[test]
fn hints_do_not_lead_to_another_refusal() {
    let quoted = |error: &str, nth: usize| -> Value {
        let start = error.match_indices('{').nth(nth).unwrap().0;
        let end = start + error[start..].find('}').unwrap();
        serde_json::from_str(&error[start..=end]).unwrap()
    };
    let refusal = |model: &Model| model.open().err().unwrap().to_string();
    for (model, hints) in [(Model::packed(), 2), (Model::online(), 1)] {
        let model = model.without("quantization_config");
        let error = refusal(&model);
        for nth in 0..hints {
            let added = Model { config: model.config.clone(), tensors: model.tensors.clone() }
                .set("quantization_config", quoted(&error, nth));
            added.open().unwrap();
        }
    }
    // Where nothing that could be added would help, that is said first.
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let online = || Model::online().without("quantization_config");
    let prefixed = |prefix: &str| {
        let mut model = online();
        model.tensors.iter_mut().for_each(|tensor| tensor.0.insert_str(0, prefix));
        model
    };
    const NORM: &str = "model.layers.0.self_attn.q_norm.weight";
    let mut fused = online().drop(Q);
    fused.tensors.push((
        "model.layers.0.self_attn.qkv_proj.weight".into(),
        "F32",
        vec![16, 8],
        f32s(&[0.5; 128]),
    ));
    let cases: Vec<(&str, Model, &[&str])> = vec![
        ("DataParallel", prefixed("module."), &["is missing; `module.model.", "prefix `module.`"]),
        ("torch.compile", prefixed("_orig_mod."), &["prefix `_orig_mod.`", "model._orig_mod"]),
        ("fused", fused, &[Q, "is missing", "qkv_proj.weight` is there", "split its rows"]),
        ("another model", online().tensor(NORM, "F32", &[4], f32s(&[1.0; 4])), &[NORM, "has no such tensor"]),
    ];
    for (name, model, parts) in cases {
        assert_refused(name, model.open(), parts);
        let error = refusal(&model);
        assert!(!error.contains("quantization_config"), "{name}: {error}");
    }
}
