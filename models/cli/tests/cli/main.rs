//! The program `bitnet`, as its users and other programs see it: on a small synthetic model, end to end.

mod chat;
mod compare;
mod connections;
#[cfg(feature = "cuda")]
mod cuda;
mod docs;
mod embed;
mod figures;
mod files;
#[cfg(feature = "wgpu")]
mod gpu;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "hub")]
mod keep;
mod kernels;
mod plan;
mod plugins;
mod process;
mod receipt;
mod serve;
mod speculate;
mod tools;
#[cfg(feature = "remote")]
mod worker;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bitnet_burn_engine::report::{RunReport, SCHEMA};
use serde_json::Value;
use tempfile::TempDir;

/// A directory with a tiny model in it, and with a tuning cache of its own.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self::empty();
        place.ok(&["synth", "--shape", "tiny", "--seed", "7", "--out", "model.gguf"]);
        place.write("ids.txt", "509, 72 101\n108,108\t111 32 119");
        place
    }

    fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).unwrap();
    }

    /// The program in this directory, with nothing of the environment that would change what it does.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
        for variable in [
            "BITNET_THREADS",
            "BITNET_PIN",
            "BITNET_KERNEL",
            "BITNET_PLUGINS",
            "BITNET_PLUGIN_PATH",
            "BITNET_PLUGIN_PINS",
            "BITNET_PLUGIN_CONFIG",
            "BITNET_CPU_MASK",
            "BITNET_STRICT_MODE",
            "BITNET_FALLBACK",
            "BITNET_CONFIG",
            "BITNET_REMOTE_TIMEOUT",
            "BITNET_WORKER_SECRET",
            "BITNET_API_KEY",
            "RUST_LOG",
            "HF_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "ALL_PROXY",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "all_proxy",
            "http_proxy",
            "https_proxy",
        ] {
            command.env_remove(variable);
        }
        // Nobody listens there: no test downloads anything from elsewhere.
        command.env("HF_HOME", self.path("huggingface")).env("HF_ENDPOINT", "http://127.0.0.1:9");
        // Pins and the user's plugin directory are this place's own.
        command.env("XDG_CONFIG_HOME", self.path("config")).env("XDG_DATA_HOME", self.path("data"));
        command.env("BITNET_CACHE_DIR", self.path("cache")).current_dir(self.0.path()).args(args);
        command.stdin(Stdio::null());
        command
    }

    /// stdout of a call that must succeed.
    fn ok(&self, args: &[&str]) -> String {
        ok(&mut self.command(args))
    }

    fn json(&self, args: &[&str]) -> Value {
        json(&self.ok(args))
    }

    /// stderr of a call that must fail as an error does.
    fn error(&self, args: &[&str]) -> String {
        error(&mut self.command(args))
    }
}

fn ok(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{command:?}: {status}\n{stderr}");
    String::from_utf8(stdout).unwrap()
}

fn error(command: &mut Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{command:?}\n{stderr}");
    assert!(stderr.contains("error: ") && !stderr.contains("panicked"), "{stderr}");
    stderr
}

/// One object, on one line.
fn json(text: &str) -> Value {
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    serde_json::from_str(text).unwrap()
}

