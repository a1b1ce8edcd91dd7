//! The program with the feature `cuda`, on machines with a card and, as CI has it, without NVIDIA's driver.

use std::process::Command;

use serde_json::Value;

use super::Place;

const RUN: [&str; 8] = ["run", "-m", "model.gguf", "--tokens-file", "ids.txt", "--greedy", "-n", "6"];

/// As the loader's cache has it, since the program is what is asked here.
fn has_driver() -> bool {
    let known = Command::new("/sbin/ldconfig").arg("-p").output().expect("ldconfig lists what can be loaded");
    assert!(known.status.success());
    let known = String::from_utf8(known.stdout).unwrap();
    assert!(known.contains("libc.so"), "{known}");
    known.contains("libcuda.so")
}

#[test]
fn without_a_driver_the_cpu_computes_and_it_is_said() {
    let place = Place::new();
    let run = |more: &[&'static str]| [&RUN[..], &["--json"], more].concat();
    let plain = place.json(&run(&[]));
    assert_eq!((&plain["device"], &plain["generated_tokens"]), (&"flex".into(), &6.into()), "{plain}");
    if has_driver() {
        // The first token comes before what differs by rounding could have grown.
        let there = place.json(&run(&["--device", "cuda"]));
        assert_eq!(there["token_ids"][0], plain["token_ids"][0]);
        assert_eq!(there["device"], "cuda:0");
        return;
    }
    let missing = "NVIDIA's driver is not there (libcuda.so can't be loaded)";
    for device in ["cuda", "cuda:0", "cuda:0=1,flex"] {
        let error = place.error(&run(&["--device", device]));
        assert!(error.contains(missing), "{device}: {error}");
        assert!(!error.contains("panicked") && !error.contains("backtrace"), "{device}: {error}");
    }
    // The other runtimes of this build have no devices either.
    for device in ["rocm", "rocm:0", "metal"] {
        let error = place.error(&run(&["--device", device]));
        let kind = device.split(':').next().unwrap();
        let expected = match bitnet_burn::backends::devices::runtimes().contains(&kind) {
            true => format!("there is no device {device}; there are 0 of its kind"),
            false => "is not compiled in".to_owned(),
        };
        assert!(error.contains(&expected), "{device}: {error}");
    }
    // With a driver, which an empty library passes for, its compiler is what is missing next.
    let made = Command::new("cc")
        .args(["-shared", "-x", "c", "/dev/null", "-o"])
        .arg(place.path("libcuda.so"))
        .status();
    assert!(made.expect("a C compiler").success());
    let mut driven = place.command(&run(&["--device", "cuda"]));
    let error = super::error(driven.env("LD_LIBRARY_PATH", place.path("")));
    assert!(error.contains("NVRTC") && error.contains("is not there"), "{error}");

    let machine: Value = serde_json::from_str(&place.ok(&["plan", "--print-machine"])).unwrap();
    assert_eq!(machine["problems"], serde_json::json!([format!("cuda: {missing}")]), "{machine}");
    // Known from then on, and said again.
    let auto = run(&["--device", "auto"]);
    for call in [&auto[..], &["plan", "-m", "model.gguf", "--json"]] {
        let output = place.command(call).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.success() && stderr.contains(&format!("cuda: {missing}")),
            "{call:?}: {stderr}"
        );
        assert!(!stderr.contains("panicked"), "{call:?}: {stderr}");
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        if call[0] == "run" {
            assert_eq!((&json["device"], &json["token_ids"]), (&plain["device"], &plain["token_ids"]));
        } else {
            assert_eq!(
                (&json["kind"], &json["machine"]["gpus"]),
                (&"cpu_only".into(), &serde_json::json!([]))
            );
        }
    }
    let error = place.error(&["plan", "-m", "model.gguf", "--device", "cuda"]);
    assert!(error.contains("there is no device cuda; this machine has cpu"), "{error}");
}
