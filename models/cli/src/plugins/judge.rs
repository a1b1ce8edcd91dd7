//! `bitnet plugins judge`: the gate, and then a race against the best built-in kernel on the shapes of a task.

use std::fs::OpenOptions;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bitnet_burn_engine::bench::Roof;
use bitnet_burn_engine::text::count;
use bitnet_burn_manager::gate::Refusal;
use bitnet_burn_manager::{KernelManager, cpu, rotation_bytes};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::alone;
use crate::args::{KernelArgs, ThreadArgs};
use crate::kernels::{Limit, Speed};
use crate::output::{self, columns};

/// Judge a plugin by a task: the gate, then a race against the best built-in kernel, a score with its uncertainty
///
/// A task is a JSON file: a name, shapes with their weights in the score, the number of threads, and CPU features to ignore. The
/// score says how many times faster the plugin is than the fastest built-in kernel: the geometric mean over the shapes. Seven
/// rounds have other weights each, and each run has other activations; its result is compared with the reference. Exit status 1
/// if the gate refuses the plugin, or it computes none of a shape.
#[derive(Debug, Args)]
pub struct JudgeArgs {
    /// The plugin's file
    file: PathBuf,
    /// The task
    #[arg(long, value_name = "FILE")]
    task: PathBuf,
    /// JSON lines of earlier results, which the result is compared with and added to
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Rounds, with other weights each.
const ROUNDS: usize = 7;
/// Runs of each kernel in a round.
const TURNS: usize = 9;
/// Student's t for 6 degrees of freedom: 95 % lie within as many standard errors.
const T: f64 = 2.447;
/// Bytes of a task or a history.
const MAX_BYTES: u64 = 64 << 20;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Task {
    name: String,
    /// What is computed.
    #[serde(default)]
    operation: Operation,
    shapes: Vec<TaskShape>,
    #[serde(default = "one")]
    threads: usize,
    /// CPU features that no kernel may use.
    #[serde(default)]
    mask: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Operation {
    /// One scale for the weights.
    #[default]
    TernaryMatmul,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskShape {
    m: usize,
    n: usize,
    k: usize,
    /// How much it counts.
    #[serde(default = "unit")]
    weight: f64,
}

fn one() -> usize {
    1
}

fn unit() -> f64 {
    1.0
}

impl Task {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = read(path)?.with_context(|| format!("{}: there is no such file", path.display()))?;
        let task: Self =
            serde_json::from_str(&text).with_context(|| format!("{}: not a task", path.display()))?;
        if task.shapes.is_empty() || task.shapes.len() > 64 {
            bail!("{}: a task has 1 to 64 shapes, not {}", path.display(), task.shapes.len());
        }
        for TaskShape { m, n, k, weight } in &task.shapes {
            let shape = format!("{m}x{n}x{k}");
            shape
                .parse::<crate::kernels::Shape>()
                .map_err(|problem| anyhow::anyhow!("{}: the shape {shape}: {problem}", path.display()))?;
            if !weight.is_finite() || *weight <= 0.0 {
                bail!("{}: the weight of the shape {shape} is {weight}; it must be above 0", path.display());
            }
        }
        if !(1..=bitnet_burn_manager::MAX_THREADS).contains(&task.threads) {
            bail!(
                "{}: {} threads; 1 to {} are possible",
                path.display(),
                task.threads,
                bitnet_burn_manager::MAX_THREADS
            );
        }
        let Operation::TernaryMatmul = task.operation;
        Ok(task)
    }
}

/// A text file, if it is there.
fn read(path: &Path) -> anyhow::Result<Option<String>> {
    let failed = || format!("cannot read {}", path.display());
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(failed),
        Ok(file) if file.len() > MAX_BYTES => bail!("{}: more than {MAX_BYTES} bytes", path.display()),
        Ok(_) => {}
    }
    Ok(Some(std::fs::read_to_string(path).with_context(failed)?))
}

/// A line of the history.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Judgement {
    task: String,
    /// SHA-256 of the task's file: another task of the same name is another one.
    task_sha256: String,
    cpu: String,
    threads: usize,
    plugin: String,
    sha256: String,
    gate_passed: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    score: Option<Score>,
}

