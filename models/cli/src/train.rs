//! `bitnet train`: a BitNet from text.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bitnet_burn::WeightScale;
use bitnet_burn_engine::load::ActivationRule;
use bitnet_burn_engine::text::{count, human_bytes, human_seconds};
use bitnet_burn_formats::files;
use bitnet_burn_train::{
    Corpus, Documents, Event, MemoryPlan, Outcome, Task, TrainConfig, Trainer, config_of,
};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::args::positive;
use crate::output;
use crate::status::Status;
use crate::sweep;
use bitnet_burn_engine::device::{DeviceKind, DeviceName};

/// Train a BitNet on text
///
/// Text goes in, and a directory comes out: config.toml, tokenizer.json, metrics.csv, loss.svg, validation.jsonl and
/// checkpoints/step-*, each a Hugging Face directory that every command takes as a model. `bitnet export` makes one GGUF file of
/// it.
///
/// With --from, training goes on with a model: BitNet's from its float masters or from its packed weights, a float model by
/// making it ternary. The model's sizes and its tokenizer are kept.
///
/// With --lora, the model stays as it is, and small adapters for it are trained.
///
/// Ctrl-C writes a checkpoint and ends; --resume continues to the same bits as if nothing had happened.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TrainArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Begin with this model: a GGUF file, a Hugging Face directory or a training run (model.from)
    #[arg(long, value_name = "MODEL", conflicts_with = "resume")]
    from: Option<PathBuf>,
    /// What to learn: text, or sft: conversations, of which the assistant's part counts (data.task)
    #[arg(long, value_name = "TASK", value_parser = task, conflicts_with = "resume")]
    task: Option<Task>,
    /// Train LoRA adapters of this rank for the model of --from, and leave its weights as they are. Checkpoints are adapters in
    /// PEFT's format, for `--adapter` of the other commands (lora.rank)
    #[arg(long, value_name = "RANK", value_parser = positive, conflicts_with_all = ["resume", "float", "scales"])]
    lora: Option<usize>,
    /// An adapter's output is multiplied by A / RANK [default: RANK] (lora.alpha)
    #[arg(long, value_name = "A", conflicts_with = "resume")]
    lora_alpha: Option<f64>,
    /// The projections that get adapters, separated by commas: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and
    /// down_proj [default: all-linear] (lora.targets)
    #[arg(long, value_name = "LIST", value_delimiter = ',', conflicts_with = "resume")]
    lora_targets: Vec<String>,
    /// Train the float twin of the model, to compare with (model.ternary = false)
    #[arg(long, conflicts_with = "resume")]
    float: bool,
}

