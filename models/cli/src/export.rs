//! `bitnet export` and `bitnet convert`: a checkpoint in another format.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use bitnet_burn::GatedActivation;
use bitnet_burn_engine::adapter::Adapter;
use bitnet_burn_engine::checkpoint::{Checkpoint, MergeLoss, OpenOptions};
use bitnet_burn_engine::gguf::{Architecture, GgufTypes, TernaryType};
use bitnet_burn_engine::hf::Style;
use bitnet_burn_engine::text::{human_bytes, human_seconds};
use bitnet_burn_train::export;
use bitnet_burn_train::export::{ExportOptions, Progress, Summary, Target};
use clap::error::ErrorKind;
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::args::{DenseType, activation};
use crate::output::{self, columns};

/// Write a trained model as a GGUF file or a Hugging Face directory
///
/// CHECKPOINT is a training run's directory (its newest finished checkpoint is taken), one of the checkpoints in
/// it, or any other model. The float weights of training become ternary: s = mean |W|, codes -1, 0, 1. What was
/// written is read back and compared with the checkpoint before it gets its name.
#[derive(Debug, Args)]
#[command(after_help = EXPORT_EXAMPLES)]
pub struct ExportArgs {
    /// The run or checkpoint
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

const EXPORT_EXAMPLES: &str = "\
Examples:
  bitnet export runs/stories --to gguf                       # stories-i2_s.gguf
  bitnet export runs/stories --to gguf --embedding q8_0 --out stories.gguf
  bitnet export runs/stories --to hf --style master --out stories-bf16";

/// Convert a model from any format that is read to GGUF or a Hugging Face directory
///
/// Ternary weights and their scales are the same afterwards. What a format can't hold exactly is an error that names tensor,
/// row and scale; with --requantise it becomes the nearest, and the summary says what was lost. What was written is read
/// back and compared with the source before it gets its name.
#[derive(Debug, Args)]
#[command(after_help = CONVERT_EXAMPLES)]
pub struct ConvertArgs {
    /// The model: a GGUF file, or a directory with config.json and safetensors
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// The feed-forward activation, for files that don't state it: relu2, silu, gelu or gelu_pytorch_tanh
    #[arg(long, value_name = "NAME", value_parser = activation)]
    hidden_act: Option<GatedActivation>,
    #[command(flatten)]
    output: OutputArgs,
}

const CONVERT_EXAMPLES: &str = "\
Examples:
  bitnet convert Falcon-E-1B/ --to gguf                      # Falcon-E-1B-i2_s.gguf
  bitnet convert model.gguf --to gguf --ternary tq2_0 --embedding q6_k --out model-tq2_0.gguf
  bitnet convert Ternary-Bonsai-8B/ --to gguf --ternary pq2_0
  bitnet convert model.gguf --to gguf --ternary tq1_0 --requantise
  bitnet convert model.gguf --to gguf --architecture bitnet --out model-bitnet.gguf
  bitnet convert model.gguf --to hf --embedding bf16 --out model-hf";

/// What is written, and where.
#[derive(Debug, Args)]
struct OutputArgs {
    /// The format
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Format,
    /// The file or directory to write [default: SOURCE's name with the type, in the working directory]
    #[arg(long, short, value_name = "PATH")]
    out: Option<PathBuf>,
    /// GGUF: how ternary weights are stored [default: i2_s for models with int8 activations by row, else as in the
    /// source, or q2_0]
    #[arg(long, value_enum, value_name = "TYPE")]
    ternary: Option<Ternary>,
    /// Hugging Face: how ternary weights are stored [default: packed for models with int8 activations by row, else values]
    #[arg(long, value_enum, value_name = "STYLE")]
    style: Option<HfStyle>,
    /// GGUF: the architecture that the file names [default: the one under which most programs compute the model]
    #[arg(long, value_enum, value_name = "NAME")]
    architecture: Option<GgufArchitecture>,
    /// GGUF: where the type can't hold the weights exactly, write the nearest that it can hold
    #[arg(long)]
    requantise: bool,
    /// Merge a LoRA adapter into the model: W + scale * B * A becomes ternary again, by the nearest weights, and the summary
    /// says what of the adapter is left. Use it unmerged (--adapter of the other commands) to lose nothing
    #[arg(long, value_name = "DIR")]
    merge_adapter: Option<PathBuf>,
    /// Type of the embedding, and of the output head where that is not tied [default: as in the source, or like the
    /// other ternary weights if it is ternary]
    #[arg(long, value_enum, value_name = "TYPE")]
    embedding: Option<DenseType>,
    /// The model's name in the file [default: the source's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The pre-tokenizer: in a GGUF source without one, or for a tokenizer.json with one that is not recognised
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Leave the tokenizer out
    #[arg(long)]
    no_tokenizer: bool,
    /// Replace a model that is there
    #[arg(long, short)]
    force: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One file, for this program and those of llama.cpp's family
    Gguf,
    /// A directory, for this program and transformers
    Hf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(non_camel_case_types, reason = "the names are the formats'")]
enum Ternary {
    /// 2 bits a weight, one exact scale: bitnet.cpp's
    #[value(name = "i2_s")]
    I2_S,
    /// 2.25 bits a weight, an f16 scale for 64: llama.cpp's
    #[value(name = "q2_0")]
    Q2_0,
    /// 2.13 bits a weight, an f16 scale for 128: Prism ML's
    #[value(name = "pq2_0")]
    PQ2_0,
    /// 1.75 bits a weight, an f16 scale for 128: Prism ML's
    #[value(name = "ptq1_0")]
    PTQ1_0,
    /// 2.06 bits a weight, an f16 scale for 256: llama.cpp's
    #[value(name = "tq2_0")]
    TQ2_0,
    /// 1.69 bits a weight, an f16 scale for 256: llama.cpp's
    #[value(name = "tq1_0")]
    TQ1_0,
}

impl From<Ternary> for TernaryType {
    fn from(ternary: Ternary) -> Self {
        match ternary {
            Ternary::I2_S => Self::I2_S,
            Ternary::Q2_0 => Self::Q2_0,
            Ternary::PQ2_0 => Self::PQ2_0,
            Ternary::PTQ1_0 => Self::PTQ1_0,
            Ternary::TQ2_0 => Self::TQ2_0,
            Ternary::TQ1_0 => Self::TQ1_0,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GgufArchitecture {
    /// Squared ReLU with sub-norms, in bitnet.cpp before July 2026 and in ik_llama.cpp
    #[value(name = "bitnet-b1.58")]
    BitnetB158,
    /// SiLU with sub-norms, in all programs of llama.cpp's family
    Bitnet,
    /// SiLU without sub-norms
    Llama,
    /// The same with factors of embedding, residuals and logits
    #[value(name = "minicpm")]
    MiniCpm,
    /// Biases of q, k and v
    Qwen2,
    /// Norms of queries and keys
    Qwen3,
    /// The same with gated DeltaNets in most layers
    Qwen35,
    /// As qwen3, with experts
    #[value(name = "qwen3moe")]
    Qwen3Moe,
    /// The same with sliding windows
    Maple,
}

impl From<GgufArchitecture> for Architecture {
    fn from(architecture: GgufArchitecture) -> Self {
        match architecture {
            GgufArchitecture::BitnetB158 => Self::BitnetB158,
            GgufArchitecture::Bitnet => Self::Bitnet,
            GgufArchitecture::Llama => Self::Llama,
            GgufArchitecture::MiniCpm => Self::MiniCpm,
            GgufArchitecture::Qwen2 => Self::Qwen2,
            GgufArchitecture::Qwen35 => Self::Qwen35,
            GgufArchitecture::Qwen3 => Self::Qwen3,
            GgufArchitecture::Qwen3Moe => Self::Qwen3Moe,
            GgufArchitecture::Maple => Self::Maple,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum HfStyle {
    /// 2 bits a weight (autobitlinear, offline)
    Packed,
    /// 2 bits a weight and the inverse scale (bitlinear), as older checkpoints have it
    Bitlinear,
    /// The float weights of training (autobitlinear, online), where the source has them
    Master,
    /// Float values, for models without int8 activations by row
    Values,
}

impl OutputArgs {
    /// Refuses what belongs to the other format.
    fn check(&self) {
        match self.to {
            Format::Gguf if self.style.is_some() => usage("--style is for --to hf; GGUF has --ternary\n"),
            Format::Hf if self.architecture.is_some() => {
                usage("--architecture is for --to gguf; a Hugging Face directory has model_type\n")
            }
            Format::Hf if self.ternary.is_some() => {
                usage("--ternary is for --to gguf; Hugging Face directories have --style\n")
            }
            Format::Hf if self.requantise => {
                usage("--requantise is for --to gguf; Hugging Face directories hold all weights exactly\n")
            }
            _ => {}
        }
    }

    /// What is written, and what it is called in the default place.
    fn target(&self, checkpoint: &Checkpoint) -> anyhow::Result<(Target, String)> {
        let dense = self.embedding.map(Into::into);
        Ok(match self.to {
            Format::Gguf => {
                let ternary = self.ternary.map(TernaryType::from);
                let ternary = ternary.map_or_else(|| export::default_ternary(checkpoint), Ok)?;
                let (architecture, requantise) = (self.architecture.map(Into::into), self.requantise);
                let types = GgufTypes { ternary, dense, architecture, requantise };
                (Target::Gguf(types), format!("{ternary:?}.gguf").to_lowercase())
            }
            Format::Hf => {
                let style = match self.style {
                    None => export::default_style(checkpoint)?,
                    Some(HfStyle::Packed) => Style::PackedAuto,
                    Some(HfStyle::Bitlinear) => Style::PackedInverse,
                    Some(HfStyle::Master) => Style::Online,
                    Some(HfStyle::Values) => Style::Values,
                };
                let name = match style {
                    Style::PackedAuto => "packed",
                    Style::PackedInverse => "bitlinear",
                    Style::Online => "master",
                    Style::Values => "values",
                };
                (Target::Hf { style, dense }, name.to_owned())
            }
        })
    }
}

fn usage(message: &str) -> ! {
    clap::Error::raw(ErrorKind::ArgumentConflict, message).exit()
}

pub fn export(args: ExportArgs) -> anyhow::Result<()> {
    run(&args.checkpoint, OpenOptions::default(), args.output)
}

pub fn convert(args: ConvertArgs) -> anyhow::Result<()> {
    run(&args.source, OpenOptions { hidden_act: args.hidden_act, pre: None }, args.output)
}

fn run(source: &Path, options: OpenOptions, args: OutputArgs) -> anyhow::Result<()> {
    args.check();
    let name = name_of(source);
    let checkpoint = export::newest_checkpoint(source)?;
    let is_run = checkpoint != source;
    let checkpoint = Checkpoint::open(&checkpoint, &OpenOptions { pre: args.pre.clone(), ..options })?;
    let (checkpoint, merged) = match &args.merge_adapter {
        None => (checkpoint, Vec::new()),
        Some(path) => {
            let adapter = Adapter::open(&export::newest_checkpoint(path)?, checkpoint.config())?;
            checkpoint.merged(&adapter)?
        }
    };
    let (target, kind) = args.target(&checkpoint)?;
    let middle = if merged.is_empty() { "" } else { "-merged" };
    let out = args.out.unwrap_or_else(|| format!("{name}{middle}-{kind}").into());
    let options = ExportOptions {
        // A checkpoint of a run is named by its step.
        name: args.name.or_else(|| is_run.then_some(name).filter(|_| checkpoint.config().name.is_none())),
        tokenizer: !args.no_tokenizer,
        pre: args.pre,
        overwrite: args.force,
        ..ExportOptions::new(target)
    };

    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).context("cannot listen to Ctrl-C")?;
    let bar = output::bar(0, "{msg} [{bar:30}] {percent} %");
    let started = Instant::now();
    let result = export::export(&checkpoint, &out, &options, &mut |progress| {
        let (message, done, total) = match progress {
            Progress::Writing { done, total } => ("writing", done, total),
            Progress::Comparing { done, total } => ("comparing", done, total),
        };
        bar.set_message(message);
        bar.set_length(total);
        bar.set_position(done);
        if interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let summary = result?;
    if args.json {
        return output::print_json(&Output { summary: &summary, merged: &merged });
    }
    if !merged.is_empty() {
        output::note(merge_text(&merged).trim_end());
    }
    output::note(text(&summary, checkpoint.path(), started.elapsed().as_secs_f64()).trim_end());
    Ok(())
}

#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    /// What merging an adapter did to each projection, and to all.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    merged: &'a [MergeLoss],
}

/// What is left of an adapter.
fn merge_text(losses: &[MergeLoss]) -> String {
    let Some(all) = losses.last() else { return String::new() };
    let head = ["  merged", "adapter, of the weights", "lost, of the sum", "adapter kept", "codes changed"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(losses.iter().map(|loss| {
        let percent = |share: f64| format!("{:.2} %", 100.0 * share);
        let MergeLoss { projection, update, error, kept, flipped } = loss;
        let figures = [update, error, kept, flipped].map(|share| percent(*share));
        [format!("  {projection}")].into_iter().chain(figures).collect()
    }));
    let mut text = columns(&rows);
    if all.kept < 0.5 {
        text.push_str(
            "  warning: ternary weights round most of this adapter away; --adapter of the other commands adds it unmerged, \
             without a loss\n",
        );
    }
    text
}

/// The source's name: of its directory, or of its file without the extension.
fn name_of(source: &Path) -> String {
    let source = source.canonicalize().unwrap_or_else(|_| source.to_owned());
    let name = if source.is_dir() { source.file_name() } else { source.file_stem() };
    name.map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

fn projections(s: &Summary) -> String {
    let all = format!("{}, {} weights", s.projections, s.ternary_weights);
    match &s.requantised {
        None => all + ", as in the source",
        Some(r) => format!(
            "{all}; {} tensors requantised: rms error {:.2} % of the weights' rms (largest {:.2} %, {}), a weight by {:.1e} at \
             most ({})",
            r.tensors,
            100.0 * r.rms,
            100.0 * r.worst.1,
            r.worst.0,
            r.max_error,
            r.tensor
        ),
    }
}

fn text(summary: &Summary, source: &Path, seconds: f64) -> String {
    let s = summary;
    let (bytes, time) = (human_bytes(s.bytes), human_seconds(seconds));
    let mut text = format!("{}: {bytes} in {time}, from {}\n", s.path.display(), source.display());
    let row = |label: &str, value: String| vec![format!("  {label}"), value];
    let scales = match &s.scales {
        None if s.requantised.is_some() => "as far as the type holds them".into(),
        None => "as in the source".into(),
        Some(r) => format!(
            "{} rounded, since {}: by {:.1e} of their value at most ({})",
            r.tensors, r.reason, r.max_relative_error, r.tensor
        ),
    };
    let mut rows = vec![
        row("format", format!("{}, architecture {}", s.format, s.architecture)),
        row("projections", projections(s)),
        row("scales", scales),
        row(
            "embedding",
            if s.converted.is_empty() {
                format!("{}, as in the source", s.embedding)
            } else {
                s.embedding.into()
            },
        ),
    ];
    rows.extend(s.converted.iter().map(|c| {
        let error = if c.max_error == 0.0 {
            "exactly".into()
        } else {
            format!("rounded: by {:.1e} at most, where the largest value is {:.1e}", c.max_error, c.max_value)
        };
        row("", format!("{} from {} to {}, {error}", c.tensor, c.from, c.to))
    }));
    text.push_str(&columns(&rows));
    for note in &s.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    for warning in &s.warnings {
        text.push_str(&format!("  warning: {warning}\n"));
    }
    text
}
