//! `bitnet bench`: measures how fast a model runs on this machine.

mod judge;
mod suite;
mod text;
mod turns;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bitnet_burn_engine::Engine;
use bitnet_burn_engine::bench::{self, BenchOptions, BenchReport, BenchResult, Spread};
use bitnet_burn_engine::device::DeviceSpec;
use bitnet_burn_engine::device_bench::{self, DeviceBench, DeviceBenchOptions};
use bitnet_burn_engine::report::SCHEMA;
use bitnet_burn_engine::synth::{self, SynthOptions, SynthScales};
use bitnet_burn_engine::text::count;
use bitnet_burn_engine::tokenizer::Tokenizer;
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::files::UnfinishedDirectory;
use burn::tensor::Device;
use clap::Args;
use serde::Serialize;

use self::judge::{JudgeArgs, Judgement, duration};
use self::suite::SuiteArgs;
use crate::args::{EngineArgs, Model, ReceiptArgs, positive};
use crate::engine::{device_error, remember};
use crate::output;
use crate::status::{Status, discard_when_interrupted};

/// Measure prefill and decode speed, and the memory's read bandwidth
///
/// Each repetition is a new sequence: a prompt of -p random tokens, then -n tokens one by one (forward pass and
/// logits, without sampling). A warm-up repetition is not counted. Between the repetitions, the same threads read a
/// large buffer, to measure the memory's bandwidth. Decoding reads bytes_per_token bytes for every token (ternary
/// weights, output head, norms) and the KV cache.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    receipt: ReceiptArgs,
    /// Tokens of the prompt; 0 measures only decode [default: 128; 512 with --gpu-suite, 24 with --quick]
    #[arg(long, short, value_name = "N")]
    prompt: Option<usize>,
    /// Tokens generated after the prompt; 0 measures only prefill [default: 64; 4 with --quick]
    #[arg(long, short = 'n', value_name = "N")]
    generate: Option<usize>,
    #[command(flatten)]
    suite: SuiteArgs,
    /// Number of repetitions [default: 5; 1 with --quick]
    #[arg(long, short, value_name = "N", value_parser = positive)]
    repetitions: Option<usize>,
    /// Also measure decode at these context lengths, once each
    #[arg(long, value_name = "N,N,...", value_delimiter = ',')]
    contexts: Vec<usize>,
    /// Also measure decode of these numbers of sequences at once, once each; every sequence has its own prompt
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', value_parser = positive)]
    batches: Vec<usize>,
    /// Also measure the latency of requests with prompts of these lengths, once each
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', value_parser = positive)]
    prompts: Vec<usize>,
    /// Show where the time goes, by operation, part of the model and shape, for prefill and decode. It is measured in further
    /// repetitions. The model must be on the CPU
    #[arg(long)]
    profile: bool,
    /// Write the operations of the last profiled repetition as a Chrome trace, for Perfetto (ui.perfetto.dev) or
    /// chrome://tracing
    #[arg(long, value_name = "FILE", requires = "profile")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    judge: JudgeArgs,
    /// Compare with another build of this program, in turns: each turn is a process of each, with the other flags. -r is the
    /// number of turns [default: 8]. If this program is worse by more than --tolerance, beyond noise, the exit status is 3
    #[arg(
        long,
        value_name = "PATH",
        help_heading = "Judging",
        conflicts_with_all = ["record", "against", "require", "profile", "receipt", "gpu_suite", "ab"]
    )]
    against_program: Option<PathBuf>,
    /// Compare two kernels (see `bitnet kernels`) on the model, in turns likewise
    #[arg(
        long,
        value_names = ["KERNEL_A", "KERNEL_B"],
        num_args = 2,
        help_heading = "Judging",
        conflicts_with_all = ["record", "against", "require", "profile", "receipt", "gpu_suite", "kernel"]
    )]
    ab: Option<Vec<String>>,
    /// Repeat for so long (90s, 30min, 1h), and compare the first third of the time with the last: memory, file descriptors,
    /// threads, prefill and decode. If one grows, or becomes slower by more than --tolerance, the exit status is 3
    #[arg(
        long,
        value_name = "TIME",
        value_parser = duration,
        help_heading = "Judging",
        conflicts_with_all = ["record", "against", "require", "profile", "receipt", "gpu_suite", "ab", "against_program",
            "repetitions", "contexts", "batches", "prompts"]
    )]
    soak: Option<Duration>,
    /// Allocate every sequence's KV cache for the whole --context at the start, so that it does not grow during the
    /// measurement
    #[arg(long)]
    preallocate: bool,
    /// Also measure the GPU that --device names: its read bandwidth, every kernel on every matrix of a layer (after a
    /// comparison with the CPU's results), a layer's operations, quantising and packing. Without --batches, batches are 1
    /// to 64, as far as memory allows. Without --model, the model has random weights in the shape of BitNet b1.58 2B-4T
    #[arg(long)]
    gpu_suite: bool,
    /// Use small sizes, to test that the suite works
    #[arg(long, requires = "gpu_suite")]
    quick: bool,
    /// Rows of the prompt that are computed at once [default: 256; with --device auto, the plan's]
    #[arg(long, value_name = "N", value_parser = positive)]
    chunk: Option<usize>,
    /// Seed of the random tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Exit status: 3 if something is worse than --against or --against-program allow, misses --require, or is not flat
