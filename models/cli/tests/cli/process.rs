//! Plugins that print, crash or end the process while they are in use.

use std::process::{Command, Output};

use super::{BROKEN, Place, json, plugin};

#[cfg(unix)]
const RUN: [&str; 8] = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "4", "--ignore-eos"];

/// A run with a plugin whose kernel also does this from its 21st call of a shape of the model on, which the gate does not try.
fn run(place: &Place, what: &str) -> Option<Output> {
    let define = format!("-DIN_RUN=if (w->n == 640 && w->k == 256 && TIMES(calls) >= 20) {{ {what} }}");
    if !plugin(place, "bad.so", BROKEN, &[&define]) {
        return None;
    }
    let call =
        ["run", "-m", "model.gguf", "-p", "Hello", "-n", "50", "--ignore-eos", "--json", "--threads", "1"];
    let more = ["--plugin", "bad.so", "--kernel", "example/plain"];
    Some(place.command(&[&call[..], &more].concat()).output().unwrap())
}

#[cfg(unix)]
#[test]
fn what_a_plugin_prints_is_not_in_the_output() {
    let place = Place::new();
    let Some(output) = run(&place, "printf(\"not from the model\\n\");") else { return };
    assert!(output.status.success());
    let report = json(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!(report["generated_tokens"], 50);
    assert!(String::from_utf8(output.stderr).unwrap().contains("not from the model"));
}

#[cfg(unix)]
#[test]
fn a_kernel_that_ends_the_process_is_named() {
    let place = Place::new();
    for (what, status, word) in [
        ("exit(0);", Some(1), "exit"),
        ("*(volatile int *)8 = 1;", None, "crashed (signal 11)"),
        ("abort();", None, "crashed (signal 6)"),
    ] {
        let Some(output) = run(&place, what) else { return };
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), status, "{what}: {stderr}");
        assert!(stderr.contains("kernel example/plain, function run (m = "), "{what}: {stderr}");
        assert!(stderr.contains(", n = 640, k = 256)") && stderr.contains(word), "{what}: {stderr}");
        assert_eq!(output.stdout, b"", "{what}");
    }
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#[test]
fn a_contained_kernel_that_ends_its_process_does_not_end_the_program() {
    let place = Place::new();
    let call = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "50", "--ignore-eos", "--greedy", "--json"];
    let plain = place.json(&call);
    for (i, (what, reason)) in [
        ("exit(0);", "it ended the process with status 0"),
        ("raise(SIGSEGV);", "it crashed with signal 11 (SIGSEGV)"),
        // It reads a file of the user's, and starts a program: neither comes to anything.
        ("if (fopen(\"model.gguf\", \"r\") || system(\"touch started\") == 0) y->y[0] += 1;", ""),
    ]
    .into_iter()
    .enumerate()
    {
        let define = format!("-DIN_RUN=if (w->n == 640 && w->k == 256 && TIMES(calls) >= 20) {{ {what} }}");
        let file = format!("bad{i}.so");
        if !plugin(&place, &file, BROKEN, &[&define]) {
            return;
        }
        let more = ["--threads", "1", "--plugin", &file, "--kernel", "example/plain"];
        let mut command = place.command(&[&call[..], &more].concat());
        let output = command.env("BITNET_PLUGINS", "contained").output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let report = json(std::str::from_utf8(&output.stdout).unwrap());
        assert_eq!(report["token_ids"], plain["token_ids"], "{what}: {stderr}");
        let events = report["events"].to_string();
        match reason {
            "" => assert!(output.status.success() && !events.contains("uarantined"), "{stderr} {events}"),
            // Earlier results are in doubt.
            reason => {
                assert_eq!(output.status.code(), Some(4), "{what}: {stderr}");
                assert!(events.contains(reason), "{what}: {events}");
            }
        }
    }
    assert!(!std::path::Path::new(&place.path("started")).exists());
    let text = place.command(&["plugins", "list"]).env("BITNET_PLUGINS", "contained").output().unwrap();
    assert!(String::from_utf8(text.stdout).unwrap().contains("each plugin computes in a process of its own"));
}

#[cfg(unix)]
#[test]
fn a_small_stack_is_enough() {
    let place = Place::new();
    for args in [&["--help"][..], &["plan", "-m", "model.gguf", "--measure", "nothing"], &RUN] {
        // The limit holds for the arguments and the environment, too.
        let output = Command::new("/bin/sh")
            .args(["-c", "ulimit -s 64 && exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_bitnet")])
            .args(args)
            .env_clear()
            .envs([("BITNET_CACHE_DIR", place.path("cache")), ("BITNET_CONFIG", "".into())])
            .current_dir(place.path(""))
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert_ne!(output.stdout, b"", "{args:?}");
    }
}

#[test]
fn results_in_doubt_end_with_status_4() {
    let place = Place::new();
    // Wrong from its 100th call on, when not every call is compared any more.
    let define = "-DIN_RUN=if (w->n == 640 && w->k == 256 && TIMES(calls) >= 100) y->y[tile->m0 * y->stride + tile->n0] += 1";
    if !plugin(&place, "late.so", BROKEN, &[define]) {
        return;
    }
    let call = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "120", "--ignore-eos", "--greedy", "--json"];
    let more = ["--threads", "1", "--plugin", "late.so", "--kernel", "example/plain"];
    let output = place.command(&[&call[..], &more].concat()).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    assert!(
        stderr.contains("a plugin turned out to be wrong") && stderr.contains("may be wrong"),
        "{stderr}"
    );
    let report = json(std::str::from_utf8(&output.stdout).unwrap());
    let doubts = report["doubts"].as_array().unwrap();
    assert_eq!((doubts.len(), &doubts[0]["kernel"]), (1, &"example/plain".into()), "{report}");
    let unchecked = doubts[0]["unchecked"].as_u64().unwrap();
    assert!(unchecked > 0 && stderr.contains(&format!("{unchecked} results")), "{stderr}");
    assert_eq!(report["generated_tokens"], 120, "it goes on with another kernel");
    // The plugin is in quarantine, so the same command is certain now.
    let again = place.command(&[&call[..], &["--plugin", "late.so"]].concat()).output().unwrap();
    let stderr = String::from_utf8(again.stderr).unwrap();
    assert!(again.status.success() && stderr.contains("plugin late.so: quarantined"), "{stderr}");
    let (again, plain) = (json(std::str::from_utf8(&again.stdout).unwrap()), place.json(&call));
    assert!(again["token_ids"] == plain["token_ids"] && again["doubts"].is_null(), "{again}");
}