/// Shape and values of a NumPy file.
fn npy(path: &Path) -> (String, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let end = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert!(end.is_multiple_of(64));
    let header = std::str::from_utf8(&bytes[10..end]).unwrap();
    assert!(header.contains("'descr': '<f4'") && header.contains("'fortran_order': False"), "{header}");
    let shape = header.split_once("'shape': ").unwrap().1.split_once(", }").unwrap().0;
    (
        shape.to_owned(),
        bytes[end..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
    )
}

#[test]
fn run_is_the_same_twice_and_streams_what_it_reports() {
    let place = Place::new();
    let call = ["run", "-m", "model.gguf", "--prompt", "Hello", "--max-new-tokens", "12", "--greedy"];
    let ids = place.ok(&[&call[..], &["--print-ids"]].concat());
    assert_eq!(ids, place.ok(&[&call[..], &["--print-ids", "--threads", "1", "--seed", "3"]].concat()));
    let ids: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
    assert!(!ids.is_empty() && ids.len() <= 12);

    let report = place.json(&[&call[..], &["--json", "--report", "report.json"]].concat());
    let streamed = place.ok(&call);
    assert_eq!(streamed.strip_suffix('\n'), report["text"].as_str());
    assert_eq!(report["token_ids"], serde_json::to_value(&ids).unwrap());
    assert_eq!(report["prompt_token_ids"], serde_json::json!([509, 72, 101, 108, 108, 111]));
    assert_eq!(report["generated_tokens"], ids.len());
    assert_eq!(report["prompt_tokens"], 6);
    for key in ["load_seconds", "prefill_tokens_per_s", "first_token_seconds", "decode_tokens_per_s"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
    }
    let percentiles =
        ["p50", "p95", "p99", "max"].map(|part| report["token_seconds"][part].as_f64().unwrap());
    assert!(percentiles.is_sorted(), "{percentiles:?}");
    assert!(report["start_to_first_token_seconds"].as_f64() >= report["first_token_seconds"].as_f64());
    assert!(report["end_to_end_seconds"].as_f64() >= report["first_token_seconds"].as_f64());
    for key in ["tokenisation_seconds", "detokenisation_seconds"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
    }
    assert!(report["sampling_seconds"]["p50"].as_f64().unwrap() > 0.0 && report["schema"] == 1);
    assert!(report["seed"].is_null(), "greedy has no seed");
    assert_eq!(report["model"]["architecture"], "bitnet-b1.58");
    assert_eq!(report["device"], "flex");
    assert_eq!((&report["reference_calls"], &report["fallbacks"]), (&0.into(), &serde_json::json!([])));
    let kernels = report["kernels"].as_array().unwrap();
    assert!(kernels.iter().all(|k| k["calls"].as_u64().unwrap() > 0 && !k["version"].is_null()));
    // Seven projections in each of two layers, in every forward pass: the prompt's, and one a token but the
    // last.
    let calls: u64 = kernels.iter().map(|k| k["calls"].as_u64().unwrap()).sum();
    assert_eq!(calls, 14 * ids.len() as u64);
    let written: RunReport =
        serde_json::from_slice(&std::fs::read(place.path("report.json")).unwrap()).unwrap();
    assert_eq!((written.schema, written.generated_tokens), (SCHEMA, ids.len()));
}

#[test]
fn prepacked_weights_are_mapped_by_the_kernels_that_they_were_packed_for() {
    let place = Place::new();
    let run = |more: &[&str]| {
        let call = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "8", "--lm-head", "int8", "--json"];
        place.json(&[&call[..], more].concat())
    };
    let tiles = ["--kernel", "t2-scalar"];
    let plain = run(&tiles);
    assert_eq!(plain["prepacked"], 0);
    let packed =
        place.json(&[&["prepack", "-m", "model.gguf", "--lm-head", "int8", "--json"][..], &tiles].concat());
    assert_eq!(packed["path"], "model.gguf.prepacked");
    assert_eq!(packed["layouts"], serde_json::json!({"Q6_K": 1, "cpu/t2x32": 14}));
    let mapped = run(&tiles);
    assert_eq!((&mapped["prepacked"], &mapped["text"]), (&15.into(), &plain["text"]));
    assert_eq!(run(&[&tiles[..], &["--no-prepacked"]].concat())["prepacked"], 0);
    // Kernels of another layout take the head alone.
    let rows = run(&["--kernel", "i2s-scalar"]);
    assert_eq!((&rows["prepacked"], &rows["text"]), (&1.into(), &plain["text"]));

    // A model that has changed: a warning, and the same text.
    std::fs::File::open(place.path("model.gguf"))
        .unwrap()
        .set_modified(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000))
        .unwrap();
    let call = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "8", "--lm-head", "int8"];
    let output = place.command(&[&call[..], &tiles].concat()).output().unwrap();
    let (text, log) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(text.strip_suffix('\n'), plain["text"].as_str());
    assert!(log.contains("the model has changed") && log.contains("`bitnet prepack`"), "{log}");
    assert!(!log.contains("matrices, mapped"), "{log}");

    let nothing = place.command(&["prepack", "-m", "model.gguf", "--kernel", "i2s-scalar"]).output().unwrap();
    assert_eq!(nothing.status.code(), Some(1));
    assert!(String::from_utf8(nothing.stderr).unwrap().contains("there is nothing to pack"));
}