/// Times faster than the fastest built-in kernel, with the bounds of 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Score {
    value: f64,
    low: f64,
    high: f64,
}

impl Score {
    /// Of the rounds' scores, as logarithms.
    fn of(rounds: &[f64]) -> Self {
        let n = rounds.len() as f64;
        let mean = rounds.iter().sum::<f64>() / n;
        let variance = rounds.iter().map(|round| (round - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        let error = T * (variance / n).sqrt();
        Self { value: mean.exp(), low: (mean - error).exp(), high: (mean + error).exp() }
    }
}

#[derive(Serialize)]
struct Output {
    #[serde(flatten)]
    judgement: Judgement,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<Refusal>,
    shapes: Vec<ShapeResult>,
    /// The best earlier result of the task on such a machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    best_known: Option<Judgement>,
    /// Whether the score is above the best known one (1, the built-in kernels', without a history), beyond the uncertainty of
    /// both.
    is_better: bool,
}

#[derive(Serialize)]
struct ShapeResult {
    m: usize,
    n: usize,
    k: usize,
    weight: f64,
    plugin: Timed,
    built_in: Timed,
    score: Score,
}

#[derive(Serialize)]
struct Timed {
    kernel: String,
    median_ns: u64,
    speed: Speed,
}

pub fn run(args: &JudgeArgs) -> anyhow::Result<()> {
    let task = Task::read(&args.task)?;
    let history = match &args.history {
        Some(path) => read_history(path)?,
        None => Vec::new(),
    };
    let (mut config, _cache) = alone()?;
    config.plugins.pins = None;
    config.threads = task.threads;
    config.masked_features.clone_from(&task.mask);
    config.mask()?;
    let report = KernelManager::new(config.clone())?.verify_plugin(&args.file)?;
    let judgement = Judgement {
        task: task.name.clone(),
        task_sha256: bitnet_burn_formats::files::sha256(&std::fs::read(&args.task)?),
        cpu: cpu::model().to_owned(),
        threads: task.threads,
        plugin: report.plugin.as_ref().map_or("unknown".into(), |p| format!("{} {}", p.name, p.version)),
        sha256: report.sha256.clone(),
        gate_passed: report.passed(),
        score: None,
    };
    let of_this = |known: &&Judgement| {
        (&known.task_sha256, &known.cpu, known.threads)
            == (&judgement.task_sha256, &judgement.cpu, judgement.threads)
    };
    let value = |known: &Judgement| known.score.map_or(0.0, |score| score.value);
    let best_known = history.iter().filter(of_this).filter(|known| known.score.is_some());
    let best_known = best_known.max_by(|a, b| value(a).total_cmp(&value(b))).cloned();
    let mut output =
        Output { judgement, refusal: report.refusal, shapes: Vec::new(), best_known, is_better: false };
    if output.judgement.gate_passed {
        output.race(args, config, &task)?;
    }
    if let Some(path) = &args.history {
        append(path, &output.judgement)?;
    }
    if args.json {
        output::print_json(&output)?
    } else {
        output::print(output.text().trim_end())?
    }
    match (&output.refusal, output.judgement.score) {
        (_, Some(_)) => Ok(()),
        (Some(refusal), None) => bail!("{}: the gate refuses this plugin: {refusal}", args.file.display()),
        (None, None) => {
            bail!("{}: the gate tried no kernel of this plugin on this machine", args.file.display())
        }
    }
}

impl Output {
    fn race(
        &mut self,
        args: &JudgeArgs,
        config: bitnet_burn_manager::ManagerConfig,
        task: &Task,
    ) -> anyhow::Result<()> {
        let kernel_args = KernelArgs {
            threads: ThreadArgs { threads: Some(task.threads) },
            pin: false,
            kernel: None,
            plugins: vec![args.file.clone()],
            optimise_for: None,
            strict: None,
        };
        let (manager, refused) = kernel_args.configure_with(config)?;
        if let Some(reason) = refused.first() {
            bail!("{reason}");
        }
        let roof = Roof::measure(manager.pool(), rotation_bytes())
            .context("cannot allocate the buffer that measures the read bandwidth")?;
        let mut rounds = [0.0; ROUNDS];
        let total: f64 = task.shapes.iter().map(|shape| shape.weight).sum();
        for &TaskShape { m, n, k, weight } in &task.shapes {
            let result = race(manager, (m, n, k), &roof)?;
            for (round, ratio) in rounds.iter_mut().zip(&result.1) {
                *round += weight / total * ratio;
            }
            let (plugin, built_in) = result.0;
            self.shapes.push(ShapeResult { m, n, k, weight, plugin, built_in, score: Score::of(&result.1) });
        }
        let score = Score::of(&rounds);
        self.judgement.score = Some(score);
        let to_beat = self.best_known.as_ref().and_then(|known| known.score).map_or(1.0, |score| score.high);
        self.is_better = score.low > to_beat;
        Ok(())
    }
}

/// The plugin's fastest kernel and the fastest built-in one, with the logarithm of the ratio of their times in each round.
fn race(
    manager: &KernelManager,
    (m, n, k): (usize, usize, usize),
    roof: &Roof,
) -> anyhow::Result<((Timed, Timed), [f64; ROUNDS])> {
    let report = manager.report();
    let is_foreign =
        |id: &str| report.kernels.iter().any(|kernel| kernel.kernel == id && kernel.sha256.is_some());
    let ranking = manager.explain(m, (n, k));
    let fastest = |foreign: bool| {
        let mut names = ranking.candidates.iter().map(|candidate| candidate.kernel());
        names.find(|name| is_foreign(name) == foreign)
    };
    let plugin = fastest(true).with_context(|| {
        let reasons = manager.reasons(m, (n, k)).into_iter().filter(|(kernel, _)| is_foreign(kernel));
        let reasons: Vec<_> = reasons.map(|(kernel, reason)| format!(" ({kernel}: {reason})")).collect();
        format!("no kernel of the plugin computes [{m}, {k}] x [{n}, {k}]ᵀ{}", reasons.concat())
    })?;
    let built_in = fastest(false)
        .with_context(|| format!("no built-in kernel computes [{m}, {k}] x [{n}, {k}]ᵀ with this mask"))?;
    let mut ratios = [0.0; ROUNDS];
    let mut all = [Vec::new(), Vec::new()];
    for ratio in &mut ratios {
        // Seeds of the system's, which no plugin can know.
        let seed = RandomState::new().hash_one(0);
        let results = manager.race(m, (n, k), &[plugin, built_in], TURNS, seed);
        let mut medians = [0u64; 2];
        for (i, name) in [plugin, built_in].into_iter().enumerate() {
            let result = results.iter().find(|(kernel, _)| kernel == name);
            let (_, times) = result.with_context(|| format!("{name} does not compute the shape any more"))?;
            let times = times.clone().map_err(|reason| anyhow::anyhow!("{name}: {reason}"))?;
            medians[i] = median(&times).max(1);
            all[i].extend(times);
        }
        *ratio = (medians[1] as f64 / medians[0] as f64).ln();
    }
    let timed = |kernel: &str, times: &[u64]| {
        let median_ns = median(times);
        let speed = Limit::of(m).speed((m, n, k), median_ns, roof);
        Timed { kernel: kernel.to_owned(), median_ns, speed }
    };
    Ok(((timed(plugin, &all[0]), timed(built_in, &all[1])), ratios))
}

fn median(times: &[u64]) -> u64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

fn read_history(path: &Path) -> anyhow::Result<Vec<Judgement>> {
    let text = read(path)?.unwrap_or_default();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            serde_json::from_str(line)
                .with_context(|| format!("{}: line {} is no result", path.display(), i + 1))
        })
        .collect()
}

