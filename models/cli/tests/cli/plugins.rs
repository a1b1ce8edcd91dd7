//! Plugins: projects with kernels, judging them, what the gate keeps out, and what is remembered.

use std::process::{Command, Output};

use serde_json::Value;

use super::{BROKEN, Place, TEMPLATE, error, json, ok, plugin};

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

#[test]
fn a_refused_plugin_does_not_keep_the_others_from_being_used() {
    let place = Place::new();
    let name = format!("not_a_library.{}", std::env::consts::DLL_EXTENSION);
    place.write(&name, "nothing of the kind");
    let call = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "2", "--json"];
    let plain = place.json(&call);
    let with_flag = place.command(&[&call[..], &["--plugin", &name]].concat()).output().unwrap();
    assert!(String::from_utf8_lossy(&with_flag.stderr).contains("not a loadable library"));
    let report = json(std::str::from_utf8(&with_flag.stdout).unwrap());
    assert_eq!(report["token_ids"], plain["token_ids"]);
    assert!(report["refused_plugins"][0].as_str().unwrap().contains(&name));

    // The same through a directory in the environment; in strict mode it is an error.
    let directory = place.0.path();
    let report = json(&ok(place.command(&call).env("BITNET_PLUGIN_PATH", directory)));
    assert_eq!(report["refused_plugins"].as_array().unwrap().len(), 1);
    let mut strict = place.command(&call);
    let stderr = error(strict.env("BITNET_PLUGIN_PATH", directory).env("BITNET_STRICT_MODE", "1"));
    assert!(stderr.contains("strict mode") && stderr.contains(&name), "{stderr}");
    let listed = place.json(&["kernels", "--json", "--plugin", "missing.so"]);
    assert!(listed["refused_plugins"][0].as_str().unwrap().contains("missing.so"));
}

