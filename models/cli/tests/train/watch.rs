//! What a run shows of itself.

use super::*;

#[test]
fn figures_and_texts_are_written_and_a_run_ends_early() {
    let dir = Dir::new();
    // A learning rate that changes nothing.
    let changes = ["run.steps=60", "model.n_layers=1", "run.evaluate_every=4", "run.sample_tokens=8"];
    let mut command = dir.train(
        "run",
        &[&changes[..], &["optimizer.learning_rate=1e-30", "optimizer.final_learning_rate=0"]].concat(),
    );
    let output = succeed(command.args(["--patience", "3", "--sample", "The fox", "--json"]));
    let found = json(&output);
    let steps = found["steps"].as_u64().unwrap();
    assert!(found["outcome"] == "converged" && steps == 16, "{found}");
    assert!(stderr(&output).contains("run.patience") && stderr(&output).contains("\"The fox\" continues"));
    let rows = Metrics::read(&dir.path("run")).unwrap();
    assert_eq!(rows.len() as u64, steps);
    let losses: Vec<f64> = rows.iter().filter_map(|row| row.validation_loss).collect();
    let (first, rest) = losses.split_at(losses.len() - 3);
    let best = first.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(rest.iter().all(|loss| *loss >= best), "{losses:?}");
    for row in &rows {
        let evaluated = row.step.is_multiple_of(4);
        assert_eq!((row.flipped.is_some(), row.quantised), (evaluated, 1.0), "{row:?}");
        assert!(row.flipped.is_none_or(|share| share == 0.0), "{row:?}");
    }
    let samples = std::fs::read_to_string(dir.path("run/samples.jsonl")).unwrap();
    let samples: Vec<serde_json::Value> =
        samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(samples.len() as u64, steps / 4);
    assert_eq!((&samples[1]["step"], &samples[1]["prompt"]), (&8.into(), &"The fox".into()));
    // Nothing more to do.
    let again = json(&succeed(&mut dir.bitnet(&["train", "--resume", "run", "--json"])));
    assert_eq!((&again["outcome"], &again["steps"]), (&"converged".into(), &steps.into()));
    let empty = ["--sample", &"a".repeat(40)];
    let mut long = dir.train("long", &changes);
    refuse(long.args(empty), &["run.samples", "the model sees 24"]);
}