#[test]
fn pinned_threads_are_reported() {
    let place = Place::new();
    let call = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "2", "--json"];
    assert_eq!(place.json(&call)["pinned"], false);
    let pinned = place.json(&[&call[..], &["--pin", "--threads", "1"]].concat());
    assert_eq!((&pinned["pinned"], &pinned["threads"]), (&true.into(), &1.into()));
    let output = place.command(&[&call[..], &["--pin", "--threads", "1000"]].concat()).output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("1000 threads can't be pinned to"));
    let output = place.command(&call).env("BITNET_PIN", "yes").output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("BITNET_PIN"));
}

#[test]
fn token_ids_in_a_file_are_a_prompt_and_chunks_do_not_change_results() {
    let place = Place::new();
    place.write("hello.txt", "509 72,101\n108 108,\t111");
    let call = ["run", "-m", "model.gguf", "--print-ids", "-n", "8"];
    let by_text = place.ok(&[&call[..], &["-p", "Hello"]].concat());
    for chunk in ["1", "4", "256"] {
        let by_file = place.ok(&[&call[..], &["--tokens-file", "hello.txt", "--chunk", chunk]].concat());
        assert_eq!(by_file, by_text);
    }
    let none = place.ok(&[&call[..4], &["-n", "0", "-p", "Hello"]].concat());
    assert_eq!(none, "\n");
}

#[test]
fn sampling_repeats_with_its_seed_and_stops_at_stop_strings() {
    let place = Place::new();
    let call = [
        "run",
        "-m",
        "model.gguf",
        "-p",
        "Hello",
        "-n",
        "16",
        "--ignore-eos",
        "--temperature",
        "1",
        "--json",
    ];
    let report = place.json(&call);
    let seed = report["seed"].as_u64().unwrap().to_string();
    let again = place.json(&[&call[..], &["--seed", &seed]].concat());
    assert_eq!(report["token_ids"], again["token_ids"]);
    assert_eq!(report["finish"], "length");
    let other = place.json(&[&call[..], &["--seed", "1", "--top-k", "40", "--top-p", "0.95"]].concat());
    assert_ne!(report["token_ids"], other["token_ids"]);

    let text = report["text"].as_str().unwrap();
    let (at, stop) = text.char_indices().nth(text.chars().count() / 2).unwrap();
    let cut = text.find(stop).unwrap().min(at);
    let stopped = place.json(&[&call[..], &["--seed", &seed, "--stop", &stop.to_string()]].concat());
    assert_eq!(stopped["text"], text[..cut]);
    assert_eq!(stopped["finish"], "stop_string");
}

#[test]
fn logits_are_numpy_files_that_do_not_depend_on_chunks_threads_or_kernels() {
    let place = Place::new();
    let call = ["logits", "-m", "model.gguf", "--tokens-file", "ids.txt", "--out"];
    place.ok(&[&call[..], &["all.npy"]].concat());
    let (shape, all) = npy(&place.path("all.npy"));
    assert_eq!(shape, "(8, 512)");
    assert_eq!(all.len(), 8 * 512);
    assert!(all.iter().all(|v| v.is_finite()));
    let bytes = std::fs::read(place.path("all.npy")).unwrap();
    for more in [&["--chunk", "1"][..], &["--chunk", "3", "--threads", "1"], &["--kernel", "i2s-scalar"]] {
        place.ok(&[&call[..], &["other.npy"], more].concat());
        assert_eq!(bytes, std::fs::read(place.path("other.npy")).unwrap(), "{more:?}");
    }
    let report = place.json(&[&call[..], &["float.npy", "--activations", "float", "--json"]].concat());
    assert_eq!(report["shape"], serde_json::json!([8, 512]));
    assert_eq!(report["activations"], "f32");
    let (_, float) = npy(&place.path("float.npy"));
    let difference = all.iter().zip(&float).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference > 0.0 && difference < 1.0, "{difference}");
    // Nothing but the files that were asked for is left.
    let mut names: Vec<_> = std::fs::read_dir(place.0.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["all.npy", "cache", "float.npy", "ids.txt", "model.gguf", "other.npy"]);
}

