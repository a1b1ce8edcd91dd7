//! Training that goes on with a model.

use super::*;

/// The tiny configuration with a model to begin with.
fn from(model: &Path, changes: &[&str]) -> TrainConfig {
    let mut config = tiny(changes);
    config.model.from = model.to_owned();
    config
}

#[test]
fn training_goes_on_from_masters_and_from_packed_weights() {
    let device = Device::flex();
    for scales in ["tensor", "row", "group:32"] {
        let dir = Dir::new();
        let run = |name: &str| dir.path(name);
        let scales_key = format!("model.scales={scales}");
        // GGUF's type for one scale has rows of 128.
        let size: usize = if scales == "tensor" { 128 } else { 64 };
        let sizes = [format!("model.hidden_size={size}"), format!("model.intermediate_size={size}")];
        let wide = [&sizes[0][..], &sizes[1], "model.n_layers=1", &scales_key];
        let first = [&wide[..], &["run.steps=20", "run.evaluation_sequences=0"]].concat();
        let mut trainer = Trainer::start(&run("first"), tiny(&first), &corpus(), &device).unwrap();
        trainer.run(&false.into(), &mut |_| {}).unwrap();
        let before = trainer.evaluate().unwrap();
        succeed(&mut dir.bitnet(&["export", "first", "--to", "hf", "--out", "packed"]));
        let mut models = vec![("first", true), ("packed", false)];
        if scales == "tensor" {
            succeed(&mut dir.bitnet(&[
                "export",
                "first",
                "--to",
                "gguf",
                "--embedding",
                "f32",
                "--out",
                "m.gguf",
            ]));
            models.push(("m.gguf", false));
        }
        for (model, exact) in models {
            let what = format!("{scales}, {model}");
            let config = from(&run(model), &["run.steps=10", "run.evaluation_sequences=0"]);
            let out = format!("from-{model}");
            let mut again = Trainer::start(&run(&out), config, &corpus(), &device).unwrap();
            assert_eq!(again.config().model.scales.to_string(), scales, "{what}");
            assert_eq!(again.model().config().hidden_size, size, "{what}");
            let found = again.evaluate().unwrap();
            assert_eq!(found.tokens, before.tokens, "{what}: the same tokenizer");
            let relative = (found.loss() / before.loss() - 1.0).abs();
            assert!(if exact { found == before } else { relative < 1e-4 }, "{what}: {found:?} {before:?}");
            again.run(&false.into(), &mut |_| {}).unwrap();
            let after = again.evaluate().unwrap();
            assert!(after.loss() < found.loss(), "{what}: {after:?} {found:?}");
        }
    }
}

#[test]
fn a_run_from_a_model_keeps_its_tokenizer_and_resumes() {
    let dir = Dir::new();
    succeed(&mut dir.train("first", &["run.steps=8", "model.n_layers=1"]));
    let train = |run: &str, model: &str, more: &[&str]| {
        let mut command =
            dir.bitnet(&["train", "--from", model, "--text", "text.txt", "--documents", "line"]);
        command
            .args(["--out", run, "--steps", "4", "--batch", "2", "--set", "run.checkpoint_every=2"])
            .args(more);
        command
    };
    succeed(&mut train("again", "first", &["--set", "run.accumulate=2"]));
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let read = |path: &str| std::fs::read(dir.path(path).join(name)).unwrap();
        let first = read("first/checkpoints/step-00000008");
        assert!(first == read("again") && first == read("again/checkpoints/step-00000004"), "{name}");
    }
    assert!(dir.comes_back("again"));
    // Without any checkpoint, from the model again.
    let before = dir.weights("again", 4);
    std::fs::remove_dir_all(dir.path("again/checkpoints")).unwrap();
    std::fs::create_dir(dir.path("again/checkpoints")).unwrap();
    succeed(&mut dir.bitnet(&["train", "--resume", "again"]));
    assert!(before == dir.weights("again", 4));

    refuse(
        &mut train("bad", "first", &["--scales", "group:32"]),
        &["first", "share a scale by tensor", "group:32"],
    );
    refuse(&mut train("bad", "first", &["--set", "tokenizer.file=x.json"]), &["keeps the model's tokenizer"]);
    refuse(&mut train("bad", "text.txt", &[]), &["text.txt"]);
    refuse(&mut train("bad", "none", &[]), &["none"]);
    let tokenizer = dir.path("first/checkpoints/step-00000008/tokenizer.json");
    // A token that the embedding has no row for.
    let original = std::fs::read_to_string(&tokenizer).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&original).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    added.push(serde_json::json!({
        "id": 300, "content": "fox", "special": false, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false,
    }));
    std::fs::write(&tokenizer, json.to_string()).unwrap();
    refuse(&mut train("bad", "first", &[]), &["token 300", "300 rows"]);
    std::fs::remove_file(&tokenizer).unwrap();
    refuse(&mut train("bad", "first", &[]), &["step-00000008", "it has no tokenizer"]);
    assert!(!dir.path("bad").exists());
}
