//! `bitnet worker`, and models whose layers are on one.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::Place;

/// A worker, and what it said of itself.
struct Worker {
    child: Child,
    said: Value,
}

impl Worker {
    fn start(place: &Place, more: &[&str]) -> Self {
        // With a secret, for all machines.
        let listen = if more.contains(&"--secret-file") { "0.0.0.0:0" } else { "127.0.0.1:0" };
        let mut command = place.command(&[&["worker", "--listen", listen, "--json"], more].concat());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, said: serde_json::from_str(&line).unwrap() }
    }

    fn device(&self) -> String {
        format!("remote:{}", self.said["address"].as_str().unwrap())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_run_over_two_workers_has_the_tokens_of_one_machine() {
    let place = Place::new();
    let (one, two) = (Worker::start(&place, &[]), Worker::start(&place, &["--threads", "1"]));
    assert_eq!(
        (&one.said["device"], &one.said["version"]),
        (&json!("flex"), &json!(env!("CARGO_PKG_VERSION")))
    );
    let (one, two) = (one.device(), two.device());
    let run = |more: &[&str]| {
        let call = ["run", "-m", "model.gguf", "-p", "Hello", "-n", "8", "--greedy", "--json"];
        place.json(&[&call[..], more].concat())
    };
    let local = run(&[]);
    for (device, more, placement) in [
        (format!("{one}=1,{two}=1"), &[][..], format!("layer 0 on {one}, layer 1 on {two}")),
        (format!("{one}=1,flex=1"), &["--kv-cache", "f16"], format!("layer 0 on {one}, layer 1 on cpu")),
        (one.clone(), &["--kv-cache", "int8", "--lm-head", "int8"], String::new()),
    ] {
        let report = run(&[&["--device", &device][..], more].concat());
        let alone = run(more);
        assert_eq!(report["token_ids"], alone["token_ids"], "{device} {more:?}");
        assert_eq!(report["device"].as_str(), Some(&*device));
        if more.is_empty() {
            assert_eq!(report["token_ids"], local["token_ids"]);
        }
        let stages = report["placement"]["stages"].as_array().map(|stages| stages.len());
        assert_eq!(stages, (!placement.is_empty()).then_some(2), "{report}");
    }
    let half = run(&["--device", &one, "--gpu-layers", "1"]);
    assert_eq!(half["token_ids"], local["token_ids"]);
    assert_eq!(half["placement"]["stages"][0], json!({"device": one, "layers": {"start": 0, "end": 1}}));
}

#[test]
fn what_a_worker_can_t_do_is_said() {
    let place = Place::new();
    let mut worker = Worker::start(&place, &[]);
    let (device, address) = (worker.device(), worker.said["address"].as_str().unwrap().to_owned());
    assert!(place.error(&["worker", "--listen", &address]).contains(&format!("cannot listen on {address}")));
    assert!(place.error(&["worker", "--listen", "7158"]).contains("HOST:PORT"));
    assert!(place.error(&["worker", "--device", &device]).contains("a device of its own machine"));
    assert!(place.error(&["plan", "-m", "model.gguf", "--device", &device]).contains("only this machine"));
    let run = ["run", "-m", "model.gguf", "-p", "Hello", "--device", &device];
    let late = place.command(&run).env("BITNET_REMOTE_TIMEOUT", "soon").output().unwrap();
    assert!(String::from_utf8(late.stderr).unwrap().contains("BITNET_REMOTE_TIMEOUT=soon: expected seconds"));
    // It ends when it is asked to, and is missed then.
    if cfg!(unix) {
        let asked = Command::new("kill").args(["-TERM", &worker.child.id().to_string()]).status().unwrap();
        assert!(asked.success() && worker.child.wait().unwrap().success());
        let mut log = String::new();
        worker.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        assert!(!log.contains("panicked"), "{log}");
        let error = place.error(&run);
        assert!(error.contains(&device) && error.contains("no worker answers there"), "{error}");
    }
}

#[test]
fn other_machines_need_the_secret() {
    let place = Place::new();
    let error = place.error(&["worker", "--listen", "0.0.0.0:0"]);
    assert!(
        error.contains("can be reached from other machines") && error.contains("--secret-file F"),
        "{error}"
    );
    let text = "a secret of this test, and long enough";
    place.write("secret", text);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let set = |mode| {
            std::fs::set_permissions(place.path("secret"), std::fs::Permissions::from_mode(mode)).unwrap();
        };
        set(0o644);
        let error = place.error(&["worker", "--listen", "0.0.0.0:0", "--secret-file", "secret"]);
        assert!(
            error.contains("--secret-file secret: other users may read") && error.contains("chmod 600"),
            "{error}"
        );
        set(0o600);
    }
    let mut listening = Worker::start(&place, &["--secret-file", "secret"]);
    listening.said["address"] =
        listening.said["address"].as_str().unwrap().replace("0.0.0.0", "127.0.0.1").into();
    let device = listening.device();
    let call =
        ["run", "-m", "model.gguf", "-p", "Hello", "-n", "4", "--greedy", "--json", "--device", &device];
    let by_file = place.json(&[&call[..], &["--secret-file", "secret"]].concat());
    let by_variable = crate::ok(place.command(&call).env("BITNET_WORKER_SECRET", text));
    assert_eq!(crate::json(&by_variable)["token_ids"], by_file["token_ids"]);
    assert!(place.error(&call).contains("the worker there needs a secret: --secret-file F"));
    for (value, problem) in [
        ("another secret of this test", "the worker there has another secret"),
        ("short", "BITNET_WORKER_SECRET: the secret has 5 bytes"),
    ] {
        let error = crate::error(place.command(&call).env("BITNET_WORKER_SECRET", value));
        assert!(error.contains(problem), "{error}");
    }
}