/// What all trainings have.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Text to learn: .txt, .jsonl or .parquet files, directories, or patterns such as 'data/*.jsonl.zst'
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present_any = ["resume", "print_config", "plan"])]
    text: Vec<PathBuf>,
    /// Text to validate on, in place of a part of --text
    #[arg(long, value_name = "PATH", num_args = 1..)]
    validation: Vec<PathBuf>,
    /// The shares in which sequences are drawn from each PATH of --text [default: each document once an epoch] (data.weights)
    #[arg(long, value_name = "N", num_args = 1.., conflicts_with = "resume")]
    weights: Vec<f64>,
    /// The directory of the run, which is made
    #[arg(long, short, value_name = "DIR", required_unless_present_any = ["resume", "print_config", "plan"])]
    out: Option<PathBuf>,
    /// Continue the run in this directory, with the text that it began with
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config", "set", "steps", "batch", "seed", "documents", "scales", "activations"])]
    resume: Option<PathBuf>,
    /// A configuration, .toml or .json; --print-config shows all keys and their defaults
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One value of the configuration, such as `model.n_layers=6`; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Steps of the optimiser (run.steps)
    #[arg(long, value_name = "N", value_parser = positive)]
    steps: Option<usize>,
    /// Sequences a step (run.batch_size)
    #[arg(long, value_name = "N", value_parser = positive)]
    batch: Option<usize>,
    /// Seed of everything (seed)
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How .txt files are cut into documents: file, paragraph or line (data.documents)
    #[arg(long, value_name = "HOW", value_parser = documents)]
    documents: Option<Documents>,
    /// Weights that share a scale: tensor (BitNet), row, or group:N with N of 32, 64, 128 or 256 (model.scales)
    #[arg(long, value_name = "KIND")]
    scales: Option<WeightScale>,
    /// How activations are quantised: row or group:N (int8 with a scale for each row, or for each N values), float (not at
    /// all), or model (row with --scales tensor, else group:32) (model.activations)
    #[arg(long, value_name = "RULE")]
    activations: Option<ActivationRule>,
    /// Continue this prompt at each evaluation; may be given several times (run.samples)
    #[arg(long, value_name = "PROMPT", conflicts_with = "resume")]
    sample: Vec<String>,
    /// End after this many evaluations without a better validation loss (run.patience)
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "resume")]
    patience: Option<usize>,
    /// Where to train
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceKind::compiled().into())]
    device: DeviceName,
    /// Threads [default: one per physical core]
    #[arg(long, value_name = "N", value_parser = positive)]
    threads: Option<usize>,
    /// Train a run for each combination of the values in this file, such as "optimizer.learning_rate" = [1e-3, 2e-3], each in
    /// a directory in --out, and print a table; the same command continues
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    sweep: Option<PathBuf>,
    /// Print the memory that the run would take, and end
    #[arg(long, conflicts_with = "resume")]
    plan: bool,
    /// Print the configuration that would be used, and end
    #[arg(long)]
    print_config: bool,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet train --text book.txt --out run
  bitnet train --text stories.txt --documents line --steps 2000 --set model.n_layers=6 --out run
  bitnet train --text book.txt --scales group:64 --out run
  bitnet train --text 'web/*.parquet' code.jsonl.zst --weights 3 1 --out run
  bitnet train --from model.gguf --text book.txt --out run
  bitnet train --from llama/ --task sft --text chats.jsonl --out run
  bitnet train --from model.gguf --lora 8 --text book.txt --out adapter
  bitnet train --resume run
  bitnet train --print-config > run.toml
  bitnet export run --to gguf --out model.gguf";

fn documents(text: &str) -> Result<Documents, String> {
    match text {
        "file" => Ok(Documents::File),
        "paragraph" => Ok(Documents::Paragraph),
        "line" => Ok(Documents::Line),
        _ => Err("one of file, paragraph and line".into()),
    }
}

fn task(text: &str) -> Result<Task, String> {
    match text {
        "text" => Ok(Task::Text),
        "sft" => Ok(Task::Sft),
        _ => Err("one of text and sft".into()),
    }
}

#[derive(Serialize)]
struct Output {
    directory: PathBuf,
    outcome: &'static str,
    steps: u64,
    parameters: u64,
    vocab_size: usize,
    training_tokens: usize,
    loss: Option<f64>,
    validation_loss: Option<f64>,
    validation_perplexity: Option<f64>,
    validation_bits_per_byte: Option<f64>,
    /// Of a distillation: of its teacher, and of the ternary model before training.
    #[serde(skip_serializing_if = "Option::is_none")]
    teacher_validation_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    untrained_validation_loss: Option<f64>,
    bad_rows: u64,
    seconds: f64,
    tokens_per_second: Option<f64>,
    checkpoint: Option<PathBuf>,
}

pub fn run(args: TrainArgs) -> anyhow::Result<()> {
    let TrainArgs { run, from, task, lora, lora_alpha, lora_targets, float } = args;
    train(run, |config| {
        if let Some(task) = task {
            config.data.task = task;
        }
        if let Some(from) = from {
            config.model.from = from;
        }
        if let Some(rank) = lora {
            config.lora.rank = rank;
        }
        if let Some(alpha) = lora_alpha {
            config.lora.alpha = alpha;
        }
        if !lora_targets.is_empty() {
            config.lora.targets = lora_targets;
        }
        if float {
            config.model.ternary = false;
        }
    })
}