#[test]
fn inspect_shows_and_checks() {
    let place = Place::new();
    let report = place.json(&["inspect", "-m", "model.gguf", "--check", "--json", "--threads", "1"]);
    assert_eq!(report["config"]["hidden_size"], 256);
    assert_eq!(report["parameters"]["ternary"], report["check"]["ternary_weights"]);
    assert_eq!(report["memory"]["kv_cache_bytes_per_token"], 2 * 2 * 128 * 4);
    assert_eq!(report["tensors"].as_array().unwrap().len(), 24);
    let text = place.ok(&["inspect", "-m", "model.gguf", "--kv-cache", "f16", "--context", "100"]);
    for part in
        ["synthetic tiny", "blk.*.ffn_down.weight", "I2_S", "for 100 positions", "bitnet-b1.58.block_count"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }

    // Float projections are known by their values.
    for (scales, shared) in [("row", "row"), ("group:128", "group:128")] {
        place.ok(&["synth", "--scales", scales, "--intermediate-size", "768", "--out", "many.gguf"]);
        place.ok(&["convert", "many.gguf", "--to", "hf", "--style", "values", "--force", "--out", "many"]);
        for model in ["many.gguf", "many"] {
            let report = place.json(&["inspect", "-m", model, "--check", "--json"]);
            assert_eq!(report["check"]["ternary_weights"], report["parameters"]["ternary"], "{model}");
            assert_eq!(report["check"]["scales"], serde_json::json!({shared: 14}), "{model}");
            let zeros = report["check"]["zero_weights"].as_f64().unwrap()
                / report["check"]["ternary_weights"].as_f64().unwrap();
            assert!((0.3..0.37).contains(&zeros), "{model}: {zeros}");
            assert!(
                place.ok(&["inspect", "-m", model, "--check"]).contains(&format!("; scales by {shared})"))
            );
        }
    }

    // A code that means nothing, in the last projection.
    let mut bytes = std::fs::read(place.path("model.gguf")).unwrap();
    let at = bytes.len() - 256 * 4 - 32 - 5;
    bytes[at] = 0xff;
    place.write("damaged.gguf", bytes);
    let stderr = place.error(&["inspect", "-m", "damaged.gguf", "--check"]);
    assert!(stderr.contains("blk.1.ffn_down.weight") && stderr.contains("not ternary"), "{stderr}");
}

