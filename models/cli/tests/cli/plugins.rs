//! Projects with kernels, and judging them.

use std::process::Command;

use super::{Place, plugin};

const GROWN: &str = "core/manager/testdata/grown.c";

/// Whether a program is there. If it must be, its absence is a failure in CI.
fn has(program: &str, argument: &str, must: bool) -> bool {
    let there = Command::new(program).arg(argument).output().is_ok_and(|output| output.status.success());
    if !there {
        assert!(!must || std::env::var_os("CI").is_none(), "no {program} in CI");
        eprintln!("SKIPPED: a project (no {program})");
    }
    there
}

fn runs(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_new_project_builds_and_passes_the_gate() {
    let place = Place::empty();
    let library =
        |name: &str| format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    for (lang, program, library) in [
        ("c", "make", "libmine_c.so".to_owned()),
        ("cpp", "make", "libmine_cpp.so".into()),
        ("rust", env!("CARGO"), format!("target/release/{}", library("mine_rust"))),
        ("wgsl", env!("CARGO"), format!("target/release/{}", library("mine_wgsl"))),
        ("zig", "zig", library("mine_zig")),
    ] {
        let argument = if lang == "zig" { "version" } else { "--version" };
        if !has(program, argument, lang != "zig") {
            continue;
        }
        let name = format!("mine-{lang}");
        let text = place.ok(&["plugins", "new", &name, "--lang", lang]);
        assert!(text.contains(&format!("cd {name}\n")) && text.contains(&library), "{text}");
        // The command that the text names.
        let build = text.lines().nth(2).unwrap().trim();
        let mut words = build.split(' ');
        assert!(program.ends_with(words.next().unwrap()), "{build}");
        let mut command = Command::new(program);
        command.args(words).current_dir(place.path(&name)).env_remove("CARGO_TARGET_DIR");
        runs(command.env("CARGO_NET_OFFLINE", "true"));
        let library = format!("{name}/{library}");
        let output = place.command(&["plugins", "verify", "--json", &library]).output().unwrap();
        let report = super::json(&String::from_utf8(output.stdout).unwrap());
        assert_eq!(report["plugin"]["name"], name.as_str(), "{report}");
        // Without a GPU, kernels for one are not tried.
        assert!(report["refusal"].is_null() && (report["passed"] == true || lang == "wgsl"), "{report}");
    }
    let refused = place.error(&["plugins", "new", "mine-c", "--lang", "rust"]);
    assert!(refused.contains("mine-c: the directory is not empty"), "{refused}");
    let refused = place.error(&["plugins", "new", "Mine", "--lang", "c"]);
    assert!(refused.contains("begins with a letter"), "{refused}");
}

#[test]
fn a_plugin_is_judged_against_the_best_known_kernel() {
    let place = Place::empty();
    let optimised = ["-O3", "-Wno-unused-function"];
    if !plugin(&place, "grown.so", GROWN, &optimised)
        || !plugin(&place, "bad.so", super::BROKEN, &["-DWRONG=1"])
    {
        return;
    }
    place.write(
        "task.json",
        r#"{"name": "small", "shapes": [{"m": 1, "n": 64, "k": 128}, {"m": 32, "n": 64, "k": 128, "weight": 2}]}"#,
    );
    let judge = ["plugins", "judge", "grown.so", "--task", "task.json", "--history", "judged.jsonl"];
    let first = place.json(&[&judge[..], &["--json"]].concat());
    let score = |output: &serde_json::Value, name: &str| output["score"][name].as_f64().unwrap();
    assert!(
        score(&first, "low") <= score(&first, "value") && score(&first, "value") <= score(&first, "high"),
        "{first}"
    );
    assert_eq!(
        (&first["gate_passed"], &first["best_known"]),
        (&true.into(), &serde_json::Value::Null),
        "{first}"
    );
    let shapes = first["shapes"].as_array().unwrap();
    assert_eq!(shapes.len(), 2);
    for shape in shapes {
        assert!(shape["plugin"]["kernel"].as_str().unwrap().starts_with("grown/"), "{shape}");
        assert!(shape["built_in"]["kernel"].as_str().unwrap().starts_with("cpu/"), "{shape}");
        assert!(shape["plugin"]["speed"]["g_per_s"].as_f64().unwrap() > 0.0, "{shape}");
    }
    // The second time, the first result is the best known one.
    let text = place.ok(&judge);
    assert!(
        text.contains("grown 1.0: task small") && text.contains("the best known, grown 1.0 with "),
        "{text}"
    );
    // What the gate refuses is no candidate, and stands in the history.
    let judge_bad = ["plugins", "judge", "bad.so", "--task", "task.json", "--history", "judged.jsonl"];
    assert!(place.error(&judge_bad).contains("the gate refuses this plugin"));
    let history = std::fs::read_to_string(place.path("judged.jsonl")).unwrap();
    assert_eq!(history.lines().count(), 3, "{history}");
    assert!(history.lines().nth(2).unwrap().contains("\"gate_passed\":false"), "{history}");
    place.write("judged.jsonl", "nonsense\n");
    assert!(place.error(&judge).contains("judged.jsonl: line 1 is no result"));
}

#[test]
fn layouts_compete_by_a_rule_that_the_explanation_shows() {
    let place = Place::empty();
    for (goal, rule, rows) in [
        (
            "balanced",
            "t(1) + 2 t(32) / 32, times 1.25 where t(1) is more than 1.15 times the lowest",
            &[1, 32][..],
        ),
        ("decode", "t(1)", &[1]),
        ("prefill", "t(32) / 32", &[32]),
        ("throughput", "t(8) / 8 + 2 t(32) / 32", &[8, 32]),
    ] {
        let args = ["kernels", "--threads", "1", "--optimise-for", goal, "--explain", "1x64x128"];
        let report = place.json(&[&args[..], &["--json"]].concat());
        let explanation = &report["explanations"][0];
        assert_eq!((&explanation["objective"], &explanation["rule"]), (&goal.into(), &rule.into()));
        let layouts = explanation["layouts"].as_array().unwrap();
        assert_eq!(layouts[0]["layout"], explanation["layout"]);
        let fastest = layouts[0]["fastest"].as_array().unwrap();
        assert_eq!(fastest.iter().map(|row| row["rows"].as_u64().unwrap()).collect::<Vec<_>>(), rows);
        let text = place.ok(&args);
        assert!(text.contains(&format!("layouts compete on {rule} (--optimise-for {goal})")), "{text}");
    }
    let wrong = place.command(&["kernels", "--optimise-for", "speed"]).output().unwrap();
    assert!(
        String::from_utf8_lossy(&wrong.stderr).contains("expected balanced, decode, prefill or throughput")
    );
}

#[test]
fn a_kernel_says_why_it_does_not_compute_and_is_named_beside_the_one_that_does() {
    let place = Place::empty();
    if !plugin(&place, "grown.so", GROWN, &["-O3", "-Wno-unused-function"]) {
        return;
    }
    let args = ["kernels", "--threads", "1", "--plugin", "grown.so", "--explain", "1x64x128"];
    let mut command = place.command(&args);
    let text = super::ok(command.env("BITNET_PLUGIN_CONFIG", "grown.only=prompts"));
    assert!(
        text.contains("grown/t2-prompts does not compute this: it is for prompts of 17 rows or more"),
        "{text}"
    );
    let verified = super::ok(
        place.command(&["plugins", "verify", "grown.so"]).env("BITNET_PLUGIN_CONFIG", "grown.only=prompts"),
    );
    assert!(
        verified.contains("log: info: bitnet-burn ") && verified.contains("as 'grown.only=prompts'"),
        "{verified}"
    );
}
