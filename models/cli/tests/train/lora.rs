//! Adapters: trained, resumed, served, merged, and refused.

use std::sync::Arc;

use bitnet_burn_engine::adapter::{Adapter, CONFIG, WEIGHTS};

use super::*;

impl Dir {
    /// A model `base` that has learned a little.
    fn base(&self, changes: &[&str]) {
        let more = ["run.steps=16", "model.hidden_size=128", "model.intermediate_size=128"];
        succeed(&mut self.train("first", &[&more[..], changes].concat()));
        succeed(&mut self.bitnet(&["export", "first", "--to", "hf", "--out", "base"]));
    }

    /// `bitnet train --lora` from it.
    fn lora(&self, run: &str, more: &[&str]) -> Command {
        self.lora_from("base", run, more)
    }

    fn lora_from(&self, model: &str, run: &str, more: &[&str]) -> Command {
        let mut command = self.bitnet(&["train", "--from", model, "--lora", "3", "--lora-alpha", "6"]);
        command.args(["--text", "text.txt", "--documents", "line", "--out", run, "--batch", "4"]);
        command.args(["--set", "optimizer.learning_rate=0.01", "--set", "optimizer.warmup_steps=4"]);
        command.args(["--set", "run.checkpoint_every=4", "--set", "run.evaluate_every=4"]).args(more);
        command
    }

    fn adapter(&self, run: &str, step: u64) -> PathBuf {
        self.path(run).join(format!("checkpoints/step-{step:08}"))
    }

