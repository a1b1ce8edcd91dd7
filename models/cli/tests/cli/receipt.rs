//! Receipts: written by the program, checked by the program, and edited by hand in between.

use std::path::Path;

use bitnet_burn_engine::receipt::Receipt;
use bitnet_burn_formats::files::sha256;
use serde_json::{Value, json};

use super::{Place, TEMPLATE, plugin};

const RUN: [&str; 12] = [
    "run",
    "-m",
    "model.gguf",
    "-p",
    "Hello",
    "-n",
    "12",
    "--temperature",
    "0.8",
    "--seed",
    "7",
    "--print-ids",
];

impl Place {
    /// Exit status, stdout and stderr of `bitnet receipt check`.
    fn check(&self, args: &[&str]) -> (i32, String, String) {
        let output = self.command(&[&["receipt", "check"][..], args].concat()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let (stdout, stderr) = (text(output.stdout), text(output.stderr));
        assert!(!stderr.contains("panicked"), "{stderr}");
        (output.status.code().unwrap(), stdout, stderr)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// Another receipt, with a seal that holds.
    fn write_sealed(&self, name: &str, receipt: Value) {
        let mut receipt = receipt;
        receipt.as_object_mut().unwrap().remove("sha256");
        let receipt: Receipt = serde_json::from_value(receipt).unwrap();
        self.write(name, receipt.to_text().unwrap());
    }
}

#[test]
fn activations_are_reported_as_they_are_computed() {
    let place = Place::new();
    for (scales, rule, stated, report) in [
        // The rows are of 256 and 768 values.
        ("row", "group:4096", "row", "int8 by rows"),
        ("row", "group:512", "group:512", "int8 by rows, int8 by groups of 512"),
        ("row", "group:96", "group:96", "int8 by groups of 96"),
        ("tensor", "group:4096", "row", "int8 by rows"),
        // Groups of weights allow no larger ones of activations.
        ("group:64", "group:4096", "group:64", "int8 by groups of 64"),
        ("group:64", "group:96", "group:32", "int8 by groups of 32"),
    ] {
        place.ok(&["synth", "--scales", scales, "--intermediate-size", "768", "--out", "m.gguf"]);
        let run = ["run", "-m", "m.gguf", "-p", "Hello", "-n", "8", "--greedy", "--print-ids", "--quiet"];
        let ids = place.ok(&[&run[..], &["--activations", rule, "--receipt", "r.json"]].concat());
        let receipt: Value = serde_json::from_str(&place.read("r.json")).unwrap();
        let what = format!("{scales}, {rule}");
        assert_eq!(receipt["generation"]["activations"], stated, "{what}");
        assert_eq!(receipt["report"]["activations"], report, "{what}");
        // What is stated is what was computed.
        assert_eq!(place.ok(&[&run[..], &["--activations", stated]].concat()), ids, "{what}");
        let (status, stdout, stderr) = place.check(&["r.json", "--rerun"]);
        assert_eq!(status, 0, "{what}: {stdout}{stderr}");
    }
    let call = ["run", "-m", "m.gguf", "-p", "Hello", "--activations", "group:8388608"];
    let output = place.command(&call).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && stderr.contains("8388576 at most"), "{stderr}");
}

#[test]
fn an_answer_of_a_given_form_comes_again() {
    let place = Place::new();
    place.write(
        "schema.json",
        r#"{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}"#,
    );
    let run = ["run", "-m", "model.gguf", "-p", "Hello", "--temperature", "1", "--seed", "2", "--quiet"];
    for (form, valid) in [
        (&["--json-schema", "schema.json"][..], "["),
        (&["--regex", "x[0-9]+y"], "x"),
        (&["--choice", "x yes", "--choice", "x no"], "x "),
    ] {
        let text = place.ok(&[&run[..], form, &["--receipt", "r.json"]].concat());
        assert!(text.starts_with(valid), "{text}");
        assert!(place.read("r.json").contains("\"constraint\": {"));
        let (status, checked, _) = place.check(&["r.json", "--rerun"]);
        assert_eq!(status, 0, "{checked}");
        // By ids, where nothing else needs the tokenizer.
        let ids = place.ok(&[&run[..], form, &["--print-ids"]].concat());
        assert!(ids.split_whitespace().count() > 2, "{ids}");
    }
    // Another form gives other tokens.
    let mut receipt: Value = serde_json::from_str(&place.read("r.json")).unwrap();
    receipt["generation"]["constraint"] = json!({ "regex": "[0-9]{9}" });
    place.write_sealed("other.json", receipt);
    assert_eq!(place.check(&["other.json", "--rerun"]).0, 3);
    // Without one, receipts are as before.
    place.ok(&[&run[..], &["--receipt", "plain.json"]].concat());
    assert!(!place.read("plain.json").contains("constraint"));
}

#[test]
fn a_receipt_says_what_ran_and_the_tokens_come_again() {
    let place = Place::new();
    let ids = place.ok(&[&RUN[..], &["--receipt", "r.json"]].concat());
    let text = place.read("r.json");
    // The seal, as coreutils would check it.
    let before_the_last_two: String =
        text.split_inclusive('\n').rev().skip(2).collect::<Vec<_>>().into_iter().rev().collect();
    let receipt: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(receipt["sha256"], sha256(before_the_last_two.as_bytes()));
    let model = std::fs::read(place.path("model.gguf")).unwrap();
    assert_eq!(
        receipt["model"],
        json!({
            "path": "model.gguf",
            "files": [{"name": "model.gguf", "bytes": model.len(), "sha256": sha256(&model)}],
        })
    );
    assert_eq!(receipt["generation"]["prompt_token_ids"], json!([509, 72, 101, 108, 108, 111]));
    assert_eq!(receipt["generation"]["sampling"]["seed"], 7);
    assert_eq!(receipt["generation"]["result"]["ids_sha256"], sha256(ids.trim_end().as_bytes()));
    assert_eq!(receipt["program"]["arguments"][0], "run");
    for figure in ["prefill_tokens_per_s", "decode_tokens_per_s"] {
        assert!(receipt["report"][figure].as_f64().unwrap() > 0.0, "{figure}");
    }
    assert!(
        receipt["report"]["kernels"].as_array().unwrap().iter().all(|k| k["calls"].as_u64().unwrap() > 0)
    );
    for known in ["cpu", "architecture", "os"] {
        assert!(!receipt["machine"][known].as_str().unwrap().is_empty(), "{known}");
    }
    assert!(receipt["machine"]["memory_bytes"].as_u64().unwrap() > 0);

    let (status, stdout, stderr) = place.check(&["r.json"]);
    assert_eq!(status, 0, "{stdout}{stderr}");
    assert!(stdout.contains("agrees  seal") && stdout.contains("agrees  model model.gguf"), "{stdout}");
    // Other threads, and another kernel.
    for more in [&["--threads", "2"][..], &["--threads", "1", "--kernel", "i2s-scalar"]] {
        let (status, stdout, stderr) = place.check(&[&["r.json", "--rerun", "--json"][..], more].concat());
        assert_eq!(status, 0, "{stdout}{stderr}");
        let report: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(report["passed"], true);
        let checks = report["checks"].as_array().unwrap();
        assert_eq!(checks.last().unwrap(), &json!({"what": "tokens", "outcome": "agrees"}));
    }

    // Tokens that another run would not have: the seal alone can't know.
    let mut other = receipt.clone();
    other["generation"]["sampling"]["seed"] = 8.into();
    place.write_sealed("other.json", other);
    assert_eq!(place.check(&["other.json"]).0, 0);
    let (status, stdout, _) = place.check(&["other.json", "--rerun"]);
    assert_eq!(status, 3, "{stdout}");
    let expected = format!(
        "expected: 12 tokens, sha256 of their ids {}",
        receipt["generation"]["result"]["ids_sha256"].as_str().unwrap()
    );
    assert!(
        stdout.contains("DIFFERS") && stdout.contains(&expected) && stdout.contains("found:    "),
        "{stdout}"
    );

    // A figure that was made better.
    let better = text.replace("\"finish\": \"length\"", "\"finish\": \"context\"");
    assert_ne!(better, text);
    place.write("better.json", better);
    let (status, stdout, _) = place.check(&["better.json"]);
    assert_eq!(status, 3);
    assert!(stdout.contains(&format!("expected: {}", receipt["sha256"].as_str().unwrap())), "{stdout}");
    assert!(stdout.contains("changed after it was written"), "{stdout}");
    // Nothing may stand behind the seal, and the layout is a part of it.
    place.write("behind.json", format!("{text} "));
    assert_eq!(place.check(&["behind.json"]).0, 3);
    place.write("compact.json", receipt.to_string());
    assert_eq!(place.check(&["compact.json"]).0, 3);
}

#[test]
fn stop_strings_and_the_built_in_model_come_again_too() {
    let place = Place::new();
    let text = place.json(&["run", "-m", "model.gguf", "-p", "Hello", "-n", "16", "--ignore-eos", "--json"]);
    let text = text["text"].as_str().unwrap().to_owned();
    let stop = text.chars().nth(text.chars().count() / 2).unwrap().to_string();
    place.ok(&[
        "run",
        "-m",
        "model.gguf",
        "-p",
        "Hello",
        "-n",
        "16",
        "--ignore-eos",
        "--stop",
        &stop,
        "--receipt",
        "r.json",
    ]);
    let receipt: Value = serde_json::from_str(&place.read("r.json")).unwrap();
    assert_eq!(receipt["generation"]["result"]["finish"], "stop_string");
    let (status, stdout, stderr) = place.check(&["r.json", "--rerun"]);
    assert_eq!(status, 0, "{stdout}{stderr}");

    if cfg!(feature = "default-model") {
        place.ok(&["run", "-n", "20", "--receipt", "story.json"]);
        let (status, stdout, stderr) = place.check(&["story.json", "--rerun"]);
        assert_eq!(status, 0, "{stdout}{stderr}");
        assert!(stdout.contains("agrees  model (built-in) stories"), "{stdout}");
    }
}

#[test]
fn another_model_is_named_with_both_hashes() {
    let place = Place::new();
    place.ok(&[&RUN[..], &["--receipt", "r.json"]].concat());
    std::fs::rename(place.path("model.gguf"), place.path("renamed.gguf")).unwrap();
    let (status, stdout, _) = place.check(&["r.json"]);
    assert_eq!(status, 1, "{stdout}");
    assert!(stdout.contains("unchecked  model model.gguf") && stdout.contains("--model names"), "{stdout}");
    assert_eq!(place.check(&["r.json", "--model", "renamed.gguf", "--rerun"]).0, 0);

    // The last byte is padding: the file opens, and the weights are the same.
    let mut bytes = std::fs::read(place.path("renamed.gguf")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    place.write("model.gguf", &bytes);
    let (status, stdout, _) = place.check(&["r.json", "--rerun"]);
    assert_eq!(status, 3, "{stdout}");
    for part in ["DIFFERS", &sha256(&bytes), "expected: ", "not generated again"] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }

    // A directory: each of its files, and no others.
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/testdata/golden/hf/A-packed-auto");
    std::fs::create_dir(place.path("hf")).unwrap();
    for entry in std::fs::read_dir(source).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), place.path("hf").join(entry.file_name())).unwrap();
    }
    place.write("ids.txt", "1 2 3");
    place.ok(&[
        "run",
        "-m",
        "hf",
        "--tokens-file",
        "ids.txt",
        "-n",
        "4",
        "--print-ids",
        "--receipt",
        "hf.json",
    ]);
    let receipt: Value = serde_json::from_str(&place.read("hf.json")).unwrap();
    let names: Vec<_> =
        receipt["model"]["files"].as_array().unwrap().iter().map(|f| f["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"config.json") && names.contains(&"model.safetensors"), "{names:?}");
    assert_eq!(place.check(&["hf.json", "--rerun"]).0, 0);
    place.write("hf/chat_template.jinja", "{{ messages }}");
    let (status, stdout, _) = place.check(&["hf.json"]);
    assert_eq!(status, 3, "{stdout}");
    assert!(stdout.contains("DIFFERS  model chat_template.jinja"), "{stdout}");
}

#[test]
fn plugins_are_known_by_their_hash_and_not_loaded() {
    let place = Place::new();
    if !plugin(&place, "good.so", TEMPLATE, &[]) {
        return;
    }
    let with = ["--plugin", "good.so", "--kernel", "example-c/portable", "--receipt", "r.json"];
    place.ok(&[&RUN[..], &with].concat());
    let (status, stdout, _) = place.check(&["r.json", "--rerun"]);
    assert_eq!(status, 0, "{stdout}");
    assert!(stdout.contains("agrees  plugin example-c"), "{stdout}");
    let bytes = std::fs::read(place.path("good.so")).unwrap();
    std::fs::rename(place.path("good.so"), place.path("moved.so")).unwrap();
    assert_eq!(place.check(&["r.json"]).0, 1);
    assert_eq!(place.check(&["r.json", "--plugin", "moved.so"]).0, 0);
    place.write("good.so", "something else");
    let (status, stdout, _) = place.check(&["r.json"]);
    assert_eq!(status, 3);
    assert!(stdout.contains(&sha256(&bytes)) && stdout.contains(&sha256(b"something else")), "{stdout}");
}

#[test]
fn whatever_measures_writes_receipts() {
    let place = Place::new();
    place.write("text.txt", "The quick brown fox jumps over the lazy dog.\n");
    let calls: [&[&str]; 3] = [
        &["bench", "-m", "model.gguf", "-p", "8", "-n", "2", "--repetitions", "1"],
        &["perplexity", "-m", "model.gguf", "-f", "text.txt"],
        &["logits", "-m", "model.gguf", "--tokens-file", "ids.txt", "--out", "x.npy"],
    ];
    for (call, figure) in calls.into_iter().zip(["/decode_tokens_per_s/median", "/perplexity", "/shape/0"]) {
        place.ok(&[call, &["--receipt", "r.json"]].concat());
        let receipt: Value = serde_json::from_str(&place.read("r.json")).unwrap();
        assert_eq!(receipt["program"]["command"], call[0]);
        assert!(receipt["report"].pointer(figure).is_some(), "{figure}");
        let (status, stdout, stderr) = place.check(&["r.json"]);
        assert_eq!(status, 0, "{stdout}{stderr}");
    }
    let (status, _, stderr) = place.check(&["r.json", "--rerun"]);
    assert_eq!(status, 1);
    assert!(stderr.contains("a receipt of `logits`, which generated no tokens"), "{stderr}");
    // A kernel that this build lacks.
    let mut receipt: Value = serde_json::from_str(&place.read("r.json")).unwrap();
    receipt["report"]["kernels"][0]["kernel"] = "cpu/of-tomorrow".into();
    place.write_sealed("tomorrow.json", receipt);
    let (status, stdout, _) = place.check(&["tomorrow.json"]);
    assert_eq!(status, 3);
    assert!(
        stdout.contains("kernel cpu/of-tomorrow") && stdout.contains("no kernel of this name"),
        "{stdout}"
    );
}

#[test]
fn hostile_receipts_are_errors() {
    let place = Place::new();
    place.ok(&[&RUN[..], &["--receipt", "r.json"]].concat());
    let receipt: Value = serde_json::from_str(&place.read("r.json")).unwrap();
    let set = |pointer: &str, value: Value| {
        let mut receipt = receipt.clone();
        *receipt.pointer_mut(pointer).unwrap() = value;
        receipt.to_string()
    };
    let without = |parent: &str, key: &str| {
        let mut receipt = receipt.clone();
        receipt.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(key).unwrap();
        receipt.to_string()
    };
    let cases = [
        (String::new(), "EOF"),
        ("null".into(), "invalid type: null"),
        ("[".repeat(100_000), "not a receipt"),
        (
            format!("{{\"bitnet_receipt\": 1, \"x\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000)),
            "recursion limit",
        ),
        ("{}".into(), "missing field `bitnet_receipt`"),
        (set("/bitnet_receipt", 2.into()), "version 2, and this program reads version 1"),
        (set("/bitnet_receipt", json!("1")), "invalid type: string"),
        (set("/unix_time", json!(-1)), "-1"),
        (set("/model", json!(7)), "invalid type"),
        (set("/model/files/0/bytes", json!(1e300)), "1e+300"),
        (set("/generation/prompt_token_ids", json!([4294967296u64])), "4294967296"),
        (set("/generation/result/finish", json!("tired")), "unknown variant `tired`"),
        (set("/report/kernels", json!({})), "expected a sequence"),
        (without("", "sha256"), "missing field `sha256`"),
        (without("", "model"), "missing field `model`"),
        (without("/report", "kernels"), "missing field `kernels`"),
        (without("/generation", "stop_tokens"), "missing field `stop_tokens`"),
        (set("/machine", json!({"cpu": "x", "mood": 1})), "unknown field `mood`"),
        (" ".repeat((16 << 20) + 1), "more than 16777216 bytes"),
    ];
    for (content, expected) in cases {
        place.write("hostile.json", &content);
        let (status, _, stderr) = place.check(&["hostile.json"]);
        assert_eq!(status, 1, "{expected}: {stderr}");
        assert!(stderr.contains("hostile.json") && stderr.contains(expected), "{expected}: {stderr}");
    }
    place.write("hostile.json", [0xff, 0xfe]);
    assert!(place.check(&["hostile.json"]).2.contains("not text"));
    assert!(place.check(&["missing.json"]).2.contains("missing.json"));

    // Well-formed, sealed, and absurd: no more than what the same flags of `run` can do.
    let set = |changes: &[(&str, Value)]| {
        let mut receipt = receipt.clone();
        for (pointer, value) in changes {
            *receipt.pointer_mut(pointer).unwrap() = value.clone();
        }
        place.write_sealed("absurd.json", receipt);
        place.check(&["absurd.json", "--rerun"])
    };
    for (pointer, value, expected) in [
        ("/generation/prompt_token_ids", json!([4_000_000_000u32]), "token 4000000000 is not"),
        ("/generation/prompt_token_ids", json!([]), "no tokens"),
        ("/generation/prompt_token_ids", json!(vec![1; 600]), "600 tokens"),
        ("/generation/context", json!(u64::MAX), "trained for 512"),
        ("/generation/sampling/temperature", json!(-1), "temperature is -1"),
        ("/report/device", json!("abacus"), "\"abacus\""),
    ] {
        let (status, stdout, stderr) = set(&[(pointer, value)]);
        assert_eq!(status, 1, "{pointer}: {stdout}{stderr}");
        assert!(stderr.contains(expected), "{pointer}: {stderr}");
    }
    // Limits that say nothing: the tokens that end at the context, and a chunk as long as the prompt.
    let (status, ..) = set(&[("/generation/chunk", json!(u64::MAX))]);
    assert_eq!(status, 0);
    let (status, ..) =
        set(&[("/generation/max_new_tokens", json!(u64::MAX)), ("/generation/context", json!(12))]);
    assert_eq!(status, 3);
    // Names in it don't reach the terminal as they are.
    let (_, stdout, _) = set(&[("/machine/cpu", json!("\u{1b}[31mred\u{7}"))]);
    assert!(
        !stdout.contains('\u{1b}') && !stdout.contains('\u{7}') && stdout.contains("[31mred"),
        "{stdout}"
    );
}
