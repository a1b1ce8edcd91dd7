//! A program in C that calls every function of the library, and the program that the README shows.

use std::path::{Path, PathBuf};
use std::process::Command;

use bitnet_burn_engine::synth::{self, SynthOptions, SynthScales};
use bitnet_burn_engine::{Engine, GenerateOptions};

/// Where cargo puts the libraries for this test.
fn libraries() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

/// Compiles a program, which finds the library where it is now.
fn compile(source: &Path, program: &Path) {
    let libraries = libraries();
    let output = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-I"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include"))
        .arg(source)
        .arg("-o")
        .arg(program)
        .arg("-L")
        .arg(&libraries)
        .args(["-lbitnet"])
        .arg(format!("-Wl,-rpath,{}", libraries.display()))
        .output()
        .expect("a C compiler, `cc`");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn run(program: &Path, arguments: &[&Path]) -> String {
    let cache = tempfile::tempdir().unwrap();
    let output =
        Command::new(program).args(arguments).env("BITNET_CACHE_DIR", cache.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The built-in model's answer, as the library in Rust has it.
fn expected(max_new_tokens: usize) -> String {
    let engine = Engine::options().open_built_in().unwrap();
    let options = GenerateOptions { max_new_tokens, ..engine.generate_options() };
    let mut session = engine.session().unwrap();
    session.generate("There was", &options).unwrap().map(|piece| piece.unwrap()).collect()
}

#[test]
fn every_function_does_what_the_header_says() {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/program.c");
    let program = folder.path().join("every");
    compile(&source, &program);
    assert_eq!(run(&program, &[]).trim_end_matches('\n'), expected(24));
    let chat = folder.path().join("chat.gguf");
    let options = SynthOptions {
        config: synth::shape("tiny").unwrap(),
        scales: SynthScales::Tensor,
        embedding: SynthScales::Tensor.embedding(),
        seed: 0,
    };
    synth::write(&chat, &options, &|_, _| ()).unwrap();
    run(&program, &[&chat]);
}

#[test]
fn the_program_of_the_readme_generates() {
    let folder = tempfile::tempdir().unwrap();
    let readme = include_str!("../README.md");
    let (_, code) = readme.split_once("```c\n").unwrap();
    let (code, _) = code.split_once("```").unwrap();
    let source = folder.path().join("program.c");
    std::fs::write(&source, code).unwrap();
    let program = folder.path().join("readme");
    compile(&source, &program);
    assert_eq!(run(&program, &[]), expected(128));
}
