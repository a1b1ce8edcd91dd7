//! `bench` as a judge: histories, requirements, profiles, latencies, turns.

use std::process::{Command, Output};

use bitnet_burn_engine::bench::{BenchReport, Record};
use serde_json::Value;

use super::{BROKEN, Place, json, plugin};

const BENCH: [&str; 8] = ["bench", "-m", "model.gguf", "-p", "8", "-n", "4", "--threads"];

/// `bench` of the tiny model on one thread, with more flags.
fn bench<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&BENCH[..], &["1"], more].concat()
}

/// Exit status, and the JSON of stdout.
fn judged(command: &mut Command) -> (i32, Value) {
    let Output { status, stdout, stderr } = command.arg("--json").output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(!stderr.contains("panicked"), "{stderr}");
    let stdout = String::from_utf8(stdout).unwrap();
    assert!(!stdout.is_empty(), "{status}: {stderr}");
    (status.code().unwrap(), json(&stdout))
}

/// The change of a figure in a comparison.
fn change<'v>(changes: &'v Value, figure: &str) -> &'v Value {
    changes.as_array().unwrap().iter().find(|change| change["figure"] == figure).unwrap()
}

#[test]
fn a_history_is_kept_read_and_compared_with() {
    let place = Place::new();
    let record = bench(&["-r", "4", "--record", "history.jsonl"]);
    // This one measures kernels, which takes memory.
    place.ok(&bench(&["-r", "1"]));
    place.ok(&record);
    let records = Record::read(&place.path("history.jsonl")).unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].report.result.rounds.len(), 4);
    assert_eq!((records[0].settings.model.as_str(), records[0].settings.threads), ("model.gguf", 1));

    // Nothing is ten times as slow as before.
    let against = bench(&["-r", "4", "--against", "history.jsonl", "--tolerance", "0.9"]);
    let (status, report) = judged(&mut place.command(&against));
    assert_eq!((status, &report["passed"], &report["against"]["runs"]), (0, &true.into(), &1.into()));
    let decode = change(&report["against"]["changes"], "decode");
    assert_eq!(decode["rounds"], serde_json::json!([4, 4]));
    let [low, high] = [0, 1].map(|end| decode["interval"][end].as_f64().unwrap());
    assert!(
        low <= decode["ratio"].as_f64().unwrap() && decode["ratio"].as_f64().unwrap() <= high,
        "{decode}"
    );

    // A program that was a hundred times as fast, and took a hundredth of the memory.
    let mut faster = records;
    for record in &mut faster {
        let result = &mut record.report.result;
        for round in &mut result.rounds {
            round.decode_tokens_per_s = round.decode_tokens_per_s.map(|speed| speed * 100.0);
        }
        result.peak_rss_bytes = result.peak_rss_bytes.map(|bytes| bytes / 100);
        record.append(&place.path("faster.jsonl")).unwrap();
    }
    let (status, report) = judged(&mut place.command(&bench(&["-r", "4", "--against", "faster.jsonl"])));
    let changes = &report["against"]["changes"];
    assert_eq!((status, &report["passed"]), (3, &false.into()), "{changes}");
    assert_eq!(change(changes, "decode")["verdict"], "worse");
    assert_eq!(change(changes, "peak-memory")["verdict"], "worse");
    assert_ne!(change(changes, "prefill")["verdict"], "worse");
}

