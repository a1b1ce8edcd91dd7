//! Training runs, by the library and by the program: interrupted, killed, resumed, and given bad input.
#![cfg(feature = "flex")]

mod data;
mod distill;
mod from;
mod lora;
mod sft;
mod sweep;
mod watch;

use bitnet_burn_engine::load::load;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_train as train;
use bitnet_burn_train::{Corpus, Metrics, TrainConfig, Trainer};
use burn::tensor::Device;

/// A text that a tiny model can learn something of.
fn text() -> String {
    let animals = ["fox", "hen", "cow", "owl", "pig", "cat"];
    let actions = ["runs to the hill", "eats a red apple", "sleeps under the tree", "sings in the rain"];
    (0..120)
        .map(|i| {
            let (a, b) = (animals[i % 6], animals[(i / 6 + i * 5 + 1) % 6]);
            format!("The {a} sees the {b}, and the {b} {}.\n", actions[(i * 7 + i / 5) % 4])
        })
        .collect()
}

const TINY: &[&str] = &[
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.context_length=24",
    "tokenizer.vocab_size=300",
    "data.documents=line",
    "data.validation=0.1",
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_steps=4",
    "run.batch_size=4",
    "run.evaluate_every=5",
    "run.checkpoint_every=4",
];

fn tiny(changes: &[&str]) -> TrainConfig {
    let mut config = TrainConfig::default();
    TINY.iter().chain(changes).for_each(|assignment| config.set(assignment).unwrap());
    config
}

