//! `bitnet embed`, as its users and other programs see it.

use std::io::Write as _;
use std::process::Stdio;

use serde_json::{Value, json};

use super::{Place, npy};

const TEXTS: [&str; 3] = ["--", "Hello world", "-dash"];

fn numbers(text: &str) -> Vec<Vec<f32>> {
    text.lines().map(|line| line.split(' ').map(|value| value.parse().unwrap()).collect()).collect()
}

fn values(report: &Value) -> Vec<Vec<f32>> {
    let vectors = report["embeddings"].as_array().unwrap().iter();
    vectors.map(|vector| serde_json::from_value(vector["values"].clone()).unwrap()).collect()
}

/// The vectors that a call prints, of a model in a place.
fn embed(place: &Place, model: &str, more: &[&str]) -> Vec<Vec<f32>> {
    numbers(&place.ok(&[&["embed", "-m", model], more].concat()))
}

#[test]
fn lines_json_and_numpy_hold_the_same_vectors() {
    let place = Place::new();
    let call = |more: &[&str]| embed(&place, "model.gguf", &[more, &TEXTS].concat());
    let vectors = call(&[]);
    assert_eq!((vectors.len(), vectors[0].len()), (2, 256));
    assert_ne!(vectors[0], vectors[1]);
    for vector in &vectors {
        let norm: f64 = vector.iter().map(|&value| f64::from(value).powi(2)).sum();
        assert!((norm - 1.0).abs() < 1e-6, "{norm}");
    }
    // The same bits, whatever computes together.
    for more in [["--threads", "1", "--chunk", "1"], ["--threads", "2", "--chunk", "3"]] {
        assert_eq!(call(&more), vectors, "{more:?}");
    }
    assert_ne!(call(&["--no-normalise"]), vectors);
    let mean = call(&["--pooling", "mean"]);
    assert_ne!(mean, vectors);

    let json = place.json(&[&["embed", "-m", "model.gguf", "--json"][..], &TEXTS].concat());
    assert_eq!(values(&json), vectors);
    assert_eq!(
        (&json["pooling"], &json["normalised"], &json["dimensions"]),
        (&"last".into(), &true.into(), &256.into())
    );
    assert_eq!(json["reference_calls"], 0);
    assert!(!json["kernels"].as_array().unwrap().is_empty());
    place.ok(&[&["embed", "-m", "model.gguf", "--out", "vectors.npy"][..], &TEXTS].concat());
    assert_eq!(npy(&place.path("vectors.npy")), ("(2, 256)".into(), vectors.concat()));

    // A text on each line of a file, or of stdin.
    place.write("texts.txt", TEXTS[1..].join("\n"));
    assert_eq!(embed(&place, "model.gguf", &["--file", "texts.txt"]), vectors);
    let mut child = place
        .command(&["embed", "-m", "model.gguf"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(TEXTS[1..].join("\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(numbers(std::str::from_utf8(&output.stdout).unwrap()), vectors);

    let stderr = place.error(&["embed", "-m", "model.gguf", "--prompt-name", "query", "x"]);
    assert!(stderr.contains("no prompt named \"query\""), "{stderr}");
    let stderr = place.error(&["embed", "-m", "model.gguf", "--context", "4", "x", "Hello, long world"]);
    assert!(stderr.contains("text 2: it has") && stderr.contains("the context 4"), "{stderr}");
    assert!(place.error(&["embed", "-m", "model.gguf"]).contains("no text"));
    // Flags may stand behind a text, and are no texts.
    assert_eq!(embed(&place, "model.gguf", &["Hello world", "--pooling", "mean"]), mean[..1]);
    let refused = place.command(&["embed", "-m", "model.gguf", "x", "--bogus"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("--bogus"));
}

#[test]
fn the_files_of_a_directory_say_how_texts_become_vectors() {
    let place = Place::new();
    place.ok(&["convert", "model.gguf", "--to", "hf", "--out", "model"]);
    let plain = ["--pooling", "mean"];
    let expected = embed(&place, "model", &[&plain[..], &TEXTS].concat());
    let prefixed: Vec<String> =
        TEXTS[1..].iter().map(|text| format!("Instruct: find\nQuery: {text}")).collect();
    let prefixed = embed(&place, "model", &["--pooling", "mean", &prefixed[0], &prefixed[1]]);
    let instruction = ["--pooling", "mean", "--instruction", "find"];
    assert_eq!(embed(&place, "model", &[&instruction[..], &TEXTS].concat()), prefixed);

    // As Qwen3-Embedding's files, but for the mean.
    std::fs::create_dir(place.path("model/1_Pooling")).unwrap();
    let module = |name: &str, path: &str| json!({"path": path, "type": format!("sentence_transformers.models.{name}")});
    let modules = json!([
        module("Transformer", ""),
        module("Pooling", "1_Pooling"),
        module("Normalize", "2_Normalize")
    ]);
    place.write("model/modules.json", modules.to_string());
    place.write(
        "model/1_Pooling/config.json",
        r#"{"pooling_mode_mean_tokens": true, "include_prompt": true}"#,
    );
    let prompts =
        r#"{"prompts": {"query": "Instruct: find\nQuery: ", "document": ""}, "default_prompt_name": null}"#;
    place.write("model/config_sentence_transformers.json", prompts);
    assert_eq!(embed(&place, "model", &TEXTS), expected);
    assert_eq!(embed(&place, "model", &[&["--prompt-name", "query"][..], &TEXTS].concat()), prefixed);
    assert_eq!(embed(&place, "model", &[&["--prompt-name", "document"][..], &TEXTS].concat()), expected);
    place.write(
        "model/1_Pooling/config.json",
        r#"{"pooling_mode_mean_tokens": true, "include_prompt": false}"#,
    );
    let stderr = place.error(&["embed", "-m", "model", "--prompt-name", "query", "x"]);
    assert!(stderr.contains("include_prompt"), "{stderr}");
    place.write("model/1_Pooling/config.json", r#"{"pooling_mode_cls_token": true}"#);
    let stderr = place.error(&["embed", "-m", "model", "x"]);
    assert!(stderr.contains("cls_token") && stderr.contains("--pooling"), "{stderr}");
    assert_eq!(embed(&place, "model", &[&plain[..], &TEXTS].concat()), expected);

    // A tokenizer that ends each text.
    let path = place.path("model/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let id = tokenizer["added_tokens"][0]["id"].clone();
    let token = tokenizer["added_tokens"][0]["content"].clone();
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 0}}],
        "pair": [],
        "special_tokens": {token.as_str().unwrap(): {"id": token, "ids": [id], "tokens": [token]}},
    });
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let ids = place.ok(&["tokenize", "-m", "model", "Hello"]);
    assert!(ids.trim_end().ends_with(&format!(" {id}")), "{ids} {id}");
    let report = place.json(&["embed", "-m", "model", "--pooling", "last", "--json", "Hello", ""]);
    assert_eq!(report["embeddings"][0]["tokens"], ids.split_whitespace().count());
    // Even no text at all.
    assert_eq!(report["embeddings"][1]["tokens"], 1);
}

#[test]
fn a_model_that_was_saved_without_its_output_projection_loads() {
    let place = Place::new();
    place.ok(&["convert", "model.gguf", "--to", "hf", "--out", "model"]);
    let expected = embed(&place, "model", &TEXTS);
    let path = place.path("model/model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    // `model.` becomes spaces outside of the names, so that the header keeps its length.
    let text = String::from_utf8(bytes[8..8 + header].to_vec()).unwrap().replace("\"model.", "      \"");
    std::fs::write(&path, [&bytes[..8], text.as_bytes(), &bytes[8 + header..]].concat()).unwrap();
    assert_eq!(embed(&place, "model", &TEXTS), expected);
    let config = place.path("model/config.json");
    let text = std::fs::read_to_string(&config)
        .unwrap()
        .replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    std::fs::write(&config, text).unwrap();
    let output = place.command(&[&["embed", "-m", "model"][..], &TEXTS].concat()).output().unwrap();
    assert_eq!(numbers(std::str::from_utf8(&output.stdout).unwrap()), expected);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("without an output projection"), "{stderr}");
}
