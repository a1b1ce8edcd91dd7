//! `bitnet train --sweep`: a run for each point of a grid, and a table of what came out.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, bail};
use bitnet_burn_train::{Corpus, Event, Outcome, TrainConfig, Trainer, is_run};
use burn::tensor::Device;
use serde::Serialize;

use crate::output;
use crate::status::Status;

/// A run of a sweep.
#[derive(Serialize)]
struct Point {
    directory: String,
    settings: String,
    steps: u64,
    validation_loss: Option<f64>,
}

/// The settings of each run: all combinations of the values that a file lists for its keys.
fn grid(path: &Path) -> anyhow::Result<Vec<Vec<String>>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let table: toml::Table = toml::from_str(&text).with_context(|| format!("{}", path.display()))?;
    let mut all: Vec<Vec<String>> = vec![Vec::new()];
    for (key, values) in &table {
        let Some(values) = values.as_array().filter(|values| !values.is_empty()) else {
            bail!(
                "{}: `{key}` has no list of values; write \"optimizer.learning_rate\" = [1e-3, 2e-3]",
                path.display()
            );
        };
        let settings = values.iter().map(|value| match value {
            toml::Value::String(text) => format!("{key}={text}"),
            value => format!("{key}={value}"),
        });
        let settings: Vec<String> = settings.collect();
        let with = |point: &Vec<String>| {
            let settings =
                settings.iter().map(|setting| [&point[..], std::slice::from_ref(setting)].concat());
            settings.collect::<Vec<_>>()
        };
        all = all.iter().flat_map(with).collect();
    }
    if table.is_empty() {
        bail!("{}: there is no key in it", path.display());
    }
    Ok(all)
}

/// Trains all runs one after the other, each in a directory of its own in `out`. Runs that are there already go on.
pub fn run(
    grid_file: &Path,
    (config, corpus, device): (TrainConfig, &Corpus, &Device),
    (out, json): (&Path, bool),
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let mut runs = Vec::new();
    for point in grid(grid_file)? {
        let mut config = config.clone();
        for setting in &point {
            config.set(setting).with_context(|| grid_file.display().to_string())?;
        }
        // Before the first run begins.
        if config.model.from.as_os_str().is_empty() && config.distill.teacher.as_os_str().is_empty() {
            config.validate().with_context(|| format!("{}: {}", grid_file.display(), point.join(", ")))?;
        }
        runs.push((point.join(", "), config));
    }
    let mut points = Vec::new();
    for (number, (settings, config)) in runs.iter().enumerate() {
        let dir = out.join(format!("{number:03}"));
        let mut trainer = match is_run(&dir) {
            true => Trainer::resume(&dir, corpus, device)?,
            false => Trainer::start(&dir, config.clone(), corpus, device)?,
        };
        let bar = output::bar(config.run.steps, "{bar:30} {pos}/{len} {msg} ETA {eta}");
        let outcome = trainer.run(stop, &mut |event| {
            if let Event::Step(row) = event {
                bar.set_position(row.step);
                bar.set_message(format!("loss {:.4}", row.loss));
            }
        });
        bar.finish_and_clear();
        if outcome? == Outcome::Stopped {
            output::note("stopped; the same command continues the sweep");
            Status::Interrupted.exit();
        }
        let mut losses = trainer.metrics().rows().iter().filter_map(|row| row.validation_loss);
        let point = Point {
            directory: dir.display().to_string(),
            settings: settings.clone(),
            steps: trainer.steps_done(),
            validation_loss: losses.next_back(),
        };
        let loss = point.validation_loss.map_or("-".into(), |loss| format!("{loss:.4}"));
        output::note(format!("{} of {}: {settings}: validation loss {loss}", number + 1, runs.len()));
        points.push(point);
    }
    let key = |point: &Point| point.validation_loss.unwrap_or(f64::INFINITY);
    points.sort_by(|a, b| key(a).total_cmp(&key(b)));
    if json {
        return output::print_json(&points);
    }
    let mut rows = vec![["validation loss", "settings", "directory"].map(str::to_owned).to_vec()];
    rows.extend(points.iter().map(|point| {
        let loss = point.validation_loss.map_or("-".into(), |loss| format!("{loss:.4}"));
        vec![loss, point.settings.clone(), point.directory.clone()]
    }));
    output::print(output::columns(&rows).trim_end())
}