fn corpus() -> Corpus {
    Corpus::new(text().lines().map(str::to_owned))
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("text.txt"), text()).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `bitnet train` with a tiny model.
    fn train(&self, run: &str, changes: &[&str]) -> Command {
        let mut command = self.bitnet(&["train", "--text", "text.txt", "--out", run]);
        TINY.iter().chain(changes).for_each(|assignment| {
            command.args(["--set", assignment]);
        });
        command
    }

    fn bitnet(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
        command.args(args).current_dir(self.0.path()).env("BITNET_CACHE_DIR", self.path("cache"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Takes the newest checkpoint of a run away and resumes it; says whether it comes back with the same weights.
    fn comes_back(&self, run: &str) -> bool {
        let (step, path) = train::checkpoints(&self.path(run)).unwrap().pop().unwrap();
        let before = self.weights(run, step);
        std::fs::remove_dir_all(path).unwrap();
        succeed(&mut self.bitnet(&["train", "--resume", run]));
        before == self.weights(run, step)
    }

    /// The weights of a run at a step.
    fn weights(&self, run: &str, step: u64) -> Vec<u8> {
        std::fs::read(self.path(run).join(format!("checkpoints/step-{step:08}/model.safetensors"))).unwrap()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", stderr(&output));
    output
}

/// Waits until a run has a checkpoint of at least `step`.
fn wait_for(run: &Path, step: u64, child: &mut Child) {
    let start = Instant::now();
    loop {
        if train::checkpoints(run).unwrap().last().is_some_and(|(done, _)| *done >= step) {
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "it ended before step {step}");
        assert!(start.elapsed() < Duration::from_secs(300), "no checkpoint of step {step}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Every checkpoint is whole, and nothing else is left but what a killed process was writing.
fn check_checkpoints(run: &Path) {
    for (_, path) in train::checkpoints(run).unwrap() {
        for file in ["config.json", "tokenizer.json", "optimizer.bpk", "training.json"] {
            assert!(path.join(file).exists(), "{}", path.join(file).display());
        }
        Checkpoint::open(&path, &OpenOptions::default()).unwrap().check().unwrap();
    }
}

#[test]
fn a_model_learns_and_serves_with_the_same_loss() {
    let dir = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let config = tiny(&["run.steps=60", "run.evaluation_sequences=0"]);
    let mut trainer = Trainer::start(&dir.path().join("run"), config, &corpus(), &device).unwrap();
    let before = trainer.evaluate().unwrap();
    trainer.run(&false.into(), &mut |_| {}).unwrap();
    let after = trainer.evaluate().unwrap();
    assert!(after.perplexity() < 0.2 * before.perplexity(), "{before:?} {after:?}");
    let rows = Metrics::read(&dir.path().join("run")).unwrap();
    assert_eq!((rows.len(), rows[59].validation_loss), (60, Some(after.loss())));
    let svg = std::fs::read_to_string(dir.path().join("run/loss.svg")).unwrap();
    assert!(svg.contains("bitnet-burn, validation"));

    // Packed in memory, and loaded from the checkpoint: through the fast kernels.
    let windows = trainer.data().validation();
    let packed = trainer.model().clone().pack().unwrap();
    let path = train::newest(&dir.path().join("run")).unwrap().unwrap();
    let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
    let loaded = load(&checkpoint, &device, &LoadOptions::default(), &mut |_| {}).unwrap();
    for model in [packed, loaded] {
        let served = train::evaluate(&model, windows, 3).unwrap();
        assert_eq!(served.tokens, after.tokens);
        let relative = (served.perplexity() / after.perplexity() - 1.0).abs();
        assert!(relative < 1e-3, "{served:?} {after:?}");
    }
}

/// Many scales, and activations by group, by row or as floats: a checkpoint holds the ternary values, which the engine knows by
/// themselves, and the masters beside them, with which the run goes on.
#[test]
fn models_with_many_scales_learn_and_serve_and_resume() {
    let device = Device::flex();
    for (scales, activations, sub_norms) in [
        ("row", "row", true),
        ("group:32", "model", false),
        ("group:64", "float", true),
        ("tensor", "group:32", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let run = |name: &str| dir.path().join(name);
        let (scales_key, rule) =
            (format!("model.scales={scales}"), format!("model.activations={activations}"));
        let sub_norms = format!("model.sub_norms={sub_norms}");
        let config = tiny(&[
            "model.hidden_size=64",
            "model.intermediate_size=64",
            &scales_key,
            &rule,
            &sub_norms,
            "model.n_layers=1",
            "run.steps=30",
            "run.evaluation_sequences=0",
        ]);
        let what = format!("{scales}, {activations}, {sub_norms}");
        let mut trainer = Trainer::start(&run("whole"), config.clone(), &corpus(), &device).unwrap();
        let before = trainer.evaluate().unwrap();
        trainer.run(&false.into(), &mut |_| {}).unwrap();
        let after = trainer.evaluate().unwrap();
        assert!(after.perplexity() < 0.5 * before.perplexity(), "{what}: {before:?} {after:?}");

        let windows = trainer.data().validation();
        let packed = trainer.model().clone().pack().unwrap();
        let path = train::newest(&run("whole")).unwrap().unwrap();
        let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
        assert!(checkpoint.warnings().is_empty(), "{what}: {:?}", checkpoint.warnings());
        // With the activations that it states; strict mode refuses floats.
        let loaded = load(&checkpoint, &device, &LoadOptions::default(), &mut |_| {});
        if activations == "float" && std::env::var_os("BITNET_STRICT_MODE").is_some() {
            assert!(loaded.unwrap_err().to_string().contains("strict mode"), "{what}");
            continue;
        }
        let loaded = loaded.unwrap();
        let served = [packed, loaded].map(|model| train::evaluate(&model, windows, 3).unwrap());
        for served in served {
            let relative = (served.perplexity() / after.perplexity() - 1.0).abs();
            assert!(relative < 1e-3, "{what}: {served:?} {after:?}");
        }
        if activations != "float" {
            assert_eq!(served[0], served[1], "{what}: the same kernels, the same numbers");
        }

        // Interrupted after 9 steps: the same masters, from masters.
        let mut cut = Trainer::start(&run("cut"), config, &corpus(), &device).unwrap();
        for _ in 0..9 {
            cut.step().unwrap();
        }
        cut.checkpoint().unwrap();
        drop(cut);
        let mut cut = Trainer::resume(&run("cut"), &corpus(), &device).unwrap();
        assert_eq!((cut.steps_done(), cut.config().model.scales.to_string()), (9, scales.to_owned()));
        cut.run(&false.into(), &mut |_| {}).unwrap();
        let masters = |name: &str| {
            let newest = train::newest(&run(name)).unwrap().unwrap();
            std::fs::read(newest.join("masters.safetensors")).unwrap()
        };
        assert!(masters("cut") == masters("whole"), "{what}");
    }
}

#[test]
fn a_float_twin_learns_and_is_no_bitnet() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny(&["run.steps=40", "model.ternary=false"]);
    let mut trainer = Trainer::start(dir.path(), config, &corpus(), &Device::flex()).unwrap();
    let before = trainer.evaluate().unwrap();
    trainer.run(&false.into(), &mut |_| {}).unwrap();
    assert!(trainer.evaluate().unwrap().perplexity() < 0.2 * before.perplexity());
    let path = train::newest(dir.path()).unwrap().unwrap();
    let error = Checkpoint::open(&path, &OpenOptions::default()).unwrap_err().to_string();
    assert!(error.contains("plain float weights"), "{error}");
}

#[test]
fn old_checkpoints_are_dropped_and_runs_are_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny(&["run.steps=14", "run.keep=2", "model.n_layers=1"]);
    let mut trainer = Trainer::start(dir.path(), config.clone(), &corpus(), &Device::flex()).unwrap();
    let error = Trainer::resume(dir.path(), &corpus(), &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    trainer.run(&false.into(), &mut |_| {}).unwrap();
    drop(trainer);
    let steps: Vec<u64> = train::checkpoints(dir.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [12, 14]);
    let names: Vec<_> = std::fs::read_dir(dir.path().join("checkpoints")).unwrap().collect();
    assert_eq!(names.len(), 2);
    let error = Trainer::start(dir.path(), config, &corpus(), &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("there is a training run in it"), "{error}");
}

#[test]
fn ctrl_c_writes_a_checkpoint_and_resuming_gives_the_same_bits() {
    let dir = Dir::new();
    let changes = &["run.steps=120", "run.keep=100"];
    succeed(&mut dir.train("whole", changes));
    let mut child = dir.train("cut", changes).spawn().unwrap();
    wait_for(&dir.path("cut"), 8, &mut child);
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    if output.status.success() {
        panic!("it was done before it was interrupted; give it more steps");
    }
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("--resume cut"), "{}", stderr(&output));
    check_checkpoints(&dir.path("cut"));
    let (done, _) = train::checkpoints(&dir.path("cut")).unwrap().pop().unwrap();
    assert!((8..120).contains(&done));
    let rows = Metrics::read(&dir.path("cut")).unwrap();
    assert_eq!(rows.last().unwrap().step, done);
    succeed(&mut dir.bitnet(&["train", "--resume", "cut"]));
    assert!(dir.weights("cut", 120) == dir.weights("whole", 120));
    let losses = |run: &str| -> Vec<(u64, f64, Option<f64>)> {
        let rows = Metrics::read(&dir.path(run)).unwrap();
        rows.into_iter().map(|row| (row.step, row.loss, row.validation_loss)).collect()
    };
    assert_eq!(losses("cut"), losses("whole"));
    // Nothing is left to do.
    let output = succeed(&mut dir.bitnet(&["train", "--resume", "cut", "--json"]));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["outcome"], &json["steps"]), (&"done".into(), &120.into()));
}

#[test]
fn a_process_killed_at_any_moment_loses_only_the_steps_since_its_checkpoint() {
    let dir = Dir::new();
    // Most of the time goes into checkpoints.
    let changes = &["run.steps=30", "run.checkpoint_every=1", "model.n_layers=1", "run.batch_size=1"];
    succeed(&mut dir.train("whole", changes));
    let mut child = dir.train("cut", changes).spawn().unwrap();
    let mut done = 0;
    for round in 0..6 {
        wait_for(&dir.path("cut"), done + 1, &mut child);
        std::thread::sleep(Duration::from_micros(700 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        check_checkpoints(&dir.path("cut"));
        done = train::checkpoints(&dir.path("cut")).unwrap().last().unwrap().0;
        if done >= 29 {
            break;
        }
        child = dir.bitnet(&["train", "--resume", "cut"]).spawn().unwrap();
    }
    let _ = child.kill();
    let _ = child.wait();
    let resumed = dir.bitnet(&["train", "--resume", "cut"]).output().unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(dir.weights("cut", 30) == dir.weights("whole", 30));
    let unfinished = std::fs::read_dir(dir.path("cut/checkpoints")).unwrap();
    assert!(
        unfinished.map(|e| e.unwrap().file_name()).all(|name| name.to_string_lossy().starts_with("step-"))
    );
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint() {
    let dir = Dir::new();
    // Files can't grow beyond 64 KiB: the first checkpoint fails, and the run can be resumed.
    let mut command = dir.train("run", &["run.steps=4"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 128; exec \"$@\"", "sh"]);
    limited.arg(command.get_program()).args(command.get_args()).current_dir(dir.0.path());
    limited.env("BITNET_CACHE_DIR", dir.path("cache"));
    let output = limited.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("model.safetensors: cannot"), "{}", stderr(&output));
    let left: Vec<_> = std::fs::read_dir(dir.path("run/checkpoints")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    succeed(&mut dir.bitnet(&["train", "--resume", "run"]));
    command = dir.train("whole", &["run.steps=4"]);
    succeed(&mut command);
    assert!(dir.weights("run", 4) == dir.weights("whole", 4));
}

/// A command that fails, and whose message has all of these parts.
fn refuse(command: &mut Command, expected: &[&str]) {
    let output = command.output().unwrap();
    let text = stderr(&output);
    assert!(!output.status.success() && !text.contains("panicked"), "{command:?}: {text}");
    expected.iter().for_each(|part| assert!(text.contains(part), "{command:?}: {part} in {text}"));
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn divergence_names_the_last_good_checkpoint() {
    let dir = Dir::new();
    // Weight decay that multiplies weights by -9.
    let changes = [
        "model.n_layers=1",
        "run.steps=200",
        "run.checkpoint_every=10",
        "optimizer.learning_rate=1",
        "optimizer.weight_decay=10",
        "optimizer.warmup_steps=0",
    ];
    refuse(
        &mut dir.train("run", &changes),
        &["diverged", "the last good checkpoint is", "run/checkpoints/step-000000"],
    );
    let (step, _) = train::checkpoints(&dir.path("run")).unwrap().pop().unwrap();
    assert!(step.is_multiple_of(10) && step < 200, "{step}");
    check_checkpoints(&dir.path("run"));
}

#[test]
fn bad_input_is_named_and_leaves_nothing() {
    let dir = Dir::new();
    std::fs::write(dir.path("empty.txt"), "").unwrap();
    std::fs::write(dir.path("bytes.txt"), b"one\ntwo \xff three").unwrap();
    std::fs::write(dir.path("short.txt"), "Hello.").unwrap();
    std::fs::write(dir.path("bad.toml"), "[run]\nstep = 5\n").unwrap();
    std::fs::write(dir.path("bad.json"), "{\"seed\": \"x\"}").unwrap();
    for (args, expected) in [
        (&["--text", "empty.txt"][..], &["empty.txt", "no text"][..]),
        (&["--text", "none.txt"], &["none.txt", "No such file"]),
        (&["--text", "bytes.txt"], &["bytes.txt", "line 2", "0xff"]),
        (&["--text", "short.txt"], &["sequence"]),
        (&["--text", "text.txt", "--config", "bad.toml"], &["bad.toml", "step"]),
        (&["--text", "text.txt", "--config", "bad.json"], &["bad.json", "expected u64"]),
        (&["--text", "text.txt", "--set", "run.sequence_length=300"], &["run.sequence_length", "256"]),
        (&["--text", "text.txt", "--set", "tokenizer.file=no.json"], &["no.json"]),
        (&["--text", "text.txt", "--scales", "group:48"], &["group:48", "32, 64, 128 or 256"]),
        (&["--text", "text.txt", "--scales", "group:256"], &["model.scales", "down projections [256, 640]"]),
        (
            &["--text", "text.txt", "--scales", "group:64", "--activations", "row"],
            &["model.activations", "use group:64"],
        ),
        (&["--text", "text.txt", "--scales", "row", "--float"], &["model.scales", "float twin"]),
        (&["--text", "text.txt", "--set", "tokenizer.file=text.txt"], &["tokenizer"]),
    ] {
        refuse(dir.bitnet(&["train", "--out", "bad"]).args(args), expected);
        assert!(!dir.path("bad").exists(), "{args:?}");
    }
    refuse(&mut dir.bitnet(&["train", "--resume", "none"]), &["none", "no training run"]);

    // Scales by group: what says so is kept, and a format that can't hold them exactly says what to do.
    let wide = ["run.steps=2", "model.hidden_size=64", "model.intermediate_size=64"];
    succeed(dir.train("groups", &wide).args(["--scales", "group:32", "--activations", "group:32"]));
    let toml = std::fs::read_to_string(dir.path("groups/config.toml")).unwrap();
    assert!(toml.contains("scales = \"group:32\"") && toml.contains("activations = \"group:32\""), "{toml}");
    succeed(&mut dir.bitnet(&["run", "-m", "groups/checkpoints/step-00000002", "-p", "The", "-n", "2"]));
    succeed(&mut dir.bitnet(&["export", "groups", "--to", "hf", "--out", "exported"]));
    succeed(&mut dir.bitnet(&["run", "-m", "exported", "-p", "The", "-n", "2"]));
    refuse(
        &mut dir.bitnet(&["export", "groups", "--to", "gguf", "--out", "exported.gguf"]),
        &["--requantise"],
    );

    succeed(&mut dir.train("run", &["run.steps=5"]));
    let resume = || dir.bitnet(&["train", "--resume", "run"]);
    std::fs::write(dir.path("text.txt"), text() + "The pig is here.\n").unwrap();
    refuse(&mut resume(), &["step-00000005", "the text is another"]);
    std::fs::write(dir.path("text.txt"), text()).unwrap();
    succeed(&mut resume());
    // A tokenizer with another vocabulary.
    let tokenizer = dir.path("run/tokenizer.json");
    let original = std::fs::read(&tokenizer).unwrap();
    succeed(&mut dir.train("other", &["run.steps=1", "tokenizer.vocab_size=290"]));
    std::fs::copy(dir.path("other/tokenizer.json"), &tokenizer).unwrap();
    refuse(&mut resume(), &["step-00000005", "vocabulary"]);
    std::fs::write(&tokenizer, original).unwrap();
    // Damaged checkpoints.
    let checkpoint = dir.path("run/checkpoints/step-00000005");
    for file in ["model.safetensors", "optimizer.bpk", "training.json", "tokenizer.json"] {
        let path = checkpoint.join(file);
        let original = std::fs::read(&path).unwrap();
        // One bit of a weight or of the optimiser's state is enough.
        let mut flipped = original.clone();
        flipped[original.len() - 100] ^= 1;
        for damaged in [&original[..original.len() / 2], &flipped] {
            std::fs::write(&path, damaged).unwrap();
            refuse(&mut resume(), &[file, "damaged", "SHA256SUMS"]);
        }
        std::fs::write(&path, original).unwrap();
    }
    let sums = checkpoint.join("SHA256SUMS");
    let original = std::fs::read_to_string(&sums).unwrap();
    for damaged in [original.replacen('a', "b", 1), original.lines().skip(3).collect(), String::new()] {
        std::fs::write(&sums, damaged).unwrap();
        refuse(&mut resume(), &["SHA256SUMS"]);
    }
    std::fs::write(&sums, original).unwrap();
    succeed(&mut resume());
}
