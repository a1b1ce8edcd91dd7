//! `bitnet distill`: a ternary student from a teacher.

use std::path::PathBuf;

use clap::Args;

use crate::train::{RunArgs, train};

/// Make a model ternary, taught by the model itself
///
/// The teacher is any model that `bitnet run` reads: F32 to 4-bit floats, or ternary. The student has its architecture, with
/// ternary projections, and learns two things at once: the text, and the probabilities that the teacher gives each token. It
/// begins with the teacher's weights, and with scales that keep the outputs of each layer on the text; layers.csv says how well
/// they do. What comes out, and --resume, are as with `bitnet train`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DistillArgs {
    /// The model to learn from: a GGUF file, a Hugging Face directory or a training run (distill.teacher)
    #[arg(long, value_name = "MODEL", required_unless_present_any = ["resume", "config", "print_config"], conflicts_with = "resume")]
    teacher: Option<PathBuf>,
    /// Begin with this model in place of the teacher; it has the same vocabulary (model.from)
    #[arg(long, value_name = "MODEL", conflicts_with = "resume")]
    from: Option<PathBuf>,
    /// Temperature of the probabilities that are compared (distill.temperature)
    #[arg(long, value_name = "T", conflicts_with = "resume")]
    temperature: Option<f64>,
    /// Steps over which quantisation is blended in (model.quantisation_warmup)
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    warmup: Option<u64>,
    /// Add RMSNorms before the output and down projections (distill.sub_norms)
    #[arg(long, conflicts_with = "resume")]
    sub_norms: bool,
    #[command(flatten)]
    run: RunArgs,
}

const EXAMPLES: &str = "\
Examples:
  bitnet distill --teacher model.gguf --text 'web/*.parquet' --out student
  bitnet distill --teacher llama/ --text book.txt --scales group:64 --steps 2000 --out student
  bitnet distill --resume student
  bitnet export student --to gguf --out student.gguf";

pub fn run(args: DistillArgs) -> anyhow::Result<()> {
    let DistillArgs { teacher, from, temperature, warmup, sub_norms, run } = args;
    train(run, |config| {
        if let Some(teacher) = teacher {
            config.distill.teacher = teacher;
        }
        if let Some(from) = from {
            config.model.from = from;
        }
        if let Some(temperature) = temperature {
            config.distill.temperature = temperature;
        }
        if let Some(warmup) = warmup {
            config.model.quantisation_warmup = warmup;
        }
        config.distill.sub_norms |= sub_norms;
    })
}
