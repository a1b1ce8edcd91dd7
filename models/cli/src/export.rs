//! `bitnet export` and `bitnet convert`: a checkpoint in another format.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use bitnet_burn::GatedActivation;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::gguf::{Architecture, GgufTypes, TernaryType};
use bitnet_burn_engine::hf::Style;
use bitnet_burn_engine::text::{human_bytes, human_seconds};
use bitnet_burn_train::export;
use bitnet_burn_train::export::{ExportOptions, Progress, Summary, Target};
use clap::error::ErrorKind;
use clap::{Args, ValueEnum};

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
/// Ternary weights are the same afterwards, and so are their scales, but where a format can't hold one: the
/// summary says what was rounded, and by how much. What was written is read back and compared with the source
/// before it gets its name.
#[derive(Debug, Args)]
#[command(after_help = CONVERT_EXAMPLES)]
pub struct ConvertArgs {
    /// The model: a GGUF file, or a directory with config.json and safetensors
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// The feed-forward activation, for files that don't state it: relu2 or silu
    #[arg(long, value_name = "NAME", value_parser = activation)]
    hidden_act: Option<GatedActivation>,
    #[command(flatten)]
    output: OutputArgs,
}

const CONVERT_EXAMPLES: &str = "\
Examples:
  bitnet convert Falcon-E-1B/ --to gguf                      # Falcon-E-1B-i2_s.gguf
  bitnet convert model.gguf --to gguf --ternary tq2_0 --embedding q6_k --out model-tq2_0.gguf
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
    /// GGUF: how ternary weights are stored [default: i2_s]
    #[arg(long, value_enum, value_name = "TYPE")]
    ternary: Option<Ternary>,
    /// Hugging Face: how ternary weights are stored [default: packed]
    #[arg(long, value_enum, value_name = "STYLE")]
    style: Option<HfStyle>,
    /// GGUF: the architecture that the file names [default: the one under which most programs compute the model]
    #[arg(long, value_enum, value_name = "NAME")]
    architecture: Option<GgufArchitecture>,
    /// Type of the embedding, and of the output head where that is not tied [default: as in the source]
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
    /// 2 bits a weight, exact scale: bitnet.cpp's
    #[value(name = "i2_s")]
    I2_S,
    /// 2.06 bits a weight, f16 scale: llama.cpp's
    #[value(name = "tq2_0")]
    TQ2_0,
    /// 1.69 bits a weight, f16 scale: llama.cpp's
    #[value(name = "tq1_0")]
    TQ1_0,
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
}

impl From<GgufArchitecture> for Architecture {
    fn from(architecture: GgufArchitecture) -> Self {
        match architecture {
            GgufArchitecture::BitnetB158 => Self::BitnetB158,
            GgufArchitecture::Bitnet => Self::Bitnet,
            GgufArchitecture::Llama => Self::Llama,
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
}

impl OutputArgs {
    fn target(&self) -> Target {
        let dense = self.embedding.map(Into::into);
        match (self.to, self.ternary, self.style) {
            (Format::Gguf, ternary, None) => {
                let ternary = match ternary.unwrap_or(Ternary::I2_S) {
                    Ternary::I2_S => TernaryType::I2_S,
                    Ternary::TQ2_0 => TernaryType::TQ2_0,
                    Ternary::TQ1_0 => TernaryType::TQ1_0,
                };
                let architecture = self.architecture.map(Into::into);
                Target::Gguf(GgufTypes { ternary, dense, architecture })
            }
            (Format::Hf, None, _) if self.architecture.is_some() => {
                usage("--architecture is for --to gguf; a Hugging Face directory has model_type\n")
            }
            (Format::Hf, None, style) => {
                let style = match style.unwrap_or(HfStyle::Packed) {
                    HfStyle::Packed => Style::PackedAuto,
                    HfStyle::Bitlinear => Style::PackedInverse,
                    HfStyle::Master => Style::Online,
                };
                Target::Hf { style, dense }
            }
            (Format::Gguf, _, Some(_)) => usage("--style is for --to hf; GGUF has --ternary\n"),
            (Format::Hf, Some(_), _) => {
                usage("--ternary is for --to gguf; Hugging Face directories have --style\n")
            }
        }
    }

    /// The default place: the source's name and what is in it.
    fn default_out(&self, name: &str) -> PathBuf {
        let lower = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        match self.to {
            Format::Gguf => format!("{name}-{}.gguf", lower(&self.ternary.unwrap_or(Ternary::I2_S))).into(),
            Format::Hf => format!("{name}-{}", lower(&self.style.unwrap_or(HfStyle::Packed))).into(),
        }
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
    let target = args.target();
    let name = name_of(source);
    let checkpoint = export::newest_checkpoint(source)?;
    let is_run = checkpoint != source;
    let checkpoint = Checkpoint::open(&checkpoint, &OpenOptions { pre: args.pre.clone(), ..options })?;
    let out = args.out.clone().unwrap_or_else(|| args.default_out(&name));
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
        return output::print_json(&summary);
    }
    output::note(text(&summary, checkpoint.path(), started.elapsed().as_secs_f64()).trim_end());
    Ok(())
}

/// The source's name: of its directory, or of its file without the extension.
fn name_of(source: &Path) -> String {
    let source = source.canonicalize().unwrap_or_else(|_| source.to_owned());
    let name = if source.is_dir() { source.file_name() } else { source.file_stem() };
    name.map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

fn text(summary: &Summary, source: &Path, seconds: f64) -> String {
    let s = summary;
    let (bytes, time) = (human_bytes(s.bytes), human_seconds(seconds));
    let mut text = format!("{}: {bytes} in {time}, from {}\n", s.path.display(), source.display());
    let row = |label: &str, value: String| vec![format!("  {label}"), value];
    let scales = match &s.scales {
        None => "as in the source".into(),
        Some(r) => format!(
            "{} rounded, since {}: by {:.1e} of their value at most ({})",
            r.tensors, r.reason, r.max_relative_error, r.tensor
        ),
    };
    let mut rows = vec![
        row("format", format!("{}, architecture {}", s.format, s.architecture)),
        row("projections", format!("{}, {} weights, as in the source", s.projections, s.ternary_weights)),
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