in --soak.

Examples:
  bitnet bench -m model.gguf -p 128 -n 64 --threads 1 --repetitions 5
  bitnet bench -m model.gguf -p 512 -n 0                        # only prefill
  bitnet bench -m model.gguf --contexts 128,512,2048 --json | jq .decode_by_context
  bitnet bench -m model.gguf --batches 1,2,4,8,16               # sequences at once
  bitnet bench -m model.gguf --prompts 16,128,1024              # latency by the length of the prompt
  bitnet bench -m model.gguf --profile --trace trace.json       # where the time goes
  bitnet bench -m model.gguf --record history.jsonl
  bitnet bench -m model.gguf --against history.jsonl --require 'decode>=15,first-token<=0.2s'
  bitnet bench -m model.gguf --against-program ./older-bitnet
  bitnet bench --suite runs.toml --html figures.html
  bitnet bench -m model.gguf --soak 1h
  bitnet bench --gpu-suite --device cuda --json > gpu.json      # everything about a GPU";

#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    report: &'a BenchReport,
    #[serde(flatten)]
    judgement: &'a Judgement,
}

/// The GPU that the suite measures.
fn gpu(args: &BenchArgs) -> anyhow::Result<Device> {
    args.engine.load.secret.use_for_workers()?;
    match &args.engine.load.device {
        Some(DeviceSpec::On(parts)) if args.engine.load.gpu_layers.is_none() => match &parts[..] {
            [(name, None)] if !name.kind.is_host() => return name.open().map_err(device_error),
            _ => {}
        },
        _ => {}
    }
    bail!("--gpu-suite measures one GPU: name it with --device, such as --device cuda or --device wgpu:0")
}

