//! `bitnet train`: a BitNet from text.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bitnet_burn::WeightScale;
use bitnet_burn_engine::load::ActivationRule;
use bitnet_burn_engine::text::{count, human_seconds};
use bitnet_burn_formats::files;
use bitnet_burn_train::{Corpus, Documents, Event, Outcome, TrainConfig, Trainer, config_of};
use clap::Args;
use serde::Serialize;

use crate::args::positive;
use crate::output;
use crate::status::Status;
use bitnet_burn_engine::device::{DeviceKind, DeviceName};

/// Train a BitNet on text
///
/// Text goes in (or JSON Lines with a `text` in every line), and a directory comes out: config.toml,
/// tokenizer.json, metrics.csv, loss.svg, validation.jsonl and checkpoints/step-*, each a Hugging Face
/// directory that every command takes as a model. `bitnet export` makes one GGUF file of it.
///
/// Ctrl-C writes a checkpoint and ends; --resume continues to the same bits as if nothing had happened.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TrainArgs {
    /// Text to learn: .txt, or .jsonl with a `text` in every line
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present_any = ["resume", "print_config"])]
    text: Vec<PathBuf>,
    /// The directory of the run, which is made
    #[arg(long, short, value_name = "DIR", required_unless_present_any = ["resume", "print_config"])]
    out: Option<PathBuf>,
    /// Continue the run in this directory, with the text that it began with
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config", "set", "steps", "batch", "seed", "documents", "float", "scales", "activations"])]
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
    /// Train the float twin of the model, to compare with (model.ternary = false)
    #[arg(long)]
    float: bool,
    /// Weights that share a scale: tensor (BitNet), row, or group:N with N of 32, 64, 128 or 256 (model.scales)
    #[arg(long, value_name = "KIND")]
    scales: Option<WeightScale>,
    /// How activations are quantised: row or group:N (int8 with a scale for each row, or for each N values), float (not at
    /// all), or model (row with --scales tensor, else group:32) (model.activations)
    #[arg(long, value_name = "RULE")]
    activations: Option<ActivationRule>,
    /// Where to train
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceKind::compiled().into())]
    device: DeviceName,
    /// Threads [default: one per physical core]
    #[arg(long, value_name = "N", value_parser = positive)]
    threads: Option<usize>,
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
    seconds: f64,
    tokens_per_second: Option<f64>,
    checkpoint: Option<PathBuf>,
}

pub fn run(args: TrainArgs) -> anyhow::Result<()> {
    if args.print_config {
        return output::print(configuration(&args)?.to_toml().trim_end());
    }
    if let Some(threads) = args.threads {
        // Before Burn's first operation, which would make a pool of its own size.
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .context("cannot start the threads")?;
    }
    let device = args.device.open().map_err(crate::engine::device_error)?;
    let mut trainer = match &args.resume {
        Some(dir) => resume(dir, &args, &device)?,
        None => start(&args, &device)?,
    };
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

    let config = trainer.config().clone();
    let (parameters, data) = (parameters(&trainer), trainer.data());
    let (vocab_size, training_tokens) = (data.vocab_size, data.training_tokens());
    let bytes: usize = data.validation_texts.iter().map(String::len).sum();
    let bytes_per_token = bytes as f64 / data.validation_tokens().max(1) as f64;
    if let Some(quantisation) = config.model.quantisation().filter(|q| !q.is_bitnet()) {
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
            bar.set_message(format!("loss {:.4}, {:.0} tok/s{validation}", row.loss, row.tokens_per_second));
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
        Event::Checkpoint(path) => checkpoint = Some(path.to_owned()),
    });
    bar.finish_and_clear();
    let outcome = outcome?;
    let done = trainer.steps_done();
    spent.sort_by(f64::total_cmp);
    let dir = args.resume.as_ref().or(args.out.as_ref()).expect("one of the two").clone();
    let result = Output {
        outcome: if outcome == Outcome::Done { "done" } else { "stopped" },
        steps: done,
        parameters,
        vocab_size,
        training_tokens,
        loss: trainer.metrics().rows().last().map(|row| row.loss),
        validation_loss: evaluated.map(|e| e.loss()),
        validation_perplexity: evaluated.map(|e| e.perplexity()),
        validation_bits_per_byte: evaluated.map(|e| e.loss() / std::f64::consts::LN_2 / bytes_per_token),
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
    if outcome == Outcome::Stopped {
        output::note(format!(
            "stopped at step {done}; continue with: bitnet train --resume {}",
            dir.display()
        ));
        Status::Interrupted.exit();
    }
    Ok(())
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
    row("validation loss", result.validation_loss.map(|v| format!("{v:.4} nats per token")));
    row("validation perplexity", result.validation_perplexity.map(|v| format!("{v:.3} per token")));
    row("", result.validation_bits_per_byte.map(|v| format!("{v:.4} bits per byte")));
    row("checkpoint", result.checkpoint.as_ref().map(|path| path.display().to_string()));
    output::print(output::columns(&rows).trim_end())
}

fn configuration(args: &TrainArgs) -> anyhow::Result<TrainConfig> {
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
    if args.float {
        config.model.ternary = false;
    }
    if let Some(scales) = args.scales {
        config.model.scales = scales;
    }
    if let Some(activations) = args.activations {
        config.model.activations = activations;
    }
    config.validate()?;
    Ok(config)
}

/// Where the files of text are, for `--resume` without `--text`.
const SOURCES: &str = "text.json";

fn start(args: &TrainArgs, device: &burn::tensor::Device) -> anyhow::Result<Trainer> {
    let config = configuration(args)?;
    let corpus = Corpus::read(&args.text, config.data.documents)?;
    let dir = args.out.as_ref().context("--out is missing")?;
    let trainer = Trainer::start(dir, config, &corpus, device)?;
    let absolute: Vec<PathBuf> = args.text.iter().map(std::path::absolute).collect::<Result<_, _>>()?;
    output::write_file(&dir.join(SOURCES), |out| Ok(serde_json::to_writer_pretty(out, &absolute)?))?;
    Ok(trainer)
}

fn resume(dir: &Path, args: &TrainArgs, device: &burn::tensor::Device) -> anyhow::Result<Trainer> {
    let documents = config_of(dir)?.data.documents;
    let text = if args.text.is_empty() {
        let path = dir.join(SOURCES);
        let json = std::fs::read(&path).with_context(|| {
            format!("cannot read {}, which names the text; give it with --text", path.display())
        })?;
        serde_json::from_slice(&json).with_context(|| format!("{} does not name files", path.display()))?
    } else {
        args.text.clone()
    };
    Ok(Trainer::resume(dir, &Corpus::read(&text, documents)?, device)?)
}

fn parameters(trainer: &Trainer) -> u64 {
    let config = trainer.model().config();
    config.ternary_parameters() + config.dense_parameters()
}

fn human_count(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.0} k", n as f64 / 1e3),
        _ => format!("{:.2} M", n as f64 / 1e6),
    }
}