/// Trains, with changes of the configuration that a command's own flags make.
pub fn train(args: RunArgs, change: impl FnOnce(&mut TrainConfig)) -> anyhow::Result<()> {
    let config = match &args.resume {
        Some(dir) => config_of(dir)?,
        None => configuration(&args, change)?,
    };
    if args.print_config {
        return output::print(config.to_toml().trim_end());
    }
    if let Some(threads) = args.threads {
        // Before Burn's first operation, which would make a pool of its own size.
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .context("cannot start the threads")?;
    }
    let device = args.device.open().map_err(crate::engine::device_error)?;
    if args.plan {
        return plan(&MemoryPlan::of(config, &device)?, args.json);
    }
    let sources = Sources::of(&args)?;
    let corpus = sources.read(&config)?;
    let bad_rows = corpus.bad_row_count();
    if bad_rows > 0 {
        let shown =
            corpus.bad_rows().iter().map(|row| format!("\n  {}: {}", row.path.display(), row.problem));
        output::note(format!(
            "{} left out (at most {}, by data.bad_rows):{}",
            count(bad_rows, "bad row"),
            config.data.bad_rows,
            shown.collect::<String>()
        ));
    }
    let stop = stop_on_signals()?;
    if let (Some(grid), Some(out)) = (&args.sweep, &args.out) {
        return sweep::run(grid, (config, &corpus, &device), (out, args.json), &stop);
    }
    let mut trainer = match (&args.resume, &args.out) {
        (Some(dir), _) => Trainer::resume(dir, &corpus, &device)?,
        (None, Some(dir)) => {
            let trainer = Trainer::start(dir, config, &corpus, &device)?;
            output::write_file(&dir.join(SOURCES), |out| Ok(serde_json::to_writer_pretty(out, &sources)?))?;
            trainer
        }
        (None, None) => bail!("--out is missing"),
    };
    drop(corpus);
    let config = trainer.config().clone();
    let (parameters, data) = (trainer.parameters(), trainer.data());
    let (vocab_size, training_tokens) = (data.vocab_size, data.training_tokens());
    let bytes: usize = data.validation_texts.iter().map(String::len).sum();
    // Of conversations, a part counts.
    let bytes_per_token =
        (config.data.task == Task::Text).then(|| bytes as f64 / data.validation_tokens().max(1) as f64);
    let lora = &config.lora;
    if lora.is_used() {
        output::note(format!(
            "adapters of rank {} for {}; the model's own weights stay as they are",
            lora.rank,
            lora.targets.join(", ")
        ));
    }
    let quantisation = config.model.quantisation().filter(|q| !q.is_bitnet() && !lora.is_used());
    if let Some(quantisation) = quantisation {
        let rules = quantisation.activation_rules(trainer.model().config());
        let rules: Vec<_> = rules.iter().map(ToString::to_string).collect();
        output::note(format!(
            "ternary weights with scales by {}, activations: {}",
            quantisation.scale,
            rules.join(", ")
        ));
    }
    output::note(format!(
        "{} parameters, vocabulary {vocab_size}; {} to train on ({:.1} epochs in {} steps of {} x {}), {} to validate",
        human_count(parameters),
        count(training_tokens as u64, "token"),
        (config.run.steps as f64 * (config.run.batch_size * config.sequence_length()) as f64)
            / training_tokens as f64,
        config.run.steps,
        config.run.batch_size,
        config.sequence_length(),
        count(data.validation_tokens() as u64, "token"),
    ));
    let teacher = trainer.evaluate_teacher()?;
    before_training(&trainer, teacher.map(|teacher| teacher.loss()))?;
    let bar = output::bar(config.run.steps, "{bar:30} {pos}/{len} {msg} ETA {eta}");
    let first = trainer.steps_done();
    bar.set_position(first);
    bar.reset_eta();
    let begin = Instant::now();
    let mut checkpoint = None;
    let mut evaluated = None;
    let mut spent = Vec::new();
    let mut validation = String::new();
    let outcome = trainer.run(&stop, &mut |event| match event {
        Event::Step(row) => {
            spent.push(row.tokens_per_second);
            bar.set_position(row.step);
            let divergence = row.divergence.map_or(String::new(), |d| format!(", from the teacher {d:.4}"));
            bar.set_message(format!(
                "loss {:.4}{divergence}, {:.0} tok/s{validation}",
                row.loss, row.tokens_per_second
            ));
        }
        Event::Evaluation { step, evaluation } => {
            evaluated = Some(evaluation);
            validation = format!(", validation perplexity {:.3}", evaluation.perplexity());
            bar.suspend(|| {
                output::note(format!(
                    "step {step}: validation loss {:.4}, perplexity {:.3}, {}",
                    evaluation.loss(),
                    evaluation.perplexity(),
                    human_seconds(begin.elapsed().as_secs_f64()),
                ));
            });
        }
        Event::Sample(sample) => bar.suspend(|| {
            output::note(format!("step {}: {:?} continues {:?}", sample.step, sample.prompt, sample.text));
        }),
        Event::Checkpoint(path) => checkpoint = Some(path.to_owned()),
    });
    bar.finish_and_clear();
    let outcome = outcome?;
    let done = trainer.steps_done();
    spent.sort_by(f64::total_cmp);
    let dir = args.resume.as_ref().or(args.out.as_ref()).expect("one of the two").clone();
    let result = Output {
        outcome: match outcome {
            Outcome::Done => "done",
            Outcome::Stopped => "stopped",
            Outcome::Converged => "converged",
        },
        steps: done,
        parameters,
        vocab_size,
        training_tokens,
        loss: trainer.metrics().rows().last().map(|row| row.loss),
        validation_loss: evaluated.map(|e| e.loss()),
        validation_perplexity: evaluated.map(|e| e.perplexity()),
        validation_bits_per_byte: evaluated
            .zip(bytes_per_token)
            .map(|(e, bytes)| e.loss() / std::f64::consts::LN_2 / bytes),
        teacher_validation_loss: teacher.map(|e| e.loss()),
        untrained_validation_loss: trainer.untrained().map(|e| e.loss()),
        bad_rows,
        seconds: begin.elapsed().as_secs_f64(),
        tokens_per_second: spent.get(spent.len() / 2).copied(),
        checkpoint: checkpoint.clone(),
        directory: dir.clone(),
    };
    if args.json {
        output::print_json(&result)?;
    } else {
        summary(&result, done - first, begin.elapsed())?;
    }
    if outcome == Outcome::Converged {
        output::note(format!("the validation loss no longer falls (run.patience): ended at step {done}"));
    }
    if outcome == Outcome::Stopped {
        output::note(format!(
            "stopped at step {done}; continue with: bitnet train --resume {}",
            dir.display()
        ));
        Status::Interrupted.exit();
    }
    Ok(())
}

