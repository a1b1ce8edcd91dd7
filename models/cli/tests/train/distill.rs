//! Ternary students of float teachers.

use super::*;

/// A Llama of floats.
const FLOAT: &[&str] =
    &["model.ternary=false", "model.sub_norms=false", "model.activation=silu", "run.evaluation_sequences=0"];

fn teacher(dir: &Dir, name: &str, changes: &[&str]) {
    let changes = [FLOAT, changes].concat();
    let mut trainer = Trainer::start(&dir.path(name), tiny(&changes), &corpus(), &Device::flex()).unwrap();
    trainer.run(&false.into(), &mut |_| {}).unwrap();
}

#[test]
fn a_student_comes_closer_to_its_teacher_than_without_training() {
    // Strict mode refuses projections of floats, and so the teacher.
    if std::env::var_os("BITNET_STRICT_MODE").is_some() {
        return;
    }
    let dir = Dir::new();
    teacher(&dir, "teacher", &["run.steps=60"]);
    let distill = |run: &str, more: &[&str]| {
        let mut command =
            dir.bitnet(&["distill", "--text", "text.txt", "--documents", "line", "--out", run, "--json"]);
        command.args(["--steps", "30", "--batch", "4", "--set", "optimizer.warmup_steps=4"]);
        command.args(["--set", "run.checkpoint_every=20", "--set", "run.evaluation_sequences=0"]);
        command.args(["--set", "run.evaluate_every=10"]).args(more);
        command
    };
    let output = succeed(&mut distill("student", &["--teacher", "teacher"]));
    let found = json(&output);
    let loss = |key: &str| found[key].as_f64().unwrap();
    let (teacher_loss, untrained, trained) =
        (loss("teacher_validation_loss"), loss("untrained_validation_loss"), loss("validation_loss"));
    // The text teaches, too: the student may even be the better one.
    assert!(teacher_loss < untrained && trained - teacher_loss < 0.5 * (untrained - teacher_loss), "{found}");
    let text = stderr(&output);
    assert!(text.contains("with chosen scales") && text.contains("ternary without training"), "{text}");
    let layers = std::fs::read_to_string(dir.path("student/layers.csv")).unwrap();
    let rows: Vec<Vec<&str>> = layers.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!((rows.len(), &rows[0][..]), (15, &["layer", "projection", "absmean_error", "error"][..]));
    let number = |text: &str| text.parse::<f64>().unwrap();
    let improved = rows[1..].iter().filter(|row| number(row[3]) < 0.95 * number(row[2])).count();
    assert!(improved > 7 && rows[1..].iter().all(|row| number(row[3]) <= number(row[2])), "{layers}");
    let rows = Metrics::read(&dir.path("student")).unwrap();
    let divergences: Vec<f64> = rows.iter().map(|row| row.divergence.unwrap()).collect();
    assert!(
        divergences[29] < 0.5 * divergences[0] && divergences.iter().all(|d| *d > 0.0),
        "{divergences:?}"
    );
    let flipped: Vec<f64> = rows.iter().filter_map(|row| row.flipped).collect();
    assert!(flipped.len() == 3 && flipped[0] > 0.0 && flipped[0] < 0.5, "{flipped:?}");
    succeed(&mut dir.bitnet(&["run", "-m", "student/checkpoints/step-00000030", "-p", "The", "-n", "2"]));
    assert!(dir.comes_back("student"));

    // The teacher is another one, or no model at all.
    teacher(&dir, "other", &["run.steps=1", "tokenizer.vocab_size=290"]);
    refuse(
        &mut distill("bad", &["--teacher", "other", "--from", "student"]),
        &["other", "another vocabulary than the student", "290 tokens", "300"],
    );
    refuse(&mut distill("bad", &["--teacher", "text.txt"]), &["text.txt"]);
    refuse(&mut distill("bad", &[]), &["--teacher"]);
    refuse(&mut distill("bad", &["--teacher", "teacher", "--temperature", "0"]), &["distill.temperature"]);
    assert!(!dir.path("bad").exists());
}

/// The options of the recipes: a warm-up of quantisation, sub-norms, scales by group.
#[test]
fn students_may_warm_up_have_sub_norms_and_many_scales() {
    // Strict mode refuses projections of floats, and so the teacher.
    if std::env::var_os("BITNET_STRICT_MODE").is_some() {
        return;
    }
    let dir = Dir::new();
    let wide = ["model.hidden_size=64", "model.intermediate_size=64", "model.n_layers=1"];
    teacher(&dir, "teacher", &[&wide[..], &["run.steps=40"]].concat());
    let device = Device::flex();
    let start = |run: &str, changes: &[&str]| {
        let mut config = TrainConfig::default();
        let common =
            ["run.steps=12", "run.batch_size=4", "data.documents=line", "run.evaluation_sequences=0"];
        common.iter().chain(changes).for_each(|assignment| config.set(assignment).unwrap());
        config.distill.teacher = dir.path("teacher");
        Trainer::start(&dir.path(run), config, &corpus(), &device).unwrap()
    };
    let mut warm = start("warm", &["model.quantisation_warmup=8", "distill.initial=absmean"]);
    let teacher_loss = warm.evaluate_teacher().unwrap().unwrap().loss();
    assert!(warm.fits().is_empty());
    let shares: Vec<f64> = (0..12)
        .map(|step| {
            let row = warm.step().unwrap();
            if step == 0 {
                // The student computes as its teacher does.
                assert!(row.divergence.unwrap().abs() < 1e-4 && row.loss < 2.0 * teacher_loss, "{row:?}");
            }
            row.quantised
        })
        .collect();
    assert_eq!(shares[..9], [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]);

    let mut student = start("many", &["distill.sub_norms=true", "model.scales=group:32"]);
    assert!(student.model().config().sub_norms && student.fits().len() == 7);
    let before = student.evaluate().unwrap();
    student.run(&false.into(), &mut |_| {}).unwrap();
    let after = student.evaluate().unwrap();
    assert!(after.loss() < before.loss(), "{before:?} {after:?}");
    let path = train::newest(&dir.path("many")).unwrap().unwrap();
    let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
    let loaded = load(&checkpoint, &device, &LoadOptions::default(), &mut |_| {}).unwrap();
    let served = train::evaluate(&loaded, student.data().validation(), 3).unwrap();
    assert!((served.perplexity() / after.perplexity() - 1.0).abs() < 1e-3, "{served:?} {after:?}");
}
