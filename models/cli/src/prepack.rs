//! `bitnet prepack`: writes a model's weights in the layouts of this machine's kernels to a file.

use std::time::Instant;

use bitnet_burn_engine::prepack;
use bitnet_burn_engine::text::{human_bytes, human_seconds};
use clap::Args;
use serde::Serialize;

use crate::args::{FileArgs, KernelArgs, LmHead};
use crate::engine::config;
use crate::output;
use crate::status::discard_when_interrupted;

/// Pack a model's weights for this machine's kernels, and write them to a file next to the model
///
/// Later starts map this file, PATH.prepacked (model.prepacked in a directory), and need not pack. If the model or the
/// chosen kernels have changed, the weights are packed in memory as usual, and a warning gives the reason. The file is
/// about as large as the model. The weights of experts are left out. Results stay the same, bit for bit.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PrepackArgs {
    #[command(flatten)]
    file: FileArgs,
    #[command(flatten)]
    kernels: KernelArgs,
    /// How later runs compute the output projection (lm_head); `file` needs no packing
    #[arg(long, value_enum, value_name = "MODE", default_value_t = LmHead::File, help_heading = "Model")]
    lm_head: LmHead,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet prepack -m model.gguf
  bitnet prepack -m model.gguf --lm-head int8      # also for runs with --lm-head int8
  bitnet bench -m model.gguf                       # reports how many matrices were mapped";

#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    summary: &'a prepack::Summary,
    seconds: f64,
}

pub fn run(args: PrepackArgs) -> anyhow::Result<()> {
    args.kernels.configure_with(config()?.0)?;
    let checkpoint = args.file.open()?;
    let started = Instant::now();
    discard_when_interrupted()?;
    let bar = output::bar(1, "packing {bar:30} {pos}/{len}");
    let summary = prepack::write(&checkpoint, args.lm_head.into(), &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        return output::print_json(&Output { summary: &summary, seconds });
    }
    let layouts: Vec<String> =
        summary.layouts.iter().map(|(layout, count)| format!("{count} x {layout}")).collect();
    let note = match checkpoint.config().options.experts {
        Some(_) => "\nThe weights of experts are left as the model has them",
        None => "",
    };
    output::print(format_args!(
        "{}: {} in {}\n{}{note}",
        summary.path.display(),
        human_bytes(summary.bytes),
        human_seconds(seconds),
        layouts.join(", ")
    ))
}