/// Set by the first Ctrl-C or SIGTERM; the second one ends the program.
fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let handler = stop.clone();
    let handled = ctrlc::set_handler(move || {
        if handler.swap(true, Ordering::Relaxed) {
            // Asked twice: now.
            files::discard_unfinished();
            Status::Interrupted.exit();
        }
        eprintln!("\nstopping after this step, with a checkpoint; once more: at once, without");
    });
    handled.context("cannot catch Ctrl-C")?;
    Ok(stop)
}

/// What a run would take.
fn plan(plan: &MemoryPlan, json: bool) -> anyhow::Result<()> {
    if json {
        return output::print_json(plan);
    }
    let row = |name: &str, bytes: u64| vec![name.to_owned(), human_bytes(bytes)];
    let mut rows = vec![
        vec!["parameters".to_owned(), human_count(plan.parameters)],
        row("weights", plan.weights),
        row("gradients", plan.gradients),
        row("optimizer", plan.optimizer),
        row("ternary values", plan.ternary),
        row("activations (estimated)", plan.activations),
        row("logits", plan.logits),
    ];
    if plan.teacher > 0 {
        rows.push(row("teacher", plan.teacher));
    }
    if plan.base > 0 {
        rows.push(row("the model as it is", plan.base));
    }
    rows.push(row("together, beside the text", plan.total()));
    output::print(output::columns(&rows).trim_end())
}

fn summary(result: &Output, steps: u64, elapsed: Duration) -> anyhow::Result<()> {
    let mut rows = vec![vec!["steps".to_owned(), format!("{} ({steps} in this run)", result.steps)]];
    let mut row = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            rows.push(vec![name.to_owned(), value]);
        }
    };
    row("time", Some(human_seconds(elapsed.as_secs_f64())));
    row("tokens/s", result.tokens_per_second.map(|v| format!("{v:.0} (median of the steps)")));
    row("loss", result.loss.map(|v| format!("{v:.4} nats per token")));
    row(
        "teacher's validation loss",
        result.teacher_validation_loss.map(|v| format!("{v:.4} nats per token")),
    );
    row("without training", result.untrained_validation_loss.map(|v| format!("{v:.4} nats per token")));
    row("validation loss", result.validation_loss.map(|v| format!("{v:.4} nats per token")));
    row("validation perplexity", result.validation_perplexity.map(|v| format!("{v:.3} per token")));
    row("", result.validation_bits_per_byte.map(|v| format!("{v:.4} bits per byte")));
    row("checkpoint", result.checkpoint.as_ref().map(|path| path.display().to_string()));
    output::print(output::columns(&rows).trim_end())
}

