//! `bitnet plan`.

use std::path::Path;

use serde_json::Value;

use super::Place;

fn machine(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/testdata/machines").join(name);
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_plan_is_told_in_words_and_in_json() {
    let place = Place::new();
    let desktop = machine("desktop-16-cores.json");
    let text = place.ok(&["plan", "-m", "model.gguf", "--machine", &desktop]);
    for expected in [
        "plan         the CPU alone (strategy performance)",
        "threads      16",
        "16 threads for 16 physical cores",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    let json: Value =
        serde_json::from_str(&place.ok(&["plan", "-m", "model.gguf", "--machine", &desktop, "--json"]))
            .unwrap();
    assert_eq!((&json["kind"], &json["threads"]), (&"cpu_only".into(), &16.into()));
    assert!(json["prediction"]["decode_tokens_per_s"].as_f64().unwrap() > 0.0, "{json}");
    assert!(json["memory"][0]["weights"].as_u64().unwrap() > 0 && json["fits"] == true, "{json}");
    assert_eq!(json["machine"]["cpu"]["physical_cores"], 16);

    let gpu = machine("gpu-8gb.json");
    let hybrid =
        place.ok(&["plan", "-m", "model.gguf", "--machine", &gpu, "--gpu-layers", "1", "--threads", "2"]);
    assert!(
        hybrid.contains("layer 0 on wgpu:0") && hybrid.contains("1 layer on wgpu:0, as requested"),
        "{hybrid}"
    );
}

#[test]
fn what_does_not_fit_has_an_exit_status_and_what_is_wrong_is_named() {
    let place = Place::new();
    let desktop = machine("desktop-16-cores.json");
    let with = |more: &[&str]| {
        let args = [&["plan", "-m", "model.gguf", "--machine", &desktop], more].concat();
        let output = place.command(&args).output().unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.code(), text)
    };
    let (status, text) = with(&["--memory", "10kB"]);
    assert!(
        status == Some(3) && text.contains("IT DOES NOT FIT") && text.contains("the limit is 10.0 kB"),
        "{text}"
    );
    for (more, status, expected) in [
        (&["--device", "cuda"][..], 1, "there is no device cuda; this machine has cpu"),
        (&["--gpu-layers", "1"], 1, "this build finds no usable GPU"),
        (&["--memory", "3 apples"], 2, "apples is not a unit of size"),
        (&["--context", "100000"], 1, "the context is 100000"),
    ] {
        let (code, text) = with(more);
        assert!(code == Some(status) && text.contains(expected), "{more:?}: {code:?} {text}");
    }
    place.write("machine.json", "{\"cpu\": 3}");
    let output = place.command(&["plan", "-m", "model.gguf", "--machine", "machine.json"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(1) && text.contains("machine.json: not a machine profile"),
        "{text}"
    );
}

#[test]
fn this_machine_is_described_and_planned_for_elsewhere() {
    let place = Place::new();
    let here = place.ok(&["plan", "--print-machine", "--measure", "nothing"]);
    place.write("here.json", &here);
    let there = place.ok(&["plan", "-m", "model.gguf", "--machine", "here.json", "--json"]);
    let json: Value = serde_json::from_str(&there).unwrap();
    assert_eq!((&json["tier"], &json["kind"]), (&"unknown".into(), &"cpu_only".into()), "{json}");
}

#[test]
fn a_run_follows_a_plan_and_says_what_was_predicted() {
    let place = Place::new();
    let call = ["run", "-m", "model.gguf", "--tokens-file", "ids.txt", "--greedy", "-n", "6", "--json"];
    let plain = place.json(&call);
    // Nothing was measured yet.
    assert!(plain["prediction"].is_null() && plain["placement"].is_null(), "{plain}");
    let auto = place.json(&[&call[..], &["--device", "auto"]].concat());
    assert_eq!(auto["token_ids"], plain["token_ids"]);
    assert_eq!(auto["device"], "flex");
    let comparison = &auto["prediction"]["decode"];
    for key in ["predicted", "measured", "ratio"] {
        assert!(comparison[key].as_f64().unwrap() > 0.0, "{auto}");
    }
    // What is measured is the same, wherever it is.
    place.write("long.txt", "72 101 ".repeat(40));
    let perplexity = ["perplexity", "-m", "model.gguf", "--tokens-file", "long.txt", "--json"];
    let measured = place.json(&[&perplexity[..], &["--device", "auto"]].concat());
    assert_eq!(measured["context"], 512);
    assert_eq!(measured["perplexity"], place.json(&perplexity)["perplexity"]);
    // The receipt has the rows that the plan chose.
    let planned = place.json(&["plan", "-m", "model.gguf", "--json"]);
    for (more, rows) in [(&[][..], planned["rows"].as_u64().unwrap()), (&["--chunk", "3"], 3)] {
        let auto = ["--device", "auto", "--receipt", "receipt.json"];
        place.ok(&[&call[..], &auto, more].concat());
        let receipt = std::fs::read_to_string(place.path("receipt.json")).unwrap();
        let receipt: Value = serde_json::from_str(&receipt).unwrap();
        assert_eq!(receipt["generation"]["chunk"], rows);
    }
    let threads = auto["threads"].to_string();
    let bench =
        ["bench", "-m", "model.gguf", "-p", "8", "-n", "4", "--repetitions", "1", "--threads", &threads];
    let text = place.ok(&bench);
    assert!(text.contains("predicted    decode at most "), "{text}");

    let refused = |more: &[&str]| place.error(&[&call[..], more].concat());
    assert!(refused(&["--gpu-layers", "99"]).contains("--gpu-layers 99: the model has 2 layers"));
    assert!(refused(&["--device", "flex=1"]).contains("has places for 1 layers; the model has 2"));
    if bitnet_burn::backends::devices::runtimes().is_empty() {
        assert!(refused(&["--gpu-layers", "1"]).contains("--features wgpu"));
        assert!(refused(&["--device", "wgpu:0=1,flex"]).contains("--features wgpu"));
    }
}

#[test]
fn memory_is_taken_at_once_and_sequences_without_room_are_refused() {
    let place = Place::new();
    let call = ["run", "-m", "model.gguf", "--tokens-file", "ids.txt", "--greedy", "-n", "4", "--json"];
    let grown = place.json(&call);
    let whole = place.json(&[&call[..], &["--preallocate"]].concat());
    assert_eq!(whole["token_ids"], grown["token_ids"]);
    // 2 layers of 2 kv heads of 64, keys and values in f32, for all 512 positions, or as few as there is room for.
    let bytes = |positions: u64| 2 * 2 * 64 * 2 * 4 * positions;
    assert_eq!(
        (&whole["kv_cache_bytes"], &grown["kv_cache_bytes"]),
        (&bytes(512).into(), &bytes(128).into())
    );
    let bench = ["bench", "-m", "model.gguf", "-p", "8", "-n", "2", "-r", "1", "--threads", "1"];
    let whole = place.json(&[&bench[..], &["--preallocate", "--json"]].concat());
    assert_eq!(whole["kv_cache_bytes"], bytes(512));
    let error = place.error(&[&bench[..], &["--batches", "2,1000000000"]].concat());
    assert!(
        error.contains("--batches 1000000000") && error.contains("of 10 positions beside the model"),
        "{error}"
    );
}

#[test]
fn thousands_of_gpus_are_refused_at_once_and_hundreds_are_planned() {
    let place = Place::new();
    let gpus = |count: usize| {
        let gpu =
            |i| serde_json::json!({"device": format!("cuda:{i}"), "memory_bytes": 8_000_000_000u64 + i});
        let memory = serde_json::json!({"total_bytes": 1u64 << 33, "available_bytes": 1u64 << 32});
        let gpus: Vec<_> = (0..count as u64).map(gpu).collect();
        serde_json::json!({"cpu": {"physical_cores": 4}, "memory": memory, "gpus": gpus}).to_string()
    };
    place.write("many.json", gpus(256));
    place.write("too-many.json", gpus(10_000));
    let plan = |machine| ["plan", "-m", "model.gguf", "--machine", machine];
    assert!(place.ok(&plan("many.json")).contains("cuda:255"));
    let error = place.error(&plan("too-many.json"));
    assert!(error.contains("too-many.json") && error.contains("10000 GPUs; at most 256"), "{error}");
}
