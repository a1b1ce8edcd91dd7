//! `bitnet compare`: what it prints, and what it refuses.

use std::process::Output;

use serde_json::Value;

use super::Place;

const KEYS: [&str; 7] =
    ["correlation", "mse", "max_abs_error", "mean_abs_error", "kl_mean", "top1_agreement", "top5_agreement"];

fn compared(place: &Place, more: &[&str]) -> Value {
    place.json(&[&["compare", "model.gguf"], more, &["--tokens-file", "ids.txt", "--json"]].concat())
}

/// A NumPy file of version 1.
fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend([header.as_bytes(), data].concat());
    bytes
}

#[test]
fn models_files_and_settings_are_compared() {
    let place = Place::new();
    place.ok(&["logits", "-m", "model.gguf", "--tokens-file", "ids.txt", "--out", "logits.npy"]);
    let same = compared(&place, &["logits.npy"]);
    for (key, expected) in KEYS.into_iter().zip([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]) {
        assert_eq!(same[key].as_f64(), Some(expected), "{key}: {same}");
    }
    assert_eq!((&same["positions"], &same["vocabulary"]), (&8.into(), &512.into()));
    assert_eq!((&same["a"]["kind"], &same["b"]["kind"]), (&"model".into(), &"logits".into()));
    assert!(same["perplexity_a"].as_f64().unwrap() > 1.0 && same["perplexity_a"] == same["perplexity_b"]);
    assert_eq!((&same["parting"], &same["layers"]), (&Value::Null, &Value::Null));

    // The file is the reference, and so is its text in another type, with a batch in front.
    let (_, logits) = super::npy(&place.path("logits.npy"));
    let f64s: Vec<u8> = logits.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect();
    place.write("f64.npy", npy("<f8", "(1, 8, 512)", &f64s));
    let files = place.json(&["compare", "f64.npy", "logits.npy", "--json"]);
    assert_eq!((&files["mse"], &files["perplexity_a"]), (&0.0.into(), &Value::Null));

    let float = compared(&place, &["model.gguf", "--b-activations", "float"]);
    assert!(float["mse"].as_f64().unwrap() > 0.0 && float["correlation"].as_f64().unwrap() > 0.99, "{float}");
    assert_eq!(
        (&float["a"]["activations"], &float["b"]["activations"]),
        (&"int8 by rows".into(), &"f32".into())
    );
    assert_eq!(
        (&float["layers"]["first"]["part"], &float["layers"]["different"]),
        (&"q_proj".into(), &1.into())
    );
    let head = compared(&place, &["model.gguf", "--b-lm-head", "q4_0", "--b-kv-cache", "f32"]);
    assert_eq!(head["layers"]["first"]["part"], "lm_head");
    assert!(head["b"]["lm_head"].as_str().unwrap().contains("Q4_0"), "{head}");
    let kernel = compared(&place, &["model.gguf", "--b-kernel", "i2s-scalar"]);
    assert_eq!((&kernel["max_abs_error"], &kernel["b"]["kind"]), (&0.0.into(), &"process".into()));
    assert_eq!(kernel["layers_absent"], "another process computed B");

    // A text, by the model's tokenizer.
    place.write("text.txt", "Hello world, and all that is in it.");
    let text = place.json(&[
        "compare",
        "model.gguf",
        "model.gguf",
        "--text",
        "text.txt",
        "--max-tokens",
        "9",
        "--json",
    ]);
    assert_eq!((&text["positions"], &text["layers"]["same"]), (&9.into(), &9.into()));
    let shown = place.ok(&["compare", "model.gguf", "logits.npy", "--tokens-file", "ids.txt"]);
    for part in ["correlation", "KL divergence", "same top 5", "perplexity", "they part", "not compared"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

#[test]
fn limits_decide_the_exit_status() {
    let place = Place::new();
    let run = |limits: &str, more: &[&str]| -> Output {
        let call =
            ["compare", "model.gguf", "model.gguf", "--tokens-file", "ids.txt", "--b-activations", "float"];
        place.command(&[&call[..], &["--tolerance", limits], more].concat()).output().unwrap()
    };
    let kept = run("correlation>=0.99,kl_mean<=1", &["--json"]);
    assert_eq!(kept.status.code(), Some(0));
    let report = super::json(std::str::from_utf8(&kept.stdout).unwrap());
    assert_eq!(report["within_tolerance"], true);
    let broken = run("correlation>=0.99,mse<=0", &["--json"]);
    assert_eq!(broken.status.code(), Some(3));
    let report = super::json(std::str::from_utf8(&broken.stdout).unwrap());
    assert_eq!(report["within_tolerance"], false);
    let verdicts = report["tolerance"].as_array().unwrap();
    assert_eq!((&verdicts[0]["kept"], &verdicts[1]["kept"]), (&true.into(), &false.into()));
    assert_eq!((&verdicts[1]["limit"], &verdicts[1]["found"]), (&"mse<=0".into(), &report["mse"]));
    let shown = run("mse<=0", &[]);
    assert_eq!(shown.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&shown.stdout).contains("mse<=0: BROKEN"));
    for wrong in ["mse", "error<=1", "mse<=x"] {
        assert_eq!(run(wrong, &[]).status.code(), Some(2), "{wrong}");
    }
}

#[test]
fn what_can_not_be_compared_is_named() {
    let place = Place::new();
    place.ok(&["logits", "-m", "model.gguf", "--tokens-file", "ids.txt", "--out", "logits.npy"]);
    let (_, logits) = super::npy(&place.path("logits.npy"));
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut nan = logits.clone();
    nan[3 * 512 + 17] = f32::NAN;
    place.write("nan.npy", npy("<f4", "(8, 512)", &bytes(&nan)));
    place.write("short.npy", npy("<f4", "(7, 512)", &bytes(&logits[..7 * 512])));
    place.write("narrow.npy", npy("<f4", "(8, 256)", &bytes(&logits[..8 * 256])));
    place.write("truncated.npy", npy("<f4", "(8, 512)", &bytes(&logits[..8 * 512 - 1])));
    place.write("none.npy", npy("<f4", "(0, 512)", &[]));
    place.write("empty.npy", []);
    place.write("huge.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff");
    place.write("huge.safetensors", u64::MAX.to_le_bytes());
    place.write("ids-none.txt", " ");
    for (file, expected) in [
        ("nan.npy", "the logit of token 17 at position 3 is NaN"),
        ("short.npy", "short.npy has the logits of 7 positions, and 8 are compared"),
        ("narrow.npy", "model.gguf has 512 logits a position, and narrow.npy has 256"),
        ("truncated.npy", "needs 16384 bytes behind the header, and there are 16380"),
        ("none.npy", "it is empty"),
        ("empty.npy", "does not begin with"),
        ("huge.npy", "its header has 4294967295 bytes"),
        ("huge.safetensors", "the length of the header"),
        ("missing.npy", "missing.npy"),
        ("missing.gguf", "missing.gguf"),
    ] {
        let stderr = place.error(&["compare", "model.gguf", file, "--tokens-file", "ids.txt"]);
        assert!(stderr.contains(expected), "{file}: {stderr}");
    }
    let error = |args: &[&str]| place.error(&[&["compare"], args].concat());
    assert!(error(&["model.gguf", "logits.npy"]).contains("--tokens-file, or a text with --text"));
    assert!(error(&["logits.npy", "logits.npy", "--text", "ids.txt"]).contains("--text needs a model"));
    let ids = ["--tokens-file", "ids.txt"];
    let of_file = error(&[&["model.gguf", "logits.npy", "--b-lm-head", "int8"], &ids[..]].concat());
    assert!(of_file.contains("--b-lm-head is a setting of a model"), "{of_file}");
    let kernel = error(&[&["model.gguf", "model.gguf", "--b-kernel", "no-such"], &ids[..]].concat());
    assert!(kernel.contains("no-such") && kernel.contains("the process that computes B"), "{kernel}");
    assert!(error(&["model.gguf", "logits.npy", "--tokens-file", "ids-none.txt"]).contains("no token ids"));
    // Two models with other tokens.
    place.ok(&["synth", "--shape", "tiny", "--vocab-size", "600", "--out", "other.gguf"]);
    let stderr = error(&[&["model.gguf", "other.gguf"], &ids[..]].concat());
    assert!(stderr.contains("the vocabularies differ: model.gguf has 512"), "{stderr}");
    place.write("long.txt", "1 ".repeat(5000));
    let stderr = error(&["model.gguf", "model.gguf", "--tokens-file", "long.txt"]);
    assert!(stderr.contains("5000 tokens do not fit") && stderr.contains("--max-tokens"), "{stderr}");
}