#[test]
fn bench_reports_what_other_tools_rely_on() {
    let place = Place::new();
    let call = ["bench", "--model", "model.gguf", "--threads", "1", "--repetitions", "2", "--json"];
    let more = ["-p", "16", "-n", "4", "--contexts", "8,32", "--batches", "1,3"];
    let report = place.json(&[&call[..], &more].concat());
    for key in ["prefill_tokens_per_s", "decode_tokens_per_s", "read_bandwidth_gb_per_s"] {
        let [min, median, max] = ["min", "median", "max"].map(|part| report[key][part].as_f64().unwrap());
        assert!(0.0 < min && min <= median && median <= max, "{key}");
    }
    assert_eq!(report["threads"], 1);
    assert!(report["load_seconds"].as_f64().unwrap() > 0.0);
    assert!(report["kernels"].as_array().unwrap().iter().any(|k| k["calls"].as_u64().unwrap() > 0));
    let parts = &report["bytes_per_token_parts"];
    let sum: u64 = parts.as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(report["bytes_per_token"], sum);
    assert_eq!(parts["head"], 512 * 210);
    assert_eq!(parts["norms"], (2 * (3 * 256 + 640) + 256) * 4);
    if cfg!(any(target_os = "linux", target_os = "macos", windows)) {
        assert!(report["peak_rss_bytes"].as_u64().unwrap() > 0);
    }
    let contexts: Vec<_> =
        report["decode_by_context"].as_array().unwrap().iter().map(|d| d["context"].clone()).collect();
    assert_eq!(contexts, [8, 32]);
    let batches = report["decode_by_batch"].as_array().unwrap();
    let sequences: Vec<_> = batches.iter().map(|batch| batch["sequences"].as_u64().unwrap()).collect();
    assert_eq!(sequences, [1, 3]);
    assert!(batches.iter().all(|batch| batch["decode_tokens_per_s"].as_f64().unwrap() > 0.0));

    let prefill = place.json(&[&call[..], &["-p", "4", "-n", "0"]].concat());
    assert!(prefill["decode_tokens_per_s"].is_null() && !prefill["prefill_tokens_per_s"].is_null());
    let decode = place.json(&[&call[..], &["-p", "0", "-n", "2"]].concat());
    assert!(decode["prefill_tokens_per_s"].is_null() && !decode["decode_tokens_per_s"].is_null());
    assert!(place.error(&[&call[..], &["-p", "0", "-n", "0"]].concat()).contains("nothing to measure"));
    assert!(place.error(&[&call[..], &["-p", "512", "-n", "1"]].concat()).contains("513"));
}

#[test]
fn perplexity_scores_every_token_but_the_first_of_a_window() {
    let place = Place::new();
    place.write("text.txt", "The quick brown fox jumps over the lazy dog.\n".repeat(3));
    let call = ["perplexity", "-m", "model.gguf", "--file", "text.txt", "--json"];
    let report = place.json(&call);
    assert_eq!((&report["tokens"], &report["tokens_scored"]), (&136.into(), &135.into()));
    let (perplexity, nll) = (report["perplexity"].as_f64().unwrap(), &report["mean_negative_log_likelihood"]);
    assert!(perplexity > 1.0 && (perplexity.ln() - nll.as_f64().unwrap()).abs() < 1e-9);
    assert_eq!(report["perplexity"], place.json(&[&call[..], &["--chunk", "7"]].concat())["perplexity"]);

    let report = place.json(&[&call[..], &["--context", "32"]].concat());
    assert_eq!((&report["windows"], &report["tokens_scored"]), (&5.into(), &131.into()));
    let report = place.json(&[&call[..], &["--context", "32", "--stride", "16"]].concat());
    assert_eq!((&report["windows"], &report["tokens_scored"]), (&8.into(), &135.into()));
    let text = place.ok(&["perplexity", "-m", "model.gguf", "--tokens-file", "ids.txt"]);
    assert!(text.starts_with("perplexity "), "{text}");
    assert!(place.error(&[&call[..], &["--stride", "600"]].concat()).contains("--stride 600"));
    assert!(place.error(&[&call[..], &["--max-tokens", "1"]].concat()).contains("at least 2"));
}

#[test]
fn text_survives_tokenize_and_back() {
    let place = Place::new();
    let text = "Grüße, 世界! 1234\n\t'quoted'";
    let ids = place.ok(&["tokenize", "-m", "model.gguf", "--no-special", text]);
    assert_eq!(place.ok(&["tokenize", "-m", "model.gguf", "--decode", &ids]), format!("{text}\n"));
    let report = place.json(&["tokenize", "-m", "model.gguf", "--json", "Hi"]);
    assert_eq!(
        report,
        serde_json::json!({
            "text": "Hi", "ids": [509, 72, 105], "tokens": ["<|begin_of_text|>", "H", "i"],
        })
    );
    assert!(place.error(&["tokenize", "-m", "model.gguf", "--decode", "1 512"]).contains("token 512"));
    assert!(place.error(&["tokenize", "-m", "model.gguf", "--decode", "one"]).contains("\"one\""));
}

