//! The plugins that authors start from, built as they would build them: outside of this workspace, against
//! the SDK crate or the header alone, with one command; and what the documentation shows.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::*;
use bitnet_burn_manager::KernelManager;
use bitnet_burn_manager::plugin::Plugin;
use bitnet_burn_manager::{LayoutPolicy, ManagerConfig, Source, Status};

fn repository() -> PathBuf {
    package().join("../..").canonicalize().unwrap()
}

fn write(path: &Path, content: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

/// Builds a project that depends on the SDK by path; its only library.
fn cargo_build(project: &Path) -> PathBuf {
    let manifest = std::fs::read_to_string(project.join("Cargo.toml")).unwrap();
    let sdk = repository().join("plugins/abi");
    let line =
        manifest.lines().find(|line| line.starts_with("bitnet-burn-plugin")).expect("it depends on the SDK");
    let dependency = format!("bitnet-burn-plugin = {{ path = {:?} }}", sdk.to_str().unwrap());
    std::fs::write(project.join("Cargo.toml"), manifest.replace(line, &dependency)).unwrap();
    let target = project.join("target");
    let mut command = Command::new(env!("CARGO"));
    run(command
        .args(["build", "--release", "--offline"])
        .current_dir(project)
        .env("CARGO_TARGET_DIR", &target));
    let entries = std::fs::read_dir(target.join("release")).unwrap().map(|e| e.unwrap().path());
    let libraries: Vec<_> =
        entries.filter(|p| p.extension().is_some_and(|e| e == std::env::consts::DLL_EXTENSION)).collect();
    assert_eq!(libraries.len(), 1, "{libraries:?}");
    libraries[0].clone()
}

fn make(project: &Path) -> PathBuf {
    let include = repository().join("plugins/abi/include");
    run(Command::new("make").arg("-C").arg(project).arg(format!("INCLUDE={}", include.display())));
    project.join("libexample_kernels_c.so")
}

fn copy(template: &str, files: &[&str], to: &Path) -> PathBuf {
    let project = to.join("project");
    for file in files {
        let content =
            std::fs::read_to_string(repository().join("examples").join(template).join(file)).unwrap();
        write(&project.join(file), &content);
    }
    project
}

bitnet_burn_plugin::plugin! {
    static LINKED_IN = { name: c"linked-in", version: c"0.1.0", kernels: [Plain] };
}

/// A faster kernel from a file is measured, chosen, used and reported by a program that knew nothing of it.
fn is_picked_up(library: &Path, plugin: &str, kernels: &[&str], cache: &Path) {
    let manager = KernelManager::new(ManagerConfig {
        threads: 1,
        tune_budget: Duration::from_secs(60),
        ..config(cache)
    })
    .unwrap();
    manager.register(Plugin::built_in(&LINKED_IN).unwrap()).unwrap();
    let reports = manager.load_plugin(library).unwrap();
    let names: Vec<_> = reports.iter().map(|report| report.kernel.as_str()).collect();
    assert_eq!(names, kernels);
    let ranking = manager.explain(1, (512, 1024));
    assert_eq!(ranking.source, Source::Measured);
    let best = ranking.candidates[0].kernel().to_owned();
    assert!(best.starts_with(plugin), "{ranking:?}");
    for (m, n, k) in [(1, 512, 1024), (6, 33, 200), (70, 18, 130)] {
        check(&manager, m, n, k, &best);
    }
    let report = manager.report();
    let used: Vec<_> = report.kernels.iter().filter(|kernel| kernel.calls > 0).collect();
    assert!(used.iter().all(|k| k.kernel.starts_with(plugin) && k.version == "0.1.0" && k.sha256.is_some()));
    assert!(!used.is_empty() && report.fallbacks.is_empty(), "{report:?}");
    assert!(report.kernels.iter().all(|kernel| !matches!(kernel.status, Status::Quarantined(_))));
}

#[test]
fn the_rust_template_is_built_outside_of_the_workspace_and_picked_up() {
    let dir = tempfile::tempdir().unwrap();
    let project = copy("plugin-rust", &["Cargo.toml", "src/lib.rs"], dir.path());
    let library = cargo_build(&project);
    let kernels: &[&str] = match cfg!(target_arch = "x86_64") {
        true => &["example-rust/avx2", "example-rust/portable"],
        false => &["example-rust/portable"],
    };
    is_picked_up(&library, "example-rust/", kernels, &dir.path().join("cache"));
}

#[test]
fn the_c_template_is_built_with_make_and_picked_up() {
    if !has_compiler() || Command::new("make").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "no make in CI");
        return eprintln!("SKIPPED: the C template (no make)");
    }
    let dir = tempfile::tempdir().unwrap();
    let project = copy("plugin-c", &["Makefile", "kernels.c"], dir.path());
    let library = make(&project);
    let kernels: &[&str] = match cfg!(target_arch = "x86_64") {
        true => &["example-c/avx2", "example-c/portable"],
        false => &["example-c/portable"],
    };
    is_picked_up(&library, "example-c/", kernels, &dir.path().join("cache"));
}

/// The blocks of a language in docs/plugins.md.
fn shown(language: &str) -> Vec<String> {
    let text = std::fs::read_to_string(repository().join("docs/plugins.md")).unwrap();
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned()).collect()
}

#[test]
fn what_the_documentation_shows_builds_and_passes() {
    let dir = tempfile::tempdir().unwrap();
    let project = dir.path().join("project");
    let [manifest, code] = [shown("toml"), shown("rust")].map(|mut blocks| blocks.remove(0));
    write(&project.join("Cargo.toml"), &format!("{manifest}\n[workspace]\n"));
    write(&project.join("src/lib.rs"), &code);
    let library = cargo_build(&project);
    let manager = manager(&dir.path().join("cache"));
    assert_eq!(manager.load_plugin(&library).unwrap()[0].status, Status::Ready);
    if has_compiler() {
        let source = dir.path().join("mine.c");
        write(&source, &shown("c")[0]);
        let library = dir.path().join("libmine.so");
        let include = repository().join("plugins/abi/include");
        let mut command = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
        command.args(["-O2", "-shared", "-fPIC", "-ffp-contract=off", "-I"]).arg(include);
        run(command.arg("-o").arg(&library).arg(&source));
        assert_eq!(manager.load_plugin(&library).unwrap()[0].status, Status::Ready);
    }
    for (n, k) in [(40, 300), (33, 128)] {
        let (choice, _) =
            manager.choose_and_pack((n, k), LayoutPolicy::Any, &Problem::new(1, n, k).weights).unwrap();
        assert_eq!(choice.layout(), None);
        check(&manager, 2, n, k, "the examples of the documentation");
    }
}