#[test]
fn histories_that_do_not_fit_are_refused_before_anything_is_measured() {
    let place = Place::new();
    place.ok(&bench(&["-r", "1", "--record", "history.jsonl"]));
    let line = std::fs::read_to_string(place.path("history.jsonl")).unwrap();
    place.write("other.jsonl", line.replace("\"bitnet_bench\":1", "\"bitnet_bench\":7"));
    place.write("damaged.jsonl", format!("{line}{}\n", &line[..line.len() / 2]));
    place.write("empty.jsonl", "");
    for (more, parts) in [
        (&["--against", "missing.jsonl"][..], &["--against", "missing.jsonl"][..]),
        (&["--against", "other.jsonl"], &["other.jsonl, line 1", "version 7"]),
        (&["--against", "damaged.jsonl"], &["damaged.jsonl, line 2"]),
        (&["--against", "empty.jsonl"], &["there is no record", "--record"]),
        (&["--against", "history.jsonl", "-n", "5"], &["generated_tokens is 4, and here 5", "--record"]),
        (&["--against", "history.jsonl", "--kv-cache", "int8"], &["kv_cache is \"f32\", and here \"int8\""]),
        (&["--against", "history.jsonl", "--batches", "2"], &["batches is nothing, and here [2]"]),
        (&["--record", "no/directory"], &["--record", "no/directory"]),
    ] {
        let call = ["bench", "-m", "model.gguf", "-p", "8", "-r", "1", "--threads", "1"];
        let generate: &[&str] = if more.contains(&"-n") { &[] } else { &["-n", "4"] };
        let error = place.error(&[&call[..], generate, more].concat());
        assert!(parts.iter().all(|part| error.contains(part)), "{more:?}: {error}");
    }
}

#[test]
fn requirements_have_a_verdict_a_line() {
    let place = Place::new();
    let kept = "decode>=0.001,first-token<=10min,peak-memory<=900GiB,token-p99<=10min,of-bandwidth<=9999%";
    let (status, report) = judged(&mut place.command(&bench(&["-r", "1", "--require", kept])));
    assert_eq!((status, &report["passed"]), (0, &true.into()), "{}", report["require"]);
    let verdicts = report["require"].as_array().unwrap();
    assert_eq!(verdicts.len(), 5);
    assert_eq!((&verdicts[1]["figure"], &verdicts[1]["limit"]), (&"first-token".into(), &600.0.into()));
    assert_eq!(verdicts[2]["found"].as_f64(), report["peak_rss_bytes"].as_f64());

    place.write("targets.toml", "decode = '>= 1e9'\n");
    let usage = place.command(&bench(&["--require", "targets.toml"])).output().unwrap();
    assert_eq!(usage.status.code(), Some(2), "1e9 is not a number as it is written here");
    place.write("targets.toml", "decode = '>= 1000000000'\nload = '<= 10min'\n");
    let output = place.command(&bench(&["-r", "1", "--require", "targets.toml"])).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("missed: decode >= 1000000000.00 tokens/s, measured "), "{text}");
    assert!(text.contains("kept: load <= 600.00 s, measured "), "{text}");

    for (list, part) in [
        ("speed>=1", "the names are decode, prefill, first-token"),
        ("decode>=fast", "expected a number with its unit"),
        ("peak-memory<=3", "kB, MB, GB"),
        ("missing.toml", "cannot read the file"),
    ] {
        let Output { status, stderr, .. } = place.command(&bench(&["--require", list])).output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert!(status.code() == Some(2) && stderr.contains(part), "{list}: {stderr}");
    }
    let call = ["bench", "-m", "model.gguf", "-p", "8", "-n", "0", "--require", "decode>=1"];
    assert!(place.error(&call).contains("--require decode: it is measured with -n of at least 1"));
    let help = place.ok(&["bench", "--help"]);
    for figure in bitnet_burn_engine::bench::Figure::ALL {
        assert!(help.contains(figure.name()), "{figure}");
    }
}

#[test]
fn reports_read_back_with_latencies_of_several_prompts() {
    let place = Place::new();
    let text = place.ok(&bench(&["-r", "2", "--prompts", "3,17", "--json"]));
    let report: BenchReport = serde_json::from_str(&text).unwrap();
    assert_eq!(json(&serde_json::to_string(&report).unwrap()), json(&text), "everything is read");
    let result = report.result;
    let latencies: Vec<_> = result.latency.iter().chain(&result.latency_by_prompt).collect();
    assert_eq!(latencies.iter().map(|latency| latency.prompt_tokens).collect::<Vec<_>>(), [8, 3, 17]);
    for latency in latencies {
        let first = latency.first_token_seconds.median;
        assert!(latency.prefill_seconds.median <= first && first <= latency.end_to_end_seconds.median);
        let token = latency.token_seconds.unwrap();
        assert!([token.p50, token.p95, token.p99, token.max].is_sorted());
        assert!(latency.sampling_seconds.p50 > 0.0 && latency.tokenisation_seconds.is_some());
        assert!(latency.detokenisation_seconds.is_some());
    }
    assert!(result.start_to_first_token_seconds.unwrap() > report.load_seconds);
    assert!(place.ok(&bench(&["-r", "1", "--prompts", "3"])).contains("first token"));
    let error = place.error(&bench(&["--prompts", "510"]));
    assert!(error.contains("a prompt of 510 and 4 generated tokens"), "{error}");
}

