//! Files that are written, and files that change while they are read.

use std::io::Read as _;
use std::process::{Child, Stdio};

use super::Place;

#[cfg(unix)]
#[test]
fn links_are_followed_and_pipes_are_written_into() {
    use std::os::unix::fs::{FileTypeExt as _, symlink};
    // The same kernel in every run, so that reports differ in figures alone.
    const RUN: [&str; 9] = ["run", "-m", "model.gguf", "-p", "Hi", "-n", "2", "--kernel", "t2-scalar"];
    let place = Place::new();
    std::fs::create_dir(place.path("elsewhere")).unwrap();
    for (name, args) in [
        ("model", &["convert", "model.gguf", "--to", "gguf", "--force", "--out", "link-model"][..]),
        ("synth", &["synth", "--shape", "tiny", "--out", "link-synth"]),
        ("logits", &["logits", "-m", "model.gguf", "--tokens-file", "ids.txt", "--out", "link-logits"]),
        ("receipt", &[&RUN[..], &["--receipt", "link-receipt"]].concat()),
        ("report", &[&RUN[..], &["--report", "link-report"]].concat()),
    ] {
        let (file, link, pipe) =
            (format!("elsewhere/{name}"), format!("link-{name}"), format!("pipe-{name}"));
        place.write(&file, "");
        symlink(&file, place.path(&link)).unwrap();
        place.ok(args);
        assert!(place.path(&link).is_symlink(), "{name}");
        let written = std::fs::read(place.path(&file)).unwrap();
        assert!(!written.is_empty(), "{name}");

        let path = place.path(&pipe);
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let reader = std::thread::spawn({
            let path = path.clone();
            move || std::fs::read(path).unwrap().len()
        });
        let args: Vec<&str> = args.iter().map(|arg| if *arg == link { pipe.as_str() } else { arg }).collect();
        place.ok(&args);
        // Times and rates have more or fewer digits.
        assert!(reader.join().unwrap().abs_diff(written.len()) < 100, "{name}");
        assert!(std::fs::metadata(&path).unwrap().file_type().is_fifo(), "{name}");
    }
}

/// A generation that has begun and will go on for a while.
fn running(place: &Place, more: &[&str]) -> Child {
    let call = ["run", "-q", "-m", "model.gguf", "--tokens-file", "ids.txt", "--print-ids", "--ignore-eos"];
    let mut command = place.command(&[&call[..], &["--sliding-window"], more].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The first token is there.
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
    child
}

#[test]
fn a_receipt_is_not_written_for_a_model_that_was_replaced() {
    let place = Place::new();
    place.ok(&["synth", "--shape", "tiny", "--seed", "8", "--out", "other.gguf"]);
    let child = running(&place, &["-n", "2000", "--receipt", "r.json"]);
    std::fs::rename(place.path("other.gguf"), place.path("model.gguf")).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("model.gguf") && stderr.contains("was replaced or changed"), "{stderr}");
    assert!(!place.path("r.json").exists());
}

#[cfg(any(target_os = "linux", target_os = "macos"))]
#[test]
fn a_model_that_is_truncated_while_it_computes_is_named() {
    let place = Place::new();
    let child = running(&place, &["-n", "100000000"]);
    let file = std::fs::File::options().write(true).open(place.path("model.gguf")).unwrap();
    file.set_len(2000).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("model.gguf") && stderr.contains("became shorter"), "{stderr}");
}

/// Whether something unfinished is there, and not empty.
#[cfg(unix)]
fn unfinished(place: &Place) -> bool {
    let has_bytes = |path: std::path::PathBuf| match std::fs::read_dir(&path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => std::fs::metadata(&path).is_ok_and(|meta| meta.len() > 0),
    };
    let entries = std::fs::read_dir(place.path("")).unwrap().flatten();
    entries.filter(|e| e.file_name().to_string_lossy().starts_with(".bitnet-")).any(|e| has_bytes(e.path()))
}

#[cfg(unix)]
#[test]
fn what_a_signal_interrupts_leaves_nothing() {
    use std::process::Command;
    use std::time::{Duration, Instant};
    let place = Place::new();
    let ids: Vec<_> = (0..100_000).map(|id| (id % 500).to_string()).collect();
    place.write("many.txt", ids.join(" "));
    place.ok(&["synth", "--context-length", "200000", "--out", "long.gguf"]);
    let names = || -> Vec<String> {
        let entries = std::fs::read_dir(place.path("")).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
        // Measurements of kernels are kept there.
        names.retain(|name| name != "cache");
        names.sort();
        names
    };
    let before = names();
    for (signal, args) in [
        ("-INT", &["synth", "--shape", "2b-4t", "--out", "large.gguf"][..]),
        ("-TERM", &["synth", "--shape", "2b-4t", "--out", "large.gguf"]),
        ("-INT", &["logits", "-m", "long.gguf", "--tokens-file", "many.txt", "--out", "large.npy"]),
        ("-INT", &["convert", "long.gguf", "--to", "gguf", "--embedding", "f32", "--out", "other.gguf"]),
    ] {
        let mut child =
            place.command(args).env("TMPDIR", place.path("")).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while !unfinished(&place) {
            assert!(child.try_wait().unwrap().is_none(), "{args:?} ended by itself");
            assert!(started.elapsed() < Duration::from_secs(60), "{args:?} wrote nothing");
            std::thread::sleep(Duration::from_micros(100));
        }
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(if args[0] == "convert" { 1 } else { 130 }),
            "{args:?}: {stderr}"
        );
        assert_eq!(names(), before, "{args:?}: {stderr}");
    }
}
