//! `--draft-model` and `--draft`: faster or not, the tokens are the same.

use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use super::Place;
use super::serve::Server;

/// A place with two models of the same tokenizer.
fn place() -> Place {
    let place = Place::new();
    place.ok(&["synth", "--shape", "tiny", "--seed", "8", "--out", "other.gguf"]);
    place
}

fn run(place: &Place, more: &[&str]) -> Value {
    let args = ["run", "-m", "model.gguf", "-p", "Hello Hello Hello", "-n", "50", "--json", "--quiet"];
    place.json(&[&args[..], more].concat())
}

#[test]
fn run_draws_the_same_tokens_with_guesses() {
    let place = place();
    for sampling in [
        &["--greedy"][..],
        &["--temperature", "0.8", "--seed", "1"],
        &["--temperature", "1.2", "--top-p", "0.9", "--seed", "2", "--repeat-penalty", "1.2"],
    ] {
        let expected = run(&place, sampling);
        assert!(expected.get("drafts").is_none());
        for draft in [
            &["--draft-model", "model.gguf"][..],
            &["--draft-model", "other.gguf"],
            &["--draft-model", "model.gguf", "--draft", "1"],
            &["--draft", "6"],
        ] {
            let found = run(&place, &[sampling, draft].concat());
            assert_eq!(found["token_ids"], expected["token_ids"], "{sampling:?} {draft:?}");
            assert_eq!(found["text"], expected["text"]);
            let of_model = &found["drafts"]["model"];
            if draft.contains(&"model.gguf") {
                assert!(of_model["drafted"].as_u64() > Some(0), "{found}");
                assert_eq!(of_model["drafted"], of_model["accepted"]);
            }
        }
        let none = run(&place, &[sampling, &["--draft-model", "model.gguf", "--draft", "0"]].concat());
        assert!(none.get("drafts").is_none());
    }
    // By ids, and with a report for people.
    let ids = ["run", "-m", "model.gguf", "--tokens-file", "ids.txt", "-n", "20", "--print-ids"];
    let mut drafted = place.command(&[&ids[..], &["--draft-model", "model.gguf"]].concat());
    let output = drafted.output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), place.ok(&ids));
    let report = String::from_utf8(output.stderr).unwrap();
    assert!(report.contains(" by draft model"), "{report}");
}

#[test]
fn chat_answers_the_same_with_a_draft_model() {
    let place = place();
    place.write("t.jinja", "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>");
    let said = |more: &[&str]| {
        let args =
            ["chat", "-m", "model.gguf", "--chat-template", "t.jinja", "-n", "30", "--temperature", "0.9"];
        let mut command = place.command(&[&args[..], &["--seed", "4"], more].concat());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"Hello\nAnd then?\n/undo\nAnd now?\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        (output.stdout, String::from_utf8(output.stderr).unwrap())
    };
    let (expected, plain) = said(&[]);
    let (found, status) = said(&["--draft-model", "model.gguf"]);
    assert_eq!(found, expected);
    assert!(status.contains(" guesses right;") && !plain.contains("guesses"), "{status}");
}

#[test]
fn a_server_guesses_with_a_draft_model() {
    let place = place();
    let server = Server::start(&place, &["-m", "model.gguf", "--draft-model", "model.gguf"]);
    let run = run(&place, &["--temperature", "0.8", "--seed", "5"]);
    let body = json!({ "prompt": "Hello Hello Hello", "max_tokens": 50, "temperature": 0.8, "seed": 5 });
    let answer = server.ok("/v1/completions", &body);
    assert_eq!(answer["choices"][0]["text"], run["text"]);
    let (_, metrics) = server.get("/metrics");
    let count = |name: &str, source: &str| -> u64 {
        let line = format!("bitnet_{name}_tokens_total{{model=\"model\",source=\"{source}\"}} ");
        let value = metrics.lines().find_map(|found| found.strip_prefix(&line));
        value.unwrap_or_else(|| panic!("{line} {metrics}")).parse().unwrap()
    };
    assert!(count("drafted", "DraftModel") > 0);
    assert_eq!(count("drafted", "DraftModel"), count("accepted", "DraftModel"));
    assert!(count("drafted", "LookUp") >= count("accepted", "LookUp"));
}

#[test]
fn a_draft_model_that_does_not_fit_is_refused() {
    let place = place();
    let stories = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/assets/stories.gguf");
    let stories = stories.to_str().unwrap();
    for command in ["run", "serve"] {
        let prompt: &[&str] = if command == "run" { &["-p", "Hi"] } else { &["--listen", "127.0.0.1:0"] };
        let error = place.error(&[&[command, "-m", "model.gguf", "--draft-model", stories], prompt].concat());
        assert!(error.contains("--draft-model: the draft model has another tokenizer: token "), "{error}");
    }
    let error = place.error(&["run", "-m", "model.gguf", "--draft-model", "none.gguf", "-p", "Hi"]);
    assert!(error.contains("--draft-model") && error.contains("none.gguf"), "{error}");
    let two = ["-m", "model.gguf", "-m", "other.gguf", "--draft-model", "model.gguf"];
    let error = place.error(&[&["serve", "--listen", "127.0.0.1:0"], &two[..]].concat());
    assert!(error.contains("--draft-model guesses for one model"), "{error}");
}