#[test]
fn a_profile_adds_up_and_names_the_operations() {
    let place = Place::new();
    let report = place.json(&bench(&["-r", "3", "--profile", "--trace", "trace.json", "--json"]));
    let phases = report["profile"]["phases"].as_array().unwrap();
    assert_eq!(phases.iter().map(|phase| &phase["phase"]).collect::<Vec<_>>(), ["prefill", "decode"]);
    for phase in phases {
        let rows = phase["rows"].as_array().unwrap();
        let shares: f64 = rows.iter().map(|row| row["share"].as_f64().unwrap()).sum();
        assert!((shares - 1.0).abs() < 1e-9, "{shares}");
        let calls = |operation: &str, part: &str, shape: &str| {
            let row = rows.iter().find(|row| {
                row["operation"] == operation
                    && row["part"] == part
                    && row["shape"].as_str().unwrap_or_default() == shape
            });
            row.unwrap_or_else(|| panic!("{operation} {part} {shape}: {rows:?}"))["calls"].as_u64().unwrap()
        };
        // Three repetitions of one pass, or of four tokens; two layers.
        let passes = if phase["phase"] == "prefill" { 3 } else { 12 };
        assert_eq!(calls("ternary_matmul", "attention", "256x256 + 128x256 + 128x256"), 2 * passes);
        assert_eq!(calls("ternary_matmul", "attention", "256x256"), 2 * passes);
        assert_eq!(calls("ternary_matmul", "feed_forward", "640x256 + 640x256"), 2 * passes);
        assert_eq!(calls("ternary_matmul", "feed_forward", "256x640"), 2 * passes);
        assert_eq!(calls("dense_matmul", "head", "512x256 Q6_K"), passes);
        for (operation, part, count) in [
            ("attention", "attention", 2),
            ("quantisation", "attention", 4),
            ("quantisation", "feed_forward", 4),
            ("kv_cache", "attention", 4),
            ("norm", "head", 1),
            ("sampling", "rest", 1),
            ("logits", "rest", 1),
            ("residual", "rest", 4),
        ] {
            assert_eq!(calls(operation, part, ""), count * passes, "{operation}");
        }
        assert!(phase["overhead"].is_number());
    }
    let trace: Value = serde_json::from_slice(&std::fs::read(place.path("trace.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    assert!(events.iter().filter(|event| event["name"] == "decode").count() == 4 && events[0]["ph"] == "X");
    let text = place.ok(&bench(&["-r", "1", "--profile"]));
    for part in ["everything else", "ternary matmul", "beside the clock's", "profiling cost"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// The same kernel, which sleeps in each call if a variable is set.
#[test]
fn a_slowed_kernel_is_found() {
    let place = Place::new();
    let define = "-DIN_RUN=if (getenv(\"SLOW_KERNEL\")) usleep(10000)";
    if !plugin(&place, "kernel.so", BROKEN, &["-include", "stdlib.h", "-include", "unistd.h", define]) {
        return;
    }
    let own = ["--plugin", "kernel.so", "--kernel", "example/plain", "-r", "4"];
    let call = |more: &[&'static str]| bench(&[&own[..], more].concat());
    place.ok(&call(&["--record", "history.jsonl"]));
    let slowed = |more: &[&'static str]| judged(place.command(&call(more)).env("SLOW_KERNEL", "1"));
    let (status, report) = slowed(&["--against", "history.jsonl"]);
    let changes = &report["against"]["changes"];
    assert_eq!((status, &change(changes, "decode")["verdict"]), (3, &"worse".into()), "{changes}");
    // 14 matmuls a token take at least 140 ms.
    let (status, report) = slowed(&["--require", "decode>=7.2"]);
    assert_eq!((status, &report["require"][0]["kept"]), (3, &false.into()), "{}", report["require"]);
    // Without its sleep, it is not.
    let output =
        place.command(&call(&["--against", "history.jsonl", "--tolerance", "0.9"])).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("against 1 run of bitnet 0.1.0"), "{text}");
}

#[test]
fn programs_and_kernels_take_turns() {
    let place = Place::new();
    let here = env!("CARGO_BIN_EXE_bitnet");
    let call = bench(&["-r", "1", "--against-program", here]);
    let (status, report) = judged(&mut place.command(&call));
    assert_eq!((status, &report["turns"], &report["passed"]), (0, &1.into(), &true.into()), "{report}");
    assert_eq!(change(&report["changes"], "decode")["verdict"], "too_few_rounds");
    let text = place.ok(&bench(&["-r", "1", "--ab", "i2s-scalar", "t2-scalar"]));
    assert!(text.starts_with("t2-scalar, compared with i2s-scalar in 1 turn"), "{text}");
    let error = place.error(&bench(&["-r", "1", "--ab", "no-such-kernel", "i2s-scalar"]));
    assert!(error.contains("no-such-kernel"), "{error}");
    let error = place.error(&bench(&["--against-program", "missing"]));
    assert!(error.contains("--against-program missing"), "{error}");
}

#[test]
fn a_suite_is_one_table_and_one_page() {
    let place = Place::new();
    let runs = "[[run]]\nname = 'scalar | <b>'\nargs = ['--kernel', 'i2s-scalar']\n[[run]]\nargs = ['--lm-head', 'int8']\n";
    place.write("runs.toml", runs);
    let files =
        ["--suite", "runs.toml", "-r", "1", "--markdown", "table.md", "--html", "page.html", "--json"];
    let runs = place.json(&bench(&files));
    assert_eq!(runs.as_array().unwrap().len(), 2);
    let report: BenchReport = serde_json::from_value(runs[1]["report"].clone()).unwrap();
    assert!(report.execution.lm_head.unwrap().contains("int8"), "{}", runs[1]);
    let table = std::fs::read_to_string(place.path("table.md")).unwrap();
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ")).collect();
    assert_eq!(rows.len(), 4, "{table}");
    assert!(rows[2].starts_with("| scalar \\| <b> | model.gguf, flex | 1 | "), "{table}");
    assert!(rows[3].starts_with("| --lm-head int8 | ") && rows[3].contains(" tokens/s"), "{table}");
    let page = std::fs::read_to_string(place.path("page.html")).unwrap();
    for part in
        ["<h2>Decode</h2>", "scalar | &lt;b&gt;", "class=\"track\"><i style=\"width:100.00%\">", "</html>"]
    {
        assert!(page.contains(part), "{part}: {page}");
    }
    assert!(!page.contains("<script"));

    place.write("wrong.toml", "[[run]]\nname = 'gone'\nargs = ['-m', 'gone.gguf']\n");
    let error = place.error(&["bench", "--suite", "wrong.toml"]);
    assert!(error.contains("wrong.toml, run \"gone\"") && error.contains("gone.gguf"), "{error}");
    place.write("unknown.toml", "[[runs]]\n");
    assert!(place.error(&["bench", "--suite", "unknown.toml"]).contains("unknown field `runs`"));
}

#[test]
fn a_soak_says_whether_everything_stays_flat() {
    let place = Place::new();
    // A tolerance that the speed of a busy machine keeps; memory, descriptors and threads have none.
    let (status, soak) = judged(&mut place.command(&bench(&["--soak", "3s", "--tolerance", "0.9"])));
    assert_eq!((status, &soak["flat"]), (0, &true.into()), "{}", soak["trends"]);
    assert!(soak["samples"].as_array().unwrap().len() >= 12);
    let quantities: Vec<&str> =
        soak["trends"].as_array().unwrap().iter().map(|trend| trend["quantity"].as_str().unwrap()).collect();
    if cfg!(target_os = "linux") {
        assert_eq!(quantities, ["memory", "descriptors", "threads", "prefill", "decode"]);
    }
    for (time, part) in [("1", "s, ms, us, min, h"), ("0s", "above 0"), ("9999h", "at most 744h")] {
        let output = place.command(&bench(&["--soak", time])).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains(part), "{stderr}");
    }
}
