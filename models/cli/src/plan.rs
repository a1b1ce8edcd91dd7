//! `bitnet plan`: chooses where a model should run, and predicts its speed.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use bitnet_burn::backends::devices;
use bitnet_burn_engine::plan::{MachineProfile, Measure, Plan, PlanRequest, Requirements, Strategy};
use bitnet_burn_engine::report::ModelSummary;
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::args::{FileArgs, KvCacheType, LmHead, ThreadArgs, positive, size};
use crate::engine;
use crate::output;
use crate::status::Status;

/// Choose where a model should run, on this machine or on another one, and predict its memory and speed
///
/// Reads only the headers of the model's files. The first call measures the machine (memory bandwidth, multiply-adds,
/// GPUs), which takes some seconds, and keeps the result in the cache directory. Other commands follow a plan with
/// `--device auto`. Exit status 3: the model does not fit.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PlanArgs {
    #[command(flatten)]
    file: FileArgs,
    #[command(flatten)]
    threads: ThreadArgs,
    /// What the plan optimises
    #[arg(long, value_enum, default_value_t = StrategyName::Performance)]
    strategy: StrategyName,
    /// The device: cpu, a GPU (wgpu:0, cuda:1), or the best GPU of a runtime (wgpu, metal, cuda, rocm)
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Number of layers on the GPU; the others are on the CPU. With all layers, the embedding and the output projection
    /// are on the GPU, too
    #[arg(long, value_name = "N")]
    gpu_layers: Option<usize>,
    /// Main memory that the model may use, in bytes or with a unit (3GB, 1500MB, 2GiB) [default: the available memory,
    /// less a sixteenth of the total]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Fraction of a GPU's memory that the model may use [default: 0.9; 0.75 with the strategy balanced]
    #[arg(long, value_name = "FRACTION")]
    gpu_memory_fraction: Option<f64>,
    /// Positions (tokens) of the KV cache [default: the length that the model was trained for, if it fits]
    #[arg(long, value_name = "N", value_parser = positive)]
    context: Option<usize>,
    /// Type of the keys and values in the KV cache [default: the most exact type that fits]
    #[arg(long, value_enum)]
    kv_cache: Option<KvCacheType>,
    /// Rows of the prompt that are computed at once
    #[arg(long, value_name = "N", value_parser = positive)]
    chunk: Option<usize>,
    /// How the output projection (lm_head) is computed
    #[arg(long, value_enum, value_name = "MODE", default_value_t = LmHead::File)]
    lm_head: LmHead,
    /// Plan for the machine that this JSON file describes (see --print-machine)
    #[arg(long, value_name = "FILE", conflicts_with = "measure")]
    machine: Option<PathBuf>,
    /// Print a description of this machine for --machine, instead of a plan
    #[arg(long)]
    print_machine: bool,
    /// What to measure on this machine
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = MeasureName::Missing)]
    measure: MeasureName,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet plan -m model.gguf
  bitnet plan -m model.gguf --strategy memory --memory 3GB
  bitnet plan -m model.gguf --json | jq .prediction
  bitnet plan --print-machine > laptop.json
  bitnet plan -m model.gguf --machine laptop.json --context 2048";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StrategyName {
    /// The highest speed, with all cores and almost all memory
    Performance,
    /// The least memory: the smallest KV cache and few rows at once
    Memory,
    /// A single device, and no more threads than needed for 90 % of the speed
    PowerEfficiency,
    /// High speed, but one core and a quarter of the memory stay free for other programs
    Balanced,
}

impl From<StrategyName> for Strategy {
    fn from(name: StrategyName) -> Self {
        match name {
            StrategyName::Performance => Self::Performance,
            StrategyName::Memory => Self::Memory,
            StrategyName::PowerEfficiency => Self::PowerEfficiency,
            StrategyName::Balanced => Self::Balanced,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MeasureName {
    /// What was not measured before
    Missing,
    /// Everything again
    Afresh,
    /// Nothing
    Nothing,
}

impl From<MeasureName> for Measure {
    fn from(name: MeasureName) -> Self {
        match name {
            MeasureName::Missing => Self::Missing,
            MeasureName::Afresh => Self::Afresh,
            MeasureName::Nothing => Self::Nothing,
        }
    }
}

#[derive(Serialize)]
struct Output<'a> {
    model: &'a ModelSummary,
    requirements: &'a Requirements,
    #[serde(flatten)]
    plan: &'a Plan,
    machine: &'a MachineProfile,
}

pub fn run(args: PlanArgs) -> anyhow::Result<ExitCode> {
    let threads = args.threads.threads;
    if let Some(device) = args.device.as_deref().filter(|device| device.starts_with(devices::REMOTE)) {
        bail!(
            "--device {device}: a plan covers only this machine. Run `bitnet plan` on the worker's machine, and name the \
             worker with --device of other commands"
        );
    }
    let machine = match &args.machine {
        Some(path) => MachineProfile::read(path)?,
        None => {
            if cfg!(debug_assertions) && args.measure != MeasureName::Nothing {
                output::warning("this program was built without optimisation, so it measures too low speeds");
            }
            let cache_dir = engine::config()?.0.cache_dir;
            let machine = MachineProfile::detect(cache_dir.as_deref(), args.measure.into(), threads);
            for problem in &machine.problems {
                output::warning(problem);
            }
            machine
        }
    };
    if args.print_machine {
        let json = serde_json::to_string_pretty(&machine).context("cannot write JSON")?;
        output::print(json)?;
        return Ok(Status::Done.into());
    }
    let checkpoint = args.file.open()?;
    let requirements = Requirements::of(&checkpoint, args.lm_head.into())?;
    let request = PlanRequest {
        strategy: args.strategy.into(),
        device: args.device,
        gpu_layers: args.gpu_layers,
        threads,
        memory: args.memory,
        gpu_memory_fraction: args.gpu_memory_fraction,
        context: args.context,
        kv_cache: args.kv_cache.map(Into::into),
        rows: args.chunk,
    };
    let plan = Plan::new(&requirements, &machine, &request)?;
    if args.json {
        let model = &ModelSummary::of(&checkpoint);
        output::print_json(&Output { model, requirements: &requirements, plan: &plan, machine: &machine })?;
    } else {
        output::print(plan.to_string().trim_end())?;
    }
    // A careful plan for an unknown machine does not know what fits.
    let status = if plan.fits || plan.fallback { Status::Done } else { Status::Mismatch };
    Ok(status.into())
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("1500"), Ok(1500));
        assert_eq!(size("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        for wrong in ["", "GB", "-1", "1.2.3GB", "3 apples", "1e30", "0", "99999999999GB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