fn append(path: &Path, judgement: &Judgement) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(judgement)?;
    line.push(b'\n');
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| file.write_all(&line))
        .with_context(|| format!("cannot write {}", path.display()))
}

impl Output {
    fn text(&self) -> String {
        let Judgement { task, plugin, threads, cpu, score, .. } = &self.judgement;
        let mut text = format!("{plugin}: task {task}\n");
        let mut rows = vec![
            ["M", "N", "K", "PLUGIN", "TIME", "OF LIMIT", "BUILT IN", "TIME", "SCORE"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for ShapeResult { m, n, k, plugin, built_in, score, .. } in &self.shapes {
            let time = |timed: &Timed| format!("{:.1} us", timed.median_ns as f64 / 1e3);
            let of_limit = plugin.speed.of_roof.map_or("-".into(), |part| format!("{:.0} %", part * 100.0));
            rows.push(vec![
                m.to_string(),
                n.to_string(),
                k.to_string(),
                plugin.kernel.clone(),
                time(plugin),
                of_limit,
                built_in.kernel.clone(),
                time(built_in),
                score.to_string(),
            ]);
        }
        if rows.len() > 1 {
            text.push_str(&columns(&rows));
        }
        match (score, &self.best_known) {
            (None, _) => text.push_str("no score\n"),
            (Some(score), best) => {
                text.push_str(&format!("score {score}: times faster than the fastest built-in kernels\n"));
                let best = best.as_ref().and_then(|known| Some((&known.plugin, known.score?)));
                text.push_str(&match (best, self.is_better) {
                    (Some((plugin, known)), true) => {
                        format!("better than the best known, {plugin} with {known}\n")
                    }
                    (Some((plugin, known)), false) => {
                        format!("not better than the best known, {plugin} with {known}\n")
                    }
                    (None, true) => "better than the built-in kernels\n".into(),
                    (None, false) => "not better than the built-in kernels, as far as can be told\n".into(),
                });
            }
        }
        text.push_str(&format!("{cpu}, {}\n", count(*threads as u64, "thread")));
        text
    }
}

impl std::fmt::Display for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3} ({:.3} to {:.3})", self.value, self.low, self.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_has_the_bounds_of_its_rounds() {
        let same = Score::of(&[2f64.ln(); ROUNDS]);
        assert!((same.value - 2.0).abs() < 1e-12 && (same.high - same.low).abs() < 1e-12, "{same:?}");
        let spread = Score::of(&[0.0, 0.1, -0.1, 0.2, -0.2, 0.3, -0.3]);
        assert!((spread.value - 1.0).abs() < 1e-12 && spread.low < 0.9 && spread.high > 1.1, "{spread:?}");
    }

    #[test]
    fn tasks_that_are_none_are_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("task.json");
        for (text, expected) in [
            ("{", "not a task"),
            (r#"{"name": "a", "shapes": []}"#, "a task has 1 to 64 shapes, not 0"),
            (r#"{"name": "a", "shapes": [{"m": 0, "n": 1, "k": 1}]}"#, "the shape 0x1x1: "),
            (r#"{"name": "a", "shapes": [{"m": 1, "n": 1, "k": 1, "weight": -1}]}"#, "it must be above 0"),
            (r#"{"name": "a", "shapes": [{"m": 1, "n": 1, "k": 1}], "threads": 0}"#, "0 threads"),
            (r#"{"name": "a", "shapes": [{"m": 1, "n": 1, "k": 1}], "more": 1}"#, "not a task"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = format!("{:#}", Task::read(&path).unwrap_err());
            assert!(error.contains(expected) && error.contains("task.json"), "{text}: {error}");
        }
        assert!(Task::read(&dir.path().join("none")).unwrap_err().to_string().contains("no such file"));
    }
}