#[test]
fn errors_say_what_is_wrong() {
    let place = Place::new();
    let run = |more: &[&str]| place.error(&[&["run", "-m", "model.gguf"][..], more].concat());
    place.write("junk.txt", "1, 2, three");
    assert!(run(&["--tokens-file", "junk.txt"]).contains("entry 3: \"three\""));
    place.write("beyond.txt", "1 512");
    assert!(run(&["--tokens-file", "beyond.txt"]).contains("token 512 is not in the model's vocabulary"));
    place.write("empty.txt", " \n");
    assert!(run(&["--tokens-file", "empty.txt"]).contains("no token ids"));
    place.write("binary.txt", [0xff, 0xfe, 0x00]);
    assert!(run(&["--tokens-file", "binary.txt"]).contains("not text"));
    assert!(run(&["--tokens-file", "missing.txt"]).contains("missing.txt"));
    place.write("long.txt", "1 ".repeat(600));
    assert!(run(&["--tokens-file", "long.txt"]).contains("600 tokens, the context 512"));
    assert!(run(&["-p", "x", "--context", "600"]).contains("trained for 512"));
    assert!(run(&["-p", "x", "--temperature", "-1"]).contains("temperature is -1"));
    assert!(run(&["-p", "x", "--stop", ""]).contains("--stop"));
    let unknown = run(&["-p", "x", "--kernel", "nonsense"]);
    assert!(
        unknown.contains("no kernel is named `nonsense`") && unknown.contains("cpu/t2-scalar"),
        "{unknown}"
    );
    if !cfg!(feature = "wgpu") {
        assert!(run(&["-p", "x", "--device", "wgpu"]).contains("--features wgpu"));
    }
    let missing = place.error(&["inspect", "-m", "none.gguf"]);
    assert!(missing.contains("none.gguf") && missing.contains("hint:"), "{missing}");
    place.write("not.gguf", "PK\x03\x04");
    assert!(place.error(&["run", "-m", "not.gguf", "-p", "x"]).contains("not a GGUF file"));
    assert!(place.error(&["synth", "--intermediate-size", "100", "--out", "x"]).contains("multiple of 128"));
    assert!(place.error(&["synth", "--vocab-size", "9", "--out", "x"]).contains("too small"));
    assert!(!place.path("x").exists());
    for (name, value, expected) in [
        ("BITNET_THREADS", "many", "a number of threads"),
        ("BITNET_THREADS", "1025", "at most 1024"),
        ("BITNET_PLUGINS", "maybe", "off, on or user"),
    ] {
        let error = error(place.command(&["kernels"]).env(name, value));
        assert!(error.contains(&format!("{name}={value}")) && error.contains(expected), "{error}");
    }
    #[cfg(unix)]
    for name in ["BITNET_STRICT_MODE", "BITNET_PLUGINS", "BITNET_KERNEL", "BITNET_THREADS", "BITNET_FALLBACK"]
    {
        use std::os::unix::ffi::OsStrExt as _;
        let value = std::ffi::OsStr::from_bytes(b"1\xff");
        let error = error(place.command(&["kernels"]).env(name, value));
        assert!(error.contains(name) && error.contains("UTF-8"), "{error}");
    }

    // An empty prompt is BOS alone; the context's end is no error.
    let report = place.json(&["run", "-m", "model.gguf", "-p", "", "-n", "1", "--json"]);
    assert_eq!(report["prompt_token_ids"], serde_json::json!([509]));
    let report = place.json(&[
        "run",
        "-m",
        "model.gguf",
        "-p",
        "Hello",
        "--context",
        "8",
        "-n",
        "50",
        "--ignore-eos",
        "--json",
    ]);
    assert_eq!((&report["finish"], &report["generated_tokens"]), (&"context".into(), &3.into()));
}

