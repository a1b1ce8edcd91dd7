//! Two programs or two kernels, measured in turns: each turn is a process of each, so that a machine whose speed changes is the
//! same for both.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, bail};
use bitnet_burn_engine::bench::{Change, Figures, in_turns, is_worse};
use bitnet_burn_engine::text::count;
use serde::Serialize;

use super::BenchArgs;
use crate::output;
use crate::status::Status;

/// Turns, where `--repetitions` does not say how many: 6 are the fewest that can be sure.
const TURNS: usize = 8;

/// A side of a comparison.
pub struct Side {
    /// What it is called.
    name: String,
    program: PathBuf,
    /// Flags in front of the common ones.
    flags: Vec<OsString>,
}

/// The outcome.
#[derive(Serialize)]
struct Output<'a> {
    a: &'a str,
    b: &'a str,
    turns: usize,
    tolerance: f64,
    /// How good B is, compared with A.
    changes: &'a [Change],
    /// Whether nothing of B is worse; absent where neither side is the one that should be better.
    #[serde(skip_serializing_if = "Option::is_none")]
    passed: Option<bool>,
}

/// Flags of this process that its children do not get, and whether a value follows.
const OWN: [(&str, bool); 7] = [
    ("--against-program", true),
    ("--ab", true),
    ("--tolerance", true),
    ("--suite", true),
    ("--markdown", true),
    ("--html", true),
    ("--json", false),
];

/// The number of turns, which is not a number of repetitions.
const TURNS_FLAGS: [(&str, bool); 2] = [("--repetitions", true), ("-r", true)];

/// The arguments behind `bench` that children share: those that are not [`OWN`]. `--ab` has two values.
pub fn common(arguments: impl Iterator<Item = OsString>, turns: bool) -> Vec<OsString> {
    let turns = if turns { &TURNS_FLAGS[..] } else { &[] };
    let mut kept = Vec::new();
    let mut arguments = arguments.skip_while(|argument| argument != "bench").skip(1);
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        let own = OWN.iter().chain(turns).find(|(flag, value)| {
            // `--flag=value`, and `-r5`.
            let joined = if flag.starts_with("--") { format!("{flag}=") } else { (*flag).to_owned() };
            text == *flag || (*value && text.starts_with(&joined))
        });
        match own {
            None => kept.push(argument),
            Some((flag, true)) if text == *flag => {
                arguments.next();
                if *flag == "--ab" {
                    arguments.next();
                }
            }
            Some(_) => {}
        }
    }
    kept
}

impl Side {
    /// This program with the value of a flag.
    fn here(name: &str, flags: &[&str]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's file")?;
        Ok(Self { name: name.to_owned(), program, flags: flags.iter().map(OsString::from).collect() })
    }

    /// Measures once.
    fn measure(&self, common: &[OsString]) -> anyhow::Result<Figures> {
        let mut command = Command::new(&self.program);
        command.arg("bench").args(&self.flags).args(common).args(["--repetitions", "1", "--json"]);
        let output = command.stdin(Stdio::null()).stderr(Stdio::piped()).output();
        let output = output.with_context(|| format!("cannot start {}", self.program.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{}: `bench` failed ({}): {}", self.name, output.status, said.trim());
        }
        let figures = serde_json::from_slice(&output.stdout);
        figures.with_context(|| format!("{}: `bench --json` printed no report", self.name))
    }
}

/// `--against-program`: an older program, and this one.
pub fn against_program(args: &BenchArgs, older: &Path) -> anyhow::Result<ExitCode> {
    let name = older.display().to_string();
    // A name without a directory would be looked for in PATH.
    let program = older.canonicalize().with_context(|| format!("--against-program {name}"))?;
    let sides = [Side { name, program, flags: Vec::new() }, Side::here("this program", &[])?];
    run(args, &sides, true)
}

/// `--ab`: two kernels.
pub fn kernels(args: &BenchArgs, a: &str, b: &str) -> anyhow::Result<ExitCode> {
    run(args, &[Side::here(a, &["--kernel", a])?, Side::here(b, &["--kernel", b])?], false)
}

fn run(args: &BenchArgs, [a, b]: &[Side; 2], judged: bool) -> anyhow::Result<ExitCode> {
    let turns = args.repetitions.unwrap_or(TURNS);
    let common = common(std::env::args_os(), true);
    let bar = output::bar(turns as u64, "measuring in turns [{bar:30}] {pos}/{len}");
    // What is measured and packed at the first start is not part of a turn.
    for side in [a, b] {
        side.measure(&common)?;
    }
    let mut pairs = Vec::with_capacity(turns);
    for turn in 0..turns {
        // Neither side is always the first.
        pairs.push(if turn % 2 == 0 {
            let a = a.measure(&common)?;
            (a, b.measure(&common)?)
        } else {
            let b = b.measure(&common)?;
            (a.measure(&common)?, b)
        });
        bar.inc(1);
    }
    bar.finish_and_clear();
    let changes = in_turns(&pairs, args.judge.tolerance);
    let passed = judged.then(|| !is_worse(&changes));
    let Side { name: a, .. } = a;
    let Side { name: b, .. } = b;
    if args.json {
        let tolerance = args.judge.tolerance;
        output::print_json(&Output { a, b, turns, tolerance, changes: &changes, passed })?;
    } else {
        let mut text = format!("{b}, compared with {a} in {}\n", count(turns as u64, "turn"));
        for change in &changes {
            text.push_str(&format!("{change}\n"));
        }
        output::print(text.trim_end())?;
    }
    Ok(if passed == Some(false) { Status::Mismatch } else { Status::Done }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_get_the_flags_that_are_not_about_the_comparison() {
        let kept = |line: &str| -> Vec<String> {
            let kept = common(line.split(' ').map(OsString::from), true);
            kept.iter().map(|argument| argument.to_string_lossy().into_owned()).collect()
        };
        assert_eq!(
            kept("bitnet bench -m x --against-program old --tolerance=0.1 -r 9 --json -p 4"),
            ["-m", "x", "-p", "4"]
        );
        assert_eq!(kept("bitnet bench --ab a b -r9 -n 2"), ["-n", "2"]);
        assert_eq!(kept("bitnet bench --rows 3 --repetitions 2"), ["--rows", "3"]);
    }
}