    /// The answer of `bitnet run`, with more flags.
    fn answer(&self, more: &[&str]) -> String {
        let args = ["run", "-p", "The fox", "-n", "20", "--greedy", "--ignore-eos", "--print-ids", "-q"];
        let output = succeed(&mut self.bitnet(&[&args[..], more].concat()));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The loss of a model on the text's validation set, as the program prints it.
fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn adapters_learn_while_the_model_stays_and_are_served() {
    for scales in ["tensor", "group:32"] {
        let dir = Dir::new();
        dir.base(&[&format!("model.scales={scales}")]);
        let before = std::fs::read(dir.path("base/model.safetensors")).unwrap();
        let output = json(&succeed(&mut dir.lora("run", &["--steps", "24", "--json"])));
        // 7 projections of 2 layers.
        assert_eq!(output["parameters"], 3 * 2 * (128 * 2 * 5 + (128 + 64) * 2), "{scales}");
        assert!(before == std::fs::read(dir.path("base/model.safetensors")).unwrap());
        let metrics = Metrics::read(&dir.path("run")).unwrap();
        let losses: Vec<f64> = metrics.iter().filter_map(|row| row.validation_loss).collect();
        assert!(losses.last().unwrap() < &(losses[0] - 0.05), "{scales}: {losses:?}");
        // What the trainer has computes what the engine does, to the bit.
        let checkpoint = dir.adapter("run", 24);
        let base = Checkpoint::open(&dir.path("base"), &OpenOptions::default()).unwrap();
        let adapter = Adapter::open(&checkpoint, base.config()).unwrap();
        assert_eq!(adapter.projections().len(), 14);
        let options = LoadOptions { adapter: Some(Arc::new(adapter)), ..LoadOptions::default() };
        let served = load(&base, &Device::flex(), &options, &mut |_| {}).unwrap();
        let trainer = Trainer::resume(&dir.path("run"), &corpus(), &Device::flex()).unwrap();
        let tokens: Vec<u32> = (0..20).map(|i| 5 * i + 1).collect();
        let logits = |model: &bitnet_burn::BitNet| {
            let logits = model.forward_sequences(&tokens, tokens.len()).unwrap().into_data();
            logits.iter::<f32>().collect::<Vec<_>>()
        };
        let training = logits(trainer.model());
        let trained = logits(&trainer.into_model().pack().unwrap());
        assert_eq!(logits(&served), trained, "{scales}");
        let largest = trained.iter().fold(0f32, |a, v| a.max(v.abs()));
        let off = |(a, b): (&f32, &f32)| (a - b).abs() > 1e-4 * largest;
        assert!(!training.iter().zip(&trained).any(off), "{scales}: in training and served");

        // The program: the run stands for its newest adapter, and neither threads nor chunks matter.
        let plain = dir.answer(&["-m", "base"]);
        let adapted = dir.answer(&["-m", "base", "--adapter", "run", "--receipt", "receipt.json"]);
        assert_ne!(plain, adapted, "{scales}");
        let path = checkpoint.to_str().unwrap();
        for more in [&["--threads", "1"][..], &["--chunk", "1"], &["--kv-cache", "f32", "--no-prepacked"]] {
            assert_eq!(adapted, dir.answer(&[&["-m", "base", "--adapter", path], more].concat()), "{more:?}");
        }
        let check = ["receipt", "check", "receipt.json", "--rerun", "--json"];
        let checked = json(&succeed(&mut dir.bitnet(&check)));
        assert!(checked.to_string().contains("adapter adapter_model.safetensors"), "{checked}");
        let sha256 = bitnet_burn_formats::files::sha256_of_file(&checkpoint.join(WEIGHTS)).unwrap().1;
        assert!(checked["receipt"].to_string().contains(&sha256));
        let output = dir.bitnet(&["inspect", "-m", path]).output().unwrap();
        assert!(stderr(&output).contains("this is an adapter"), "{}", stderr(&output));
        let other = dir.adapter("run", 20);
        let output =
            dir.bitnet(&[&check[..], &["--adapter", other.to_str().unwrap()]].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        let report = succeed(&mut dir.bitnet(&[
            "run",
            "-m",
            "base",
            "--adapter",
            "run",
            "-p",
            "The fox",
            "-n",
            "2",
            "--json",
        ]));
        assert_eq!(json(&report)["adapter"]["sha256"], sha256);
        // As a setting of one side of a comparison.
        let compare =
            ["compare", "base", "base", "--b-adapter", "run", "--text", "text.txt", "--max-tokens", "20"];
        let compared = json(&succeed(&mut dir.bitnet(&[&compare[..], &["--json"]].concat())));
        assert_eq!(compared["b"]["adapter"]["sha256"], sha256);
        assert!(
            compared["a"]["adapter"].is_null() && compared["kl_mean"].as_f64().unwrap() > 1e-3,
            "{compared}"
        );

        // Merged into every format that holds it.
        let targets: &[&[&str]] = match scales {
            "tensor" => &[&["hf"], &["gguf", "--ternary", "i2_s"]],
            _ => &[&["hf"], &["gguf", "--ternary", "q2_0", "--requantise"]],
        };
        for target in targets {
            let mut args = vec!["convert", "base", "--merge-adapter", "run", "--force", "--json", "--out"];
            args.extend([if target[0] == "hf" { "merged" } else { "merged.gguf" }, "--to"]);
            args.extend(*target);
            let merged = json(&succeed(&mut dir.bitnet(&args)));
            let losses = merged["merged"].as_array().unwrap();
            let all = losses.last().unwrap();
            assert_eq!((losses.len(), &all["projection"]), (15, &"all".into()), "{merged}");
            assert!(all["error"].as_f64().unwrap() > 0.0, "{all}");
            succeed(&mut dir.bitnet(&["inspect", "-m", args[7], "--check"]));
            dir.answer(&["-m", args[7]]);
        }
    }
}

/// GGUF files of `llama` have the rows of q and k in another order; adapters have the order of Hugging Face's checkpoints.
#[test]
fn an_adapter_is_the_same_whatever_file_the_model_is_in() {
    let dir = Dir::new();
    dir.base(&["model.sub_norms=false", "model.activation=silu"]);
    succeed(&mut dir.bitnet(&[
        "export",
        "first",
        "--to",
        "gguf",
        "--embedding",
        "f32",
        "--out",
        "base.gguf",
    ]));
    let inspected = succeed(&mut dir.bitnet(&["inspect", "-m", "base.gguf", "--json"]));
    assert!(String::from_utf8_lossy(&inspected.stdout).contains("\"llama\""));
    succeed(&mut dir.lora("of-hf", &["--steps", "6"]));
    succeed(&mut dir.lora_from("base.gguf", "of-gguf", &["--steps", "6"]));
    let read = |run: &str| std::fs::read(dir.adapter(run, 6).join(WEIGHTS)).unwrap();
    assert!(read("of-hf") == read("of-gguf"));
    let answer = dir.answer(&["-m", "base", "--adapter", "of-hf"]);
    assert_eq!(answer, dir.answer(&["-m", "base.gguf", "--adapter", "of-hf"]));
}

#[test]
fn an_interrupted_run_of_adapters_comes_to_the_same_bits() {
    let dir = Dir::new();
    dir.base(&[]);
    succeed(&mut dir.lora("whole", &["--steps", "8"]));
    succeed(&mut dir.lora("parts", &["--steps", "8"]));
    std::fs::remove_dir_all(dir.adapter("parts", 8)).unwrap();
    succeed(&mut dir.bitnet(&["train", "--resume", "parts"]));
    for name in [WEIGHTS, CONFIG] {
        let read = |run: &str| std::fs::read(dir.adapter(run, 8).join(name)).unwrap();
        assert!(read("whole") == read("parts"), "{name}");
    }
    // Computing blocks again changes no bit, nor where weights learn.
    succeed(&mut dir.lora("again", &["--steps", "8", "--set", "run.recompute=true"]));
    let read = |run: &str| std::fs::read(dir.adapter(run, 8).join(WEIGHTS)).unwrap();
    assert!(read("whole") == read("again"), "run.recompute");
    let small = ["run.steps=4", "model.tied_embeddings=false"];
    succeed(&mut dir.train("kept", &small));
    succeed(&mut dir.train("recomputed", &[&small[..], &["run.recompute=true"]].concat()));
    assert!(dir.weights("kept", 4) == dir.weights("recomputed", 4), "run.recompute of weights");
    // A checkpoint that was changed, and a model that was.
    let fails = |run: &str, expected: &str| {
        let output = dir.bitnet(&["train", "--resume", run]).output().unwrap();
        assert!(!output.status.success() && stderr(&output).contains(expected), "{}", stderr(&output));
    };
    let weights = dir.adapter("parts", 8).join(WEIGHTS);
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    fails("parts", "is damaged");
    let config = dir.path("base/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text + "\n").unwrap();
    fails("whole", "it has changed since the run began");
}

#[test]
fn what_no_adapter_can_be_is_refused_before_anything_is_written() {
    let dir = Dir::new();
    dir.base(&[]);
    for (args, expected) in [
        (&["--lora-targets", "q_proj,head"][..], "no projections `head`"),
        (&["--lora-alpha=-1"], "`lora.alpha`: is -1"),
        (&["--float"], "cannot be used with"),
        (&["--set", "model.quantisation_warmup=5"], "model.quantisation_warmup"),
    ] {
        let mut command = dir.bitnet(&["train", "--from", "base", "--lora", "3", "--text", "text.txt"]);
        let output = command.args(["--out", "run"]).args(args).output().unwrap();
        assert!(
            !output.status.success() && stderr(&output).contains(expected),
            "{expected}: {}",
            stderr(&output)
        );
        assert!(!dir.path("run").exists(), "{expected}");
    }
    let output = dir.bitnet(&["train", "--from", "base", "--lora-alpha", "3", "--plan"]).output().unwrap();
    assert!(stderr(&output).contains("`lora.rank`: is 0"), "{}", stderr(&output));
    // A plan of the memory; the model's weights are neither floats nor trained.
    let plan =
        json(&succeed(&mut dir.bitnet(&["train", "--from", "base", "--lora", "3", "--plan", "--json"])));
    assert_eq!(plan["parameters"], 3 * 2 * (128 * 2 * 5 + (128 + 64) * 2), "{plan}");
    assert!(plan["base"].as_u64().unwrap() > 0 && plan["ternary"] == 0, "{plan}");
    let whole = json(&succeed(&mut dir.bitnet(&["train", "--from", "base", "--plan", "--json"])));
    assert!(whole["optimizer"].as_u64() > plan["optimizer"].as_u64() && whole["base"] == 0, "{whole}");
    // No adapter at the place of one, for each command.
    for command in [&["run", "-p", "x"][..], &["bench"], &["perplexity", "--file", "text.txt"]] {
        let output = dir.bitnet(&[command, &["-m", "base", "--adapter", "base"]].concat()).output().unwrap();
        assert!(
            stderr(&output).contains("there is no adapter_config.json"),
            "{command:?}: {}",
            stderr(&output)
        );
    }
}