#[cfg(feature = "default-model")]
#[test]
fn without_a_model_there_is_a_story() {
    let place = Place::empty();
    let story = place.ok(&["run", "--seed", "3"]);
    assert!(story.split_whitespace().count() > 40 && story.trim_end().ends_with(['.', '"', '!']), "{story}");
    assert_eq!(place.ok(&["run", "--seed", "3"]), story);
    assert_ne!(place.ok(&["run", "--seed", "4"]), story);
    let greedy = place.json(&["run", "-p", "Once there was a fox named", "--greedy", "-n", "8", "--json"]);
    assert_eq!(greedy["token_ids"].as_array().unwrap().len(), 8);
    assert!(greedy["text"].as_str().unwrap().is_ascii());
    assert!(place.ok(&["inspect"]).contains("stories"));
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let place = Place::empty();
    for args in [
        &["nonsense"][..],
        &[],
        &["run", "-m", "x"],
        &["run", "-m", "x", "-p", "y", "--tokens-file", "z"],
        &["run", "-m", "x", "-p", "y", "--top-k", "5"],
        &["run", "-m", "x", "-p", "y", "--chunk", "0"],
        &["run", "-m", "x", "-p", "y", "--threads", "0"],
        &["run", "-m", "x", "-p", "y", "--hidden-act", "gelu_fast"],
        &["kernels", "--explain", "big"],
        &["synth", "--shape", "huge"],
    ] {
        let Output { status, stderr, .. } = place.command(args).output().unwrap();
        assert_eq!(status.code(), Some(2), "{args:?}: {}", String::from_utf8_lossy(&stderr));
    }
    for command in [
        "run",
        "chat",
        "inspect",
        "tokenize",
        "kernels",
        "bench",
        "synth",
        "perplexity",
        "logits",
        "compare",
        "train",
        "distill",
        "export",
        "convert",
        "plugins",
        "receipt",
    ] {
        let help = place.ok(&[command, "--help"]);
        assert!(help.contains("Examples:") && help.contains(&format!("bitnet {command}")), "{help}");
    }
    assert!(place.ok(&["--help"]).contains("BITNET_STRICT_MODE"));
}

/// What people who come from llama.cpp type: each is refused as wrong usage, with what to write instead.
#[test]
fn habits_of_llama_cpp_are_answered() {
    let place = Place::empty();
    for (more, parts) in [
        (&["--seed", "-1"][..], &["invalid value '-1' for '--seed", "leave --seed out"][..]),
        (&["-n", "-1"], &["invalid value '-1' for '--max-new-tokens", "-n 100000"]),
        (&["-n", "-2"], &["invalid value '-2'", "-n 100000"]),
        (&["--max-new-tokens=-1"], &["invalid value '-1'", "-n 100000"]),
        (&["-t", "-1"], &["invalid value '-1' for '--threads", "leave --threads out"]),
        (&["--gpu-layers", "-1"], &["invalid value '-1' for '--gpu-layers", "--device"]),
        (&["--chunk", "-4"], &["invalid value '-4' for '--chunk"]),
        (&["-ngl", "99"], &["llama.cpp's `-ngl` is here: --gpu-layers"]),
        (&["--n-gpu-layers", "99"], &["llama.cpp's `--n-gpu-layers` is here: --gpu-layers"]),
        (&["-c", "4096"], &["llama.cpp's `-c` is here: --context"]),
        (&["--ctx-size=4096"], &["llama.cpp's `--ctx-size` is here: --context"]),
        (&["-cnv"], &["llama.cpp's `-cnv` is here: --chat", "bitnet chat"]),
        (&["-tb", "4", "--temp", "0.7"], &["llama.cpp's `-tb` is here: --threads"]),
        (&["--temp", "0.7"], &["llama.cpp's `--temp` is here: --temperature"]),
        (&["-fa", "on"], &["llama.cpp's `-fa` is here: nothing"]),
        (&["-no-cnv"], &["llama.cpp's `-no-cnv` is here: nothing"]),
        (&["--model-draft", "small.gguf"], &["llama.cpp's `--model-draft` is here: --draft-model"]),
    ] {
        let args = [&["run", "-m", "x", "-p", "y"][..], more].concat();
        let Output { status, stderr, .. } = place.command(&args).output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(2), "{more:?}: {stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{more:?}: {stderr:?} does not say {part:?}");
        }
        assert_eq!(
            stderr.contains("tip: "),
            parts.iter().any(|p| !p.starts_with("invalid value")),
            "{stderr}"
        );
    }
    // A flag that is nobody's stays what it was.
    let stderr = place.command(&["run", "-m", "x", "-p", "y", "--nonsense"]).output().unwrap().stderr;
    assert!(!String::from_utf8(stderr).unwrap().contains("llama.cpp"));
    // Numbers below zero reach the parsers of other commands, too.
    let stderr = place.command(&["bench", "-p", "-1"]).output().unwrap().stderr;
    assert!(String::from_utf8(stderr).unwrap().contains("invalid value '-1'"));
}

