//! The fuzz targets of `fuzz/` on stable Rust: each runs its seeds and a fixed number of mutants of them, the same ones
//! every time. Campaigns with libFuzzer: docs/reliability.md.

#[path = "../../fuzz/src/core/mod.rs"]
mod core;
#[path = "../../fuzz/src/engine/mod.rs"]
mod engine;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use bitnet_burn_formats::random::SplitMix64;
use engine::{models, records, texts};

use core::{caches, descriptor, gguf, safetensors};

/// Mutants of each target. The tokenizer's take longest: each builds its regular expressions.
const CASES: usize = 2000;
const TOKENIZER_CASES: usize = 200;
/// A case that takes longer hangs. (They take milliseconds.)
const LIMIT: Duration = Duration::from_secs(20);
/// Longer inputs are cut.
const MAX_BYTES: usize = 64 << 10;

/// Runs a target on its seeds, `seeds/TARGET` in `fuzz/` with `built`, on what lies in `hostile`, and on mutants of all of
/// them. The seeds must be accepted, some mutants as well, and others not. Returns the inputs that were accepted.
fn fuzz(name: &str, target: fn(&[u8]) -> bool, built: Vec<Vec<u8>>, hostile: &[&str]) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut seeds = built;
    seeds.extend(files(&root.join("fuzz/seeds").join(name)));
    let good = seeds.len();
    assert!(good > 0, "{name}: no seeds");
    let hostile = hostile.iter().flat_map(|dir| files(&root.join(dir)));
    seeds.extend(hostile.filter(|file| file.len() <= MAX_BYTES));
    let scratch = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fuzz").join(name);
    std::fs::create_dir_all(&scratch).unwrap();
    let mut random = SplitMix64::new(name.bytes().fold(0, |hash, byte| hash << 5 ^ u64::from(byte)));
    let cases = if name == "tokenizer" { TOKENIZER_CASES } else { CASES };
    let mutants: Vec<Vec<u8>> = (0..cases).map(|_| mutant(&seeds, good, &mut random)).collect();
    let inputs = [seeds, mutants].concat();
    let keep = |what: &str, i: usize| {
        let path = scratch.join(format!("{what}-{i}"));
        std::fs::write(&path, &inputs[i]).unwrap();
        path.display().to_string()
    };
    // A campaign begins with them, too.
    for i in 0..good {
        keep("seed", i);
    }
    let (sender, results) = channel();
    let accepted = std::thread::scope(|scope| {
        let all = &inputs;
        scope.spawn(move || {
            for input in all {
                sender.send(target(input)).expect("somebody listens");
            }
        });
        let mut accepted = Vec::new();
        for (i, input) in all.iter().enumerate() {
            match results.recv_timeout(LIMIT) {
                Ok(true) => accepted.push(input.clone()),
                Ok(false) => assert!(i >= good, "{name} refuses {}", keep("seed", i)),
                // A panic would wait for the thread.
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("{name} hangs on {}", keep("hang", i));
                    std::process::abort();
                }
                Err(RecvTimeoutError::Disconnected) => panic!("{name} panics on {}", keep("panic", i)),
            }
        }
        accepted
    });
    println!("{name}: {cases} mutants of {} inputs, {} accepted", inputs.len() - cases, accepted.len());
    assert!(accepted.len() < inputs.len(), "{name} accepts everything");
    accepted
}

/// The files of a directory, by name.
fn files(dir: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut paths: Vec<_> =
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// A seed with up to four changes; every other time one of the `good` seeds, which come first.
fn mutant(seeds: &[Vec<u8>], good: usize, random: &mut SplitMix64) -> Vec<u8> {
    let mut below = |limit: usize| random.below(limit as u64) as usize;
    let among = [good, seeds.len()][below(2)];
    let mut input = seeds[below(among)].clone();
    for _ in 0..=below(4) {
        let at = below(input.len() + 1);
        let end = (at + 1 + below(16)).min(input.len());
        match below(12) {
            0 | 1 => input[at..end].iter_mut().take(1).for_each(|byte| *byte ^= 1 << below(8)),
            2 => input[at..end].iter_mut().for_each(|byte| *byte = below(256) as u8),
            3 => drop(input.drain(at..end)),
            // Twice the same, and a part of another seed.
            4 => drop(input.splice(at..at, input[at..end].to_vec())),
            5 => {
                let other = &seeds[below(seeds.len())];
                let from = below(other.len() + 1);
                let part = &other[from..(from + 1 + below(64)).min(other.len())];
                input.splice(at..end, part.iter().copied());
            }
            // Numbers at the edges, as bytes and as text.
            6 | 7 => {
                let edges = [0u64, 1, 0x7f, 0xffff, 1 << 31, 0xffff_ffff, 1 << 60, u64::MAX];
                let edge = edges[below(edges.len())].to_le_bytes();
                input[at..]
                    .iter_mut()
                    .zip(&edge[..[1, 2, 4, 8][below(4)]])
                    .for_each(|(to, from)| *to = *from);
            }
            8..=10 => {
                let numbers =
                    ["0", "-1", "1e308", "18446744073709551616", "9007199254740993", "0.1", "null", "[]"];
                if let Some(start) = input[at..].iter().position(u8::is_ascii_digit).map(|start| at + start) {
                    let digits = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                    input.splice(start..start + digits, numbers[below(numbers.len())].bytes());
                }
            }
            _ => input.truncate(at),
        }
    }
    input.truncate(MAX_BYTES);
    input
}

#[test]
fn descriptors() {
    fuzz("descriptor", descriptor::descriptor, Vec::new(), &[]);
}

#[test]
fn gguf_files() {
    fuzz("gguf", gguf::run, Vec::new(), &["models/engine/testdata/hostile"]);
}

#[test]
fn gguf_models() {
    fuzz("model", models::gguf, Vec::new(), &["models/engine/testdata/hostile"]);
}

#[test]
fn safetensors_files() {
    fuzz("safetensors", safetensors::run, Vec::new(), &[]);
}

#[test]
fn configurations() {
    fuzz("config", models::config, Vec::new(), &[]);
}

#[test]
fn tokenizers() {
    fuzz("tokenizer", texts::tokenizer, Vec::new(), &[]);
}

#[test]
fn chat_templates() {
    fuzz("template", texts::template, Vec::new(), &["models/engine/testdata/chat"]);
}

#[test]
fn receipts() {
    let seeds = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/receipt"));
    let accepted = fuzz("receipt", records::receipt, Vec::new(), &[]);
    // No mutant has a right seal.
    assert!(
        accepted.iter().all(|receipt| seeds.contains(receipt)),
        "a receipt that was changed was accepted"
    );
}

#[test]
fn machine_profiles() {
    fuzz("machine", records::machine, Vec::new(), &[]);
}

#[test]
fn packed_weights() {
    bitnet_burn_tests::setup();
    fuzz("prepacked", models::prepacked, vec![models::prepacked_seed()], &[]);
}

#[test]
fn tuning_caches() {
    fuzz("tuning", caches::tuning, vec![caches::tuning_seed()], &[]);
}

#[test]
fn verdicts_on_plugins() {
    fuzz("verdict", caches::verdict, vec![caches::verdict_seed()], &[]);
}

#[test]
fn pins_of_plugins() {
    fuzz("pins", caches::pins, Vec::new(), &[]);
}
