//! `bitnet plan`: where a model should run, and how fast it will be.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use bitnet_burn::backends::devices;
use bitnet_burn_engine::plan::{MachineProfile, Measure, Plan, PlanRequest, Requirements, Strategy};
use bitnet_burn_engine::report::ModelSummary;
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::args::{FileArgs, KvCacheType, LmHead, ThreadArgs, positive};
use crate::engine;
use crate::output;

/// Say where a model should run on this machine, or on another one, how much memory it takes and how fast it will be
///
/// Reads the headers of the model's files alone. What the machine can do (memory bandwidth, multiply-adds, GPUs) is
/// measured once, some seconds, and kept in the cache directory. `run`, `bench` and the others follow a plan with
/// `--device auto`. Exit status 3: it does not fit.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PlanArgs {
    #[command(flatten)]
    file: FileArgs,
    #[command(flatten)]
    threads: ThreadArgs,
    /// What matters
    #[arg(long, value_enum, default_value_t = StrategyName::Performance)]
    strategy: StrategyName,
    /// Compute there: cpu, a GPU (wgpu:0, cuda:1), or the best GPU of a runtime (wgpu, metal, cuda, rocm)
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// So many layers on the GPU, the others on the CPU; all of them: embedding and output on the GPU, too
    #[arg(long, value_name = "N")]
    gpu_layers: Option<usize>,
    /// Main memory that may be used: bytes, or with a unit (3GB, 1500MB, 2GiB) [default: what is available, less a
    /// sixteenth of all]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// The part of a GPU's memory that may be used [default: 0.9]
    #[arg(long, value_name = "PART")]
    gpu_memory_fraction: Option<f64>,
    /// Positions of the KV cache [default: as many as the model was trained for and fit]
    #[arg(long, value_name = "N", value_parser = positive)]
    context: Option<usize>,
    /// Type of the cached keys and values [default: the most exact that fits]
    #[arg(long, value_enum)]
    kv_cache: Option<KvCacheType>,
    /// Rows of the prompt that are computed at once
    #[arg(long, value_name = "N", value_parser = positive)]
    chunk: Option<usize>,
    /// How the output projection (lm_head) is computed
    #[arg(long, value_enum, value_name = "MODE", default_value_t = LmHead::File)]
    lm_head: LmHead,
    /// Plan for the machine that this JSON file describes
    #[arg(long, value_name = "FILE", conflicts_with = "measure")]
    machine: Option<PathBuf>,
    /// Print this machine's description, to plan with elsewhere, instead of a plan
    #[arg(long)]
    print_machine: bool,
    /// What is measured: what was not measured before, everything, or nothing
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
    /// Speed, with all cores and almost all memory
    Performance,
    /// Few bytes: the smallest KV cache, few rows at once
    Memory,
    /// One device alone, and no more threads than reach 90 % of the speed
    PowerEfficiency,
    /// Speed, but a core and a quarter of the memory are left to other programs
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
    Missing,
    Afresh,
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

/// Bytes: `1500000000`, `1.5GB`, `2GiB`.
pub fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        unit => return Err(format!("{unit} is no unit of size; there are kB, MB, GB, KiB, MiB and GiB")),
    };
    let number: f64 = number.parse().map_err(|_| "a size is a number with a unit, such as 3GB".to_owned())?;
    let bytes = number * factor as f64;
    if (1.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err("it must be at least a byte, below 1e18".into())
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
            "--device {device}: plans know this machine alone; what a worker computes is said with --device of the \
             other subcommands, and `bitnet plan` there says what fits its machine"
        );
    }
    let machine = match &args.machine {
        Some(path) => MachineProfile::read(path)?,
        None => {
            if cfg!(debug_assertions) && args.measure != MeasureName::Nothing {
                output::warning("this program was built without optimisation: what it measures is too slow");
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
        return Ok(ExitCode::SUCCESS);
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
    // A careful plan for an unknown machine says nothing about what fits.
    Ok(if plan.fits || plan.fallback { ExitCode::SUCCESS } else { ExitCode::from(3) })
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