#[test]
fn nobody_minds_a_reader_that_has_seen_enough() {
    let place = Place::new();
    let mut child = place
        .command(&["inspect", "-m", "model.gguf", "--tensors"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
}

/// A plugin in the place, from a C source: the template in examples/plugin-c, or core's broken one. `false`
/// where there is no compiler, which is a failure in CI.
fn plugin(place: &Place, name: &str, source: &str, defines: &[&str]) -> bool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    command.args(["-O2", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=off", "-I"]);
    command.arg(root.join("plugins/abi/include")).arg(root.join(source)).args(defines);
    match command.args(["-lm", "-lpthread", "-o"]).arg(place.path(name)).output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            true
        }
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "no C compiler in CI: {error}");
            eprintln!("SKIPPED: plugins in C (no C compiler: {error})");
            false
        }
    }
}

const TEMPLATE: &str = "examples/plugin-c/kernels.c";
const BROKEN: &str = "core/manager/testdata/plugin.c";

#[test]
fn synth_writes_what_was_asked_for() {
    let place = Place::empty();
    let report = place.json(&[
        "synth",
        "--json",
        "--out",
        "x.gguf",
        "--hidden-size",
        "128",
        "--intermediate-size",
        "256",
        "--layers",
        "1",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--vocab-size",
        "300",
        "--embedding-type",
        "q8_0",
        "--hidden-act",
        "silu",
        "--untied",
        "--seed",
        "5",
    ]);
    assert_eq!(report["config"]["head_dim"], 64);
    let shown = place.json(&["inspect", "-m", "x.gguf", "--json", "--check"]);
    for key in ["hidden_size", "n_layers", "activation", "tied_embeddings", "vocab_size", "bos_token"] {
        assert_eq!(shown["config"][key], report["config"][key], "{key}");
    }
    assert_eq!(shown["tensors"].as_array().unwrap().iter().filter(|t| t["type"] == "Q8_0").count(), 2);
    place.ok(&["run", "-m", "x.gguf", "-p", "a", "-n", "2"]);
}

#[test]
fn a_prompt_longer_than_a_sliding_window_goes_through_it() {
    let place = Place::new();
    place.write("long.txt", (0..100).map(|i| format!("{} ", i % 60 + 40)).collect::<String>());
    let call =
        ["run", "-m", "model.gguf", "--tokens-file", "long.txt", "--context", "32", "-n", "8", "--greedy"];
    assert!(place.error(&call).contains("the prompt has 100 tokens, the context 32"));
    // However many rows at once are asked for.
    for chunk in [&[][..], &["--chunk", "7"], &["--chunk", "1000"]] {
        let more = ["--sliding-window", "--ignore-eos", "--json", "--receipt", "receipt.json"];
        let report = place.json(&[&call[..], &more, chunk].concat());
        assert_eq!((&report["finish"], &report["generated_tokens"]), (&"length".into(), &8.into()));
        let text = place.ok(&["receipt", "check", "receipt.json", "--rerun"]);
        assert!(text.contains("agrees") && !text.contains("DIFFERS"), "{text}");
    }
}