#[test]
fn a_plugin_is_verified_listed_measured_pinned_and_forgotten() {
    let place = Place::empty();
    if !plugin(&place, "good.so", TEMPLATE, &[])
        || !plugin(&place, "bad.so", BROKEN, &["-DIN_RUN=if (w->n == 33) abort()"])
    {
        return;
    }
    let text = place.ok(&["plugins", "verify", "good.so"]);
    for part in ["example-c 0.1.0, ABI 1.3", "example-c/portable", "cases passed", "passed by gate "] {
        assert!(text.contains(part), "{text}");
    }
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    assert!(text.contains("confined by seccomp: no sockets") && text.contains("landlock"), "{text}");
    let good = place.json(&["plugins", "verify", "--json", "good.so"]);
    assert_eq!((&good["passed"], &good["plugin"]["name"]), (&true.into(), &"example-c".into()));
    let hash = good["sha256"].as_str().unwrap().to_owned();

    // Refused: the exit status, the message, and the report.
    let stderr = place.error(&["plugins", "verify", "bad.so"]);
    assert!(stderr.contains("kernel example/plain, [1, 129] x [33, 129]ᵀ"), "{stderr}");
    let output = place.command(&["plugins", "verify", "--json", "bad.so"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let bad = json(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!((&bad["passed"], &bad["refusal"]["stage"]), (&false.into(), &"before".into()));
    assert!(bad["refusal"]["reason"].as_str().unwrap().contains("signal 6 (SIGABRT)"), "{bad}");

    let bench =
        place.json(&["plugins", "bench", "good.so", "--shape", "1x256x512", "--threads", "1", "--json"]);
    let result = &bench["results"][0];
    assert!(result["plugin"]["kernel"].as_str().unwrap().starts_with("example-c/"), "{bench}");
    assert!(result["built_in"]["kernel"].as_str().unwrap().starts_with("cpu/"), "{bench}");
    assert!(result["speedup"].as_f64().unwrap() > 0.0);
    let table = place.ok(&["plugins", "bench", "good.so", "--shape", "1x256x512", "--threads", "1"]);
    assert!(table.contains("SPEEDUP") && table.contains("example-c/"), "{table}");

    let listed = place.json(&["plugins", "list", "--json"]);
    let known = listed["plugins"].as_array().unwrap();
    assert_eq!((known.len(), &listed["pins"]), (2, &Value::Null));
    let text = place.ok(&["plugins", "list"]);
    for part in ["example-c", "passed, ", "refused", &hash[..16], "SIGABRT", "pins: none"] {
        assert!(text.contains(part), "{part}: {text}");
    }

    // Pinned: nothing else is loaded, in any program.
    let kernels = |file: &str| place.json(&["kernels", "--json", "--plugin", file]);
    let listed = |report: &Value| {
        let kernels = report["kernels"].as_array().unwrap();
        kernels
            .iter()
            .any(|kernel| kernel["kernel"] == "example-c/portable" && kernel["status"]["state"] == "ready")
    };
    assert!(plugin(&place, "other.so", TEMPLATE, &["-DNDEBUG", "-O1"]));
    assert!(listed(&kernels("other.so")));
    let text = place.ok(&["plugins", "trust", "good.so"]);
    assert!(text.contains(&hash) && text.contains("1 plugin pinned in"), "{text}");
    let refused = kernels("other.so");
    assert!(!listed(&refused));
    assert!(refused["refused_plugins"][0].as_str().unwrap().contains("`bitnet plugins trust` adds it"));
    assert!(listed(&kernels("good.so")));
    assert!(listed(&json(&ok(place
        .command(&["kernels", "--json", "--plugin", "other.so"])
        .env("BITNET_PLUGIN_PINS", "")))));
    // A pin is not needed to be tried.
    assert!(place.ok(&["plugins", "verify", "other.so"]).contains("passed by gate"));

    let output = place.command(&["plugins", "forget", &hash[..8]]).output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("has no pins any more"));
    assert!(!place.ok(&["plugins", "list"]).contains(&hash[..16]));
    assert!(!listed(&kernels("good.so")), "the file of pins is there, and empty");
    std::fs::remove_dir_all(place.path("config")).unwrap();
    assert!(listed(&kernels("good.so")));
    place.ok(&["plugins", "forget", "bad.so"]);
    assert!(place.error(&["plugins", "forget", "bad.so"]).contains("no plugin with SHA-256"));
    assert!(place.error(&["plugins", "forget", "abc"]).contains("cannot read abc"));
    assert!(place.error(&["plugins", "forget", "0123456789"]).contains("see `bitnet plugins list`"));
    assert!(place.error(&["plugins", "verify", "missing.so"]).contains("missing.so"));

    // A name that is no feature's: nothing was tried, so nothing has passed.
    assert!(plugin(&place, "feature.so", BROKEN, &["-DFEATURES=\"avx2,lzcnt\""]));
    let output = place.command(&["plugins", "verify", "feature.so"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("lzcnt (unknown name; the host knows") && text.contains("not tried by gate"),
        "{text}"
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("tried no kernel of this plugin"));
}

#[test]
fn generation_goes_on_under_hostile_plugins_and_switches_work() {
    let place = Place::new();
    let call = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "4", "--json"];
    let plain = place.json(&call);
    if !plugin(&place, "crash.so", BROKEN, &["-DNAME=\"crash\"", "-DIN_RUN=if (w->n == 640) abort()"])
        || !plugin(&place, "good.so", TEMPLATE, &[])
    {
        return;
    }
    std::fs::create_dir(place.path("plugins")).unwrap();
    for file in ["crash.so", "good.so"] {
        std::fs::rename(place.path(file), place.path("plugins").join(file)).unwrap();
    }
    // A directory on the command line; the good one forced, so that it is what computes.
    let run = |extra: &[&str], env: &[(&str, &str)]| {
        let mut command = place.command(&[&call[..], extra].concat());
        command.envs(env.iter().copied());
        command.output().unwrap()
    };
    let output = run(&["--plugin", "plugins", "--kernel", "example-c/portable"], &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("crash.so") && stderr.contains("signal 6 (SIGABRT)"), "{stderr}");
    let report = json(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!(report["token_ids"], plain["token_ids"]);
    assert_eq!(report["kernels"][0]["kernel"], "example-c/portable");
    assert_eq!(report["kernels"][0]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(
        (&report["reference_calls"], report["refused_plugins"].as_array().unwrap().len()),
        (&0.into(), 1)
    );

    // From the environment: absolute paths only.
    let path = place.path("plugins");
    let absolute = [("BITNET_PLUGIN_PATH", path.to_str().unwrap())];
    let names = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    let kernels = |env: &[(&str, &str)]| {
        let mut command = place.command(&["kernels", "--json"]);
        names(&command.envs(env.iter().copied()).output().unwrap())
    };
    assert!(kernels(&absolute).contains("example-c/portable"));
    let stderr = error(place.command(&["kernels"]).env("BITNET_PLUGIN_PATH", "plugins"));
    assert!(stderr.contains("BITNET_PLUGIN_PATH=plugins: expected absolute paths"), "{stderr}");
    // Off is off.
    assert!(!kernels(&[absolute[0], ("BITNET_PLUGINS", "off")]).contains("example-c"));
    let output = run(&["--plugin", "plugins/good.so"], &[("BITNET_PLUGINS", "off")]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("plugins are switched off"));
    assert!(error(place.command(&["kernels"]).env("BITNET_PLUGINS", "maybe")).contains("off, on or user"));
    // The user's directory, when it is asked for.
    let user = place.path("data").join("bitnet-burn/plugins");
    if cfg!(target_os = "linux") {
        std::fs::create_dir_all(&user).unwrap();
        std::fs::rename(path.join("good.so"), user.join("good.so")).unwrap();
        assert!(!kernels(&[]).contains("example-c"));
        assert!(kernels(&[("BITNET_PLUGINS", "user")]).contains("example-c/portable"));
    }
}
