//! Many runs, and what one run takes.

use super::*;

#[test]
fn a_sweep_trains_each_point_and_goes_on() {
    let dir = Dir::new();
    std::fs::write(dir.path("grid.toml"), "\"optimizer.learning_rate\" = [1e-5, 0.01]\n\"seed\" = [1]\n")
        .unwrap();
    let sweep = || {
        let mut command = dir.train("runs", &["run.steps=6", "model.n_layers=1"]);
        command.args(["--sweep", "grid.toml", "--json"]);
        command
    };
    let first = succeed(&mut sweep());
    let points = json(&first);
    let settings: Vec<&str> =
        points.as_array().unwrap().iter().map(|p| p["settings"].as_str().unwrap()).collect();
    assert_eq!(settings, ["optimizer.learning_rate=0.01, seed=1", "optimizer.learning_rate=0.00001, seed=1"]);
    let losses: Vec<f64> =
        points.as_array().unwrap().iter().map(|p| p["validation_loss"].as_f64().unwrap()).collect();
    assert!(losses[0] < losses[1], "{losses:?}");
    assert!(dir.path("runs/001/checkpoints/step-00000006").exists());
    // Done: the same table again, and no other run.
    assert_eq!(json(&succeed(&mut sweep())), points);
    for (grid, expected) in [
        ("\"run.stepz\" = [1]", "run.stepz"),
        ("\"run.steps\" = 3", "no list of values"),
        ("", "no key"),
        ("\"optimizer.learning_rate\" = [2.0]", "optimizer.learning_rate"),
    ] {
        std::fs::write(dir.path("grid.toml"), grid).unwrap();
        refuse(dir.train("bad", &[]).args(["--sweep", "grid.toml"]), &["grid.toml", expected]);
    }
    assert!(!dir.path("bad").exists());
}

#[test]
fn a_plan_states_the_memory_before_anything_is_read() {
    let dir = Dir::new();
    let plan = |more: &[&str]| {
        let mut command = dir.bitnet(&["train", "--plan", "--json"]);
        command.args(more);
        json(&succeed(&mut command))
    };
    let (whole, parts) = (plan(&[]), plan(&["--set", "run.accumulate=4"]));
    assert_eq!(whole["weights"].as_u64().unwrap(), 4 * whole["parameters"].as_u64().unwrap());
    assert!(parts["activations"].as_u64() < whole["activations"].as_u64(), "{whole} {parts}");
    let text = succeed(&mut dir.bitnet(&["train", "--plan"]));
    assert!(String::from_utf8_lossy(&text.stdout).contains("together, beside the text"));
    succeed(&mut dir.train("first", &["run.steps=1", "model.n_layers=1"]));
    let from = plan(&["--from", "first"]);
    assert!(from["parameters"].as_u64().unwrap() < 30_000, "{from}");
    refuse(
        &mut dir.bitnet(&["train", "--plan", "--batch", "5", "--set", "run.accumulate=2"]),
        &["run.accumulate"],
    );
}

#[test]
fn accumulating_gives_the_gradients_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let rows = ["1", "4"].map(|parts| {
        let parts = format!("run.accumulate={parts}");
        let config = tiny(&["model.n_layers=1", "run.steps=2", &parts]);
        let mut trainer =
            Trainer::start(&dir.path().join(&parts), config, &corpus(), &Device::flex()).unwrap();
        [trainer.step().unwrap(), trainer.step().unwrap()]
    });
    for (whole, parts) in rows[0].iter().zip(&rows[1]) {
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-4;
        assert!(close(whole.loss, parts.loss), "{whole:?} {parts:?}");
        assert!(close(whole.gradient_norm, parts.gradient_norm), "{whole:?} {parts:?}");
    }
}
