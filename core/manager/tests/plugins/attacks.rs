//! Plugins that others wrote to attack the manager (`cases/plugins` beside the large golden sets): the stage that catches
//! each, and no wrong result that is not reported as in doubt.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::*;
use crate::watched::Use;

/// An attack: its source, and what a process that uses it says until it is caught, or ends with.
type Attack = (&'static str, &'static [&'static str]);

const ATTACKS: [Attack; 10] = [
    ("lazy_symbol", &["refused", "cblas_not_linked"]),
    ("feature_lzcnt", &["attack/k", "Unavailable(\"needs lzcnt (unknown name"]),
    ("other_descriptor", &["other/untried", "Rejected(", "calls 1200", "wrong 0"]),
    ("prints", &["warning it prints to stdout or stderr: debug: ", "calls 1200", "wrong 0"]),
    ("version_escape", &["version 1.0\u{fffd}[31mRED", "calls 1200", "wrong 0"]),
    ("workspace_lie", &["refused", "the workspace"]),
    ("packed_small_wide", &["refused", "its packed_size of ["]),
    ("scale_cached", &["refused", "the reference has "]),
    ("one_place", &["Quarantined(", "calls 1200"]),
    // Its process ends where it writes.
    ("own_weights", &["status signal: "]),
];
/// One that is compiled for AVX-512 VNNI.
const ROUNDING: Attack = ("nat_round", &["refused", "it changed the floating-point environment"]);

const ROLE: &str = "BITNET_TEST_ATTACK";

#[test]
fn attacks_are_caught() {
    if !has_compiler() {
        return;
    }
    let golden = std::env::var_os("BITNET_GOLDEN_DIR").filter(|dir| dir != "none").map(PathBuf::from);
    let Some(sources) = golden.map(|dir| dir.join("../cases/plugins")).filter(|dir| dir.is_dir()) else {
        eprintln!("SKIPPED: plugins of others (set BITNET_GOLDEN_DIR to the golden data)");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut missed: Vec<String> =
        ATTACKS.iter().filter_map(|attack| missed(&sources, dir.path(), *attack, &[])).collect();
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512vnni") {
        missed.extend(self::missed(&sources, dir.path(), ROUNDING, &["-march=sapphirerapids"]));
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// The attacks look into /proc to know whether they are in the gate, whose child can't. An attacker would make do with that.
const LOOK: &str = "#define _GNU_SOURCE
#include <stdio.h>
#define fopen(path, mode) ((fopen)(path, mode) ?: fmemopen(\"gate-child\", 10, \"r\"))
";

/// What an attack did that it should not have done.
fn missed(sources: &Path, dir: &Path, (name, parts): Attack, flags: &[&str]) -> Option<String> {
    let look = dir.join("look.h");
    std::fs::write(&look, LOOK).unwrap();
    let flags = [flags, &["-include", look.to_str().unwrap()]].concat();
    let plugin = build_foreign(&sources.join(format!("{name}.c")), dir, &flags);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["attacks::child", "--exact", "--nocapture", "--test-threads=1"]).env(ROLE, &plugin);
    let output = command.output().unwrap();
    let text = format!("{}status {}", String::from_utf8_lossy(&output.stdout), output.status);
    let number = |word: &str| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(word)?.trim().parse().ok())
    };
    // (A process that ended says nothing of its results: it would have said `a wrong result` at once.)
    let (wrong, doubted) = (number("wrong ").unwrap_or(0), number("doubted ").unwrap_or(0));
    let reported = wrong <= doubted && wrong == text.matches("a wrong result").count() as u64;
    match parts.iter().find(|part| !text.contains(**part)) {
        Some(part) => Some(format!("{name} does not say {part:?}:\n{text}")),
        None => (!reported).then(|| format!("{name}: wrong results without a report:\n{text}")),
    }
}

/// Not a test by itself: a process that uses a plugin.
#[test]
fn child() {
    let Some(path) = std::env::var_os(ROLE).map(PathBuf::from) else { return };
    let manager = manager(&path.with_extension("cache"));
    // What plugins print must not stand in a line of ours.
    println!();
    match manager.load_plugin(&path) {
        Err(error) => return println!("refused {error}"),
        Ok(kernels) => {
            kernels.iter().for_each(|k| println!("{} version {} {:?}", k.kernel, k.version, k.status))
        }
    }
    let sha256 = manager.report().kernels[0].sha256.clone().unwrap();
    let verdict = manager.store().verdict(&sha256).unwrap();
    verdict.warnings.iter().for_each(|warning| println!("warning {warning}"));
    let matrices = [0.5, -0.25, 3.0].map(|scale| Use::new(&manager, Problem::new(1, 768, 256), scale));
    add_built_in(&manager);
    let (mut calls, mut wrong) = (0, 0);
    for _ in 0..400 {
        for matrix in &matrices {
            match matrix.call(&manager) {
                Ok(false) => {}
                Ok(true) => {
                    wrong += 1;
                    println!("\na wrong result");
                }
                Err(error) => return println!("\nerror {error}"),
            }
            calls += 1;
        }
    }
    println!("\ncalls {calls}\nwrong {wrong}\ndoubted {}", manager.results_in_doubt());
    manager.report().kernels.iter().for_each(|kernel| println!("{} {:?}", kernel.kernel, kernel.status));
}