/// Writes a model of random weights, for calls without --model.
fn synthetic(shape: &str) -> anyhow::Result<UnfinishedDirectory> {
    discard_when_interrupted()?;
    let dir = UnfinishedDirectory::new(&std::env::temp_dir())
        .context("cannot make a temporary directory for a model of random weights")?;
    let config = synth::shape(shape).context("the shape is unknown")?;
    let options = SynthOptions { config, scales: SynthScales::Tensor, embedding: DenseFormat::Q6_K, seed: 0 };
    let bar = output::bar(0, "writing random weights [{bar:30}] {bytes}/{total_bytes}");
    synth::write(&dir.path().join(MODEL), &options, &|done, all| {
        bar.set_length(all);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(dir)
}

const MODEL: &str = "random.gguf";

pub fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    if cfg!(debug_assertions) {
        output::warning("this program was built without optimisation: add --release to the cargo command");
    }
    if let Some(older) = &args.against_program {
        return turns::against_program(&args, older);
    }
    if let Some([a, b]) = args.ab.as_deref() {
        return turns::kernels(&args, a, b);
    }
    if let Some(path) = &args.suite.suite {
        return suite::run(&args, path).map(|()| Status::Done.into());
    }
    measure(args)
}

fn measure(mut args: BenchArgs) -> anyhow::Result<ExitCode> {
    let gpu = args.gpu_suite.then(|| gpu(&args)).transpose()?;
    // Kept until the end, because its file is mapped.
    let mut random = None;
    if gpu.is_some() && args.engine.file.model.is_none() {
        if args.receipt.receipt.is_some() {
            bail!(
                "--receipt needs --model: the model of random weights is deleted at the end, so the receipt could not be checked"
            );
        }
        let dir = synthetic(if args.quick { "tiny" } else { "2b-4t" })?;
        args.engine.file.model = Some(Model::Path(dir.path().join(MODEL)));
        random = Some(dir);
    }
    let (prompt, generate, repetitions, batches): (_, _, _, &[usize]) = match (args.gpu_suite, args.quick) {
        (false, _) => (128, 64, 5, &[]),
        (true, false) => (512, 64, 5, &[1, 2, 4, 8, 16, 32, 64]),
        (true, true) => (24, 4, 1, &[1, 3]),
    };
    let (prompt, generate) = (args.prompt.unwrap_or(prompt), args.generate.unwrap_or(generate));
    args.judge.check(prompt, generate)?;
    let batches = if args.batches.is_empty() { batches.to_vec() } else { args.batches.clone() };
    let engine = args.engine.open(|options| {
        let options = options.without_tokenizer();
        if let Some(chunk) = args.chunk { options.rows(chunk) } else { options }
    })?;
    if args.profile && !engine.model().is_host() {
        bail!(
            "--profile measures the CPU, and the model is on {}: leave --device out",
            engine.execution().device
        );
    }
    let mut options = BenchOptions {
        prompt_tokens: prompt,
        generated_tokens: generate,
        repetitions: args.repetitions.unwrap_or(repetitions),
        contexts: args.contexts.clone(),
        batches,
        prompts: args.prompts.clone(),
        profile: args.profile,
        process_start: Some(crate::started()),
        chunk: engine.settings().rows,
        context: engine.settings().context,
        kv_cache: engine.settings().kv_cache,
        preallocate: args.preallocate,
        seed: args.seed,
    };
    if args.preallocate || !options.batches.is_empty() {
        let whole = if args.preallocate { options.context } else { prompt.saturating_add(generate) };
        let positions = whole.clamp(1, options.context);
        // These are defaults, so those without room are left out.
        if args.batches.is_empty() {
            options.batches.retain(|&sequences| engine.check_room(sequences, positions).is_ok());
        }
        let most = options.batches.iter().copied().max().unwrap_or(1);
        engine.check_room(most, positions).with_context(|| match options.batches.is_empty() {
            true => "--preallocate".to_owned(),
            false => format!("--batches {most}"),
        })?;
    }
    if let Some(duration) = args.soak {
        return soak(&args, &engine, &options, duration);
    }
    let prepared = args.judge.prepare(&engine, &options)?;
    let report = report(&args, &engine, &options, gpu.as_ref())?;
    drop(random);
    args.receipt.write(&engine, "bench", &report, || None)?;
    if let (Some(path), Some(profile)) = (&args.trace, &report.result.profile) {
        output::write_file(path, |out| Ok(profile.write_trace(out)?))?;
    }
    let judgement = args.judge.judge(prepared, &report)?;
    if args.json {
        output::print_json(&Output { report: &report, judgement: &judgement })?;
    } else {
        let mut text = text::report(&report);
        if let Some(suite) = &report.gpu_suite {
            text.push_str(&format!("\n{suite}"));
        }
        text.push_str(&judgement.text());
        output::print(text.trim_end())?;
    }
    if let Some(suite) = &report.gpu_suite {
        all_right(suite.matmuls.len() - suite.kernels_right)?;
    }
    Ok(if judgement.failed() { Status::Mismatch } else { Status::Done }.into())
}

/// Runs the model for long.
fn soak(
    args: &BenchArgs,
    engine: &Engine,
    options: &BenchOptions,
    duration: Duration,
) -> anyhow::Result<ExitCode> {
    let bar = output::bar(duration.as_secs(), "soaking [{bar:30}] {elapsed} of {len} s");
    let soak = bench::soak(
        engine.model(),
        tokenizer(engine).as_ref(),
        options,
        (duration, args.judge.tolerance),
        &mut |elapsed| bar.set_position(elapsed.as_secs()),
    )?;
    bar.finish_and_clear();
    match args.json {
        true => output::print_json(&soak)?,
        false => output::print(soak.to_string().trim_end())?,
    }
    Ok(if soak.flat { Status::Done } else { Status::Mismatch }.into())
}

/// The model's tokenizer. Only the latency of texts needs it, and not every model has one.
fn tokenizer(engine: &Engine) -> Option<Tokenizer> {
    let checkpoint = engine.checkpoint();
    Tokenizer::from_source(&checkpoint.tokenizer_source(), checkpoint.config().vocab_size).ok()
}

/// Measures the model, and the GPU by itself if one is given.
fn report(
    args: &BenchArgs,
    engine: &Engine,
    options: &BenchOptions,
    gpu: Option<&Device>,
) -> anyhow::Result<BenchReport> {
    let (prompt, generate) = (options.prompt_tokens, options.generated_tokens);
    let checkpoint = engine.checkpoint();
    let tokenizer = tokenizer(engine);
    let bar = output::bar(0, "measuring [{bar:30}] {pos}/{len}");
    let result = bench::run(engine.model(), tokenizer.as_ref(), options, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    // Before the suite, so that the report covers the model alone.
    let mut execution = engine.execution();
    let gpu_suite = gpu.map(|gpu| gpu_suite(args, engine, &result, gpu)).transpose()?;
    execution.memory = engine.memory(result.kv_cache_bytes, options.chunk.min(prompt.max(1)));
    let median = |spread: Option<Spread>| spread.map(|spread| spread.median);
    let at = prompt + generate / 2;
    let (rate, prompt_rate) = (median(result.decode_tokens_per_s), median(result.prefill_tokens_per_s));
    execution.prediction = engine.outcome(at, rate, prompt_rate);
    remember(engine, &execution, at, rate, prompt_rate);
    let decodes = result.decode_by_context.iter().map(|at| at.decode_tokens_per_s);
    let decode = decodes.chain(result.decode_tokens_per_s.map(|spread| spread.max)).reduce(f64::max);
    engine.check_figures(&execution, result.prefill_tokens_per_s.map(|spread| spread.max), decode)?;
    Ok(BenchReport {
        schema: SCHEMA,
        model: engine.summary().clone(),
        config: checkpoint.config().clone(),
        load_seconds: engine.load_time().as_secs_f64(),
        result,
        gpu_suite,
        execution,
    })
}

fn gpu_suite(
    args: &BenchArgs,
    engine: &Engine,
    result: &BenchResult,
    gpu: &Device,
) -> anyhow::Result<DeviceBench> {
    let options = if args.quick { DeviceBenchOptions::quick() } else { DeviceBenchOptions::default() };
    let bar = output::bar(0, "measuring the GPU [{bar:30}] {pos}/{len}");
    let mut suite = device_bench::run(gpu, engine.checkpoint().config(), &options, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    suite.decode_fraction_of_bandwidth = (result.decode_tokens_per_s.filter(|_| !engine.model().is_host()))
        .map(|rate| rate.median * result.bytes_per_token as f64 / (suite.read_gb_per_s * 1e9));
    Ok(suite)
}

/// An error if a kernel of the suite was wrong or could not run.
fn all_right(wrong: usize) -> anyhow::Result<()> {
    match wrong {
        0 => Ok(()),
        _ => bail!(
            "the suite could not time {} by shape; the table gives the reasons",
            count(wrong as u64, "kernel")
        ),
    }
}