/// What a distillation begins with.
fn before_training(trainer: &Trainer, teacher: Option<f64>) -> anyhow::Result<()> {
    let (Some(teacher), Some(untrained)) = (teacher, trainer.untrained()) else { return Ok(()) };
    if !trainer.fits().is_empty() {
        let mut rows = vec![
            ["layer", "projection", "output error by absmean", "with chosen scales"]
                .map(str::to_owned)
                .to_vec(),
        ];
        rows.extend(trainer.fits().iter().map(|fit| {
            let (absmean, chosen) = (format!("{:.4}", fit.absmean_error), format!("{:.4}", fit.error));
            vec![fit.layer.to_string(), fit.projection.to_owned(), absmean, chosen]
        }));
        output::note(output::columns(&rows).trim_end().to_owned());
    }
    output::note(format!(
        "validation loss of the teacher {teacher:.4}; ternary without training {:.4}; at the start {:.4}",
        untrained.loss(),
        trainer.evaluate()?.loss(),
    ));
    Ok(())
}

fn configuration(args: &RunArgs, change: impl FnOnce(&mut TrainConfig)) -> anyhow::Result<TrainConfig> {
    let mut config = match &args.config {
        Some(path) => TrainConfig::read(path)?,
        None => TrainConfig::default(),
    };
    for assignment in &args.set {
        config.set(assignment).map_err(|error| anyhow::anyhow!("--set {error}"))?;
    }
    if let Some(steps) = args.steps {
        config.run.steps = steps as u64;
    }
    if let Some(batch) = args.batch {
        config.run.batch_size = batch;
    }
    if let Some(seed) = args.seed {
        config.seed = seed;
    }
    if let Some(documents) = args.documents {
        config.data.documents = documents;
    }
    config.run.samples.extend(args.sample.iter().cloned());
    if let Some(patience) = args.patience {
        config.run.patience = patience as u64;
    }
    if !args.weights.is_empty() {
        config.data.weights.clone_from(&args.weights);
    }
    if let Some(scales) = args.scales {
        config.model.scales = scales;
    }
    if let Some(activations) = args.activations {
        config.model.activations = activations;
    }
    change(&mut config);
    // The sizes of a model to begin with are known when it is opened; then all of it is checked.
    if config.model.from.as_os_str().is_empty() && config.distill.teacher.as_os_str().is_empty() {
        config.validate()?;
    }
    Ok(config)
}

/// Names the text, for `--resume` without `--text`.
const SOURCES: &str = "text.json";

/// Where the text is, with absolute paths.
#[derive(Serialize, Deserialize)]
struct Sources {
    text: Vec<PathBuf>,
    validation: Vec<PathBuf>,
}

impl Sources {
    /// Those that are given, else those that the run to resume began with.
    fn of(args: &RunArgs) -> anyhow::Result<Self> {
        let stored = match &args.resume {
            Some(dir) if args.text.is_empty() || args.validation.is_empty() => {
                let path = dir.join(SOURCES);
                match std::fs::read(&path) {
                    Ok(json) => Some(
                        serde_json::from_slice::<Self>(&json)
                            .with_context(|| format!("{} does not name files", path.display()))?,
                    ),
                    Err(_) if !args.text.is_empty() => None,
                    Err(error) => {
                        return Err(error).with_context(|| {
                            format!(
                                "cannot read {}, which names the text; give it with --text",
                                path.display()
                            )
                        });
                    }
                }
            }
            _ => None,
        };
        let absolute =
            |paths: &[PathBuf]| paths.iter().map(std::path::absolute).collect::<Result<Vec<_>, _>>();
        let mut sources = Self { text: absolute(&args.text)?, validation: absolute(&args.validation)? };
        if let Some(stored) = stored {
            if sources.text.is_empty() {
                sources.text = stored.text;
            }
            if sources.validation.is_empty() {
                sources.validation = stored.validation;
            }
        }
        Ok(sources)
    }

    fn read(&self, config: &TrainConfig) -> anyhow::Result<Corpus> {
        let corpus = Corpus::read(&self.text, &config.data)?;
        if self.validation.is_empty() {
            return Ok(corpus);
        }
        Ok(corpus.with_validation(Corpus::read(&self.validation, &config.data)?))
    }
}

fn human_count(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.0} k", n as f64 / 1e3),
        _ => format!("{:.2} M", n as f64 / 1e6),
    }
}
