//! `bitnet bench`: measures how fast a model runs on this machine.

use anyhow::{Context as _, bail};
use bitnet_burn::ModelConfig;
use bitnet_burn_engine::bench;
use bitnet_burn_engine::bench::{BenchOptions, BenchResult, DecodeAt, DecodeBatch, Spread};
use bitnet_burn_engine::device_bench;
use bitnet_burn_engine::device_bench::{DeviceBench, DeviceBenchOptions};
use bitnet_burn_engine::report::{Execution, ModelSummary};
use bitnet_burn_engine::synth;
use bitnet_burn_engine::synth::{SynthOptions, SynthScales};
use bitnet_burn_engine::text::{count, human_bytes, human_seconds};
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::files::UnfinishedDirectory;
use bitnet_burn_manager::cpu;
use burn::tensor::Device;
use clap::Args;
use serde::Serialize;

use crate::args::{EngineArgs, Model, ReceiptArgs, positive};
use crate::engine::{device_error, remember};
use crate::output::{self, columns};
use crate::status::discard_when_interrupted;
use bitnet_burn_engine::device::DeviceSpec;

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
    /// Number of repetitions [default: 5; 1 with --quick]
    #[arg(long, short, value_name = "N", value_parser = positive)]
    repetitions: Option<usize>,
    /// Also measure decode at these context lengths, once each
    #[arg(long, value_name = "N,N,...", value_delimiter = ',')]
    contexts: Vec<usize>,
    /// Also measure decode of these numbers of sequences at once, once each; every sequence has its own prompt
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', value_parser = positive)]
    batches: Vec<usize>,
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
Examples:
  bitnet bench -m model.gguf -p 128 -n 64 --threads 1 --repetitions 5
  bitnet bench -m model.gguf -p 512 -n 0                        # only prefill
  bitnet bench -m model.gguf --contexts 128,512,2048 --json | jq .decode_by_context
  bitnet bench -m model.gguf --batches 1,2,4,8,16               # sequences at once
  bitnet bench --gpu-suite --device cuda --json > gpu.json      # everything about a GPU";

#[derive(Serialize)]
struct Output<'a> {
    model: &'a ModelSummary,
    config: &'a ModelConfig,
    load_seconds: f64,
    #[serde(flatten)]
    result: &'a BenchResult,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_suite: Option<&'a DeviceBench>,
    #[serde(flatten)]
    execution: &'a Execution,
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

pub fn run(mut args: BenchArgs) -> anyhow::Result<()> {
    if cfg!(debug_assertions) {
        output::warning("this program was built without optimisation: add --release to the cargo command");
    }
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
    let batches = if args.batches.is_empty() { batches.to_vec() } else { args.batches.clone() };
    let engine = args.engine.open(|options| {
        let options = options.without_tokenizer();
        if let Some(chunk) = args.chunk { options.rows(chunk) } else { options }
    })?;
    let mut options = BenchOptions {
        prompt_tokens: prompt,
        generated_tokens: generate,
        repetitions: args.repetitions.unwrap_or(repetitions),
        contexts: args.contexts.clone(),
        batches,
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
    let bar = output::bar(0, "measuring [{bar:30}] {pos}/{len}");
    let result = bench::run(engine.model(), &options, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    // Before the suite, so that the report covers the model alone.
    let mut execution = engine.execution();
    let suite = gpu.map(|gpu| {
        let options = if args.quick { DeviceBenchOptions::quick() } else { DeviceBenchOptions::default() };
        let bar = output::bar(0, "measuring the GPU [{bar:30}] {pos}/{len}");
        let mut suite = device_bench::run(&gpu, engine.checkpoint().config(), &options, &mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        suite.decode_fraction_of_bandwidth =
            (result.decode_tokens_per_s.filter(|_| !engine.model().is_host()))
                .map(|rate| rate.median * result.bytes_per_token as f64 / (suite.read_gb_per_s * 1e9));
        anyhow::Ok(suite)
    });
    let suite = suite.transpose()?;
    drop(random);
    execution.memory = engine.memory(result.kv_cache_bytes, options.chunk.min(prompt.max(1)));
    let median = |spread: Option<Spread>| spread.map(|spread| spread.median);
    let at = prompt + generate / 2;
    let (rate, prompt_rate) = (median(result.decode_tokens_per_s), median(result.prefill_tokens_per_s));
    execution.prediction = engine.outcome(at, rate, prompt_rate);
    remember(&engine, &execution, at, rate, prompt_rate);
    let decodes = result.decode_by_context.iter().map(|at| at.decode_tokens_per_s);
    let decode = decodes.chain(result.decode_tokens_per_s.map(|spread| spread.max)).reduce(f64::max);
    engine.check_figures(&execution, result.prefill_tokens_per_s.map(|spread| spread.max), decode)?;
    let output = Output {
        model: engine.summary(),
        config: engine.checkpoint().config(),
        load_seconds: engine.load_time().as_secs_f64(),
        result: &result,
        gpu_suite: suite.as_ref(),
        execution: &execution,
    };
    args.receipt.write(&engine, "bench", &output, || None)?;
    let wrong = suite.as_ref().map_or(0, |suite| suite.matmuls.len() - suite.kernels_right);
    if args.json {
        output::print_json(&output)?;
        return all_right(wrong);
    }
    let mut text = text(engine.summary(), engine.load_time().as_secs_f64(), &result, &execution);
    if let Some(suite) = &suite {
        text.push_str(&format!("\n{suite}"));
    }
    output::print(text.trim_end())?;
    all_right(wrong)
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

fn text(model: &ModelSummary, load_seconds: f64, result: &BenchResult, execution: &Execution) -> String {
    let mut rows = vec![vec!["".into(), "median".into(), "min".into(), "max".into(), "".into()]];
    let mut spread = |label: String, spread: Option<Spread>, unit: &str| {
        if let Some(Spread { median, min, max }) = spread {
            let digits = |value: f64| format!("{value:.2}");
            rows.push(vec![label, digits(median), digits(min), digits(max), unit.into()]);
        }
    };
    let BenchResult { prompt_tokens: p, generated_tokens: n, .. } = result;
    spread(format!("prefill {p}"), result.prefill_tokens_per_s, "tokens/s");
    spread(format!("decode {n}"), result.decode_tokens_per_s, "tokens/s");
    spread("memory read".into(), Some(result.read_bandwidth_gb_per_s), "GB/s");
    let mut text = columns(&rows);
    for DecodeAt { context, decode_tokens_per_s, .. } in &result.decode_by_context {
        text.push_str(&format!("decode {n} at a context of {context}: {decode_tokens_per_s:.2} tokens/s\n"));
    }
    for DecodeBatch { sequences, decode_tokens_per_s, .. } in &result.decode_by_batch {
        text.push_str(&format!(
            "decode {n} for {} at once: {decode_tokens_per_s:.2} tokens/s in all\n",
            count(*sequences as u64, "sequence")
        ));
    }
    text.push('\n');
    let row = |label: &str, value: String| vec![label.to_owned(), value];
    let parts = &result.bytes_per_token_parts;
    let name = model.name.as_ref().map(|name| format!(", {name}")).unwrap_or_default();
    let mut rows = vec![
        row("model", format!("{} ({}{name})", model.path.display(), model.architecture)),
        row("repetitions", result.repetitions.to_string()),
        row(
            "bytes/token",
            format!(
                "{} (projections {}, head {}, norms {})",
                human_bytes(result.bytes_per_token),
                human_bytes(parts.projections),
                human_bytes(parts.head),
                human_bytes(parts.norms)
            ),
        ),
    ];
    if let Some(fraction) = result.decode_fraction_of_bandwidth {
        let cached = cpu::last_level_cache().is_some_and(|cache| result.bytes_per_token < cache as u64);
        let cached = if cached { " (but the weights fit into the cache)" } else { "" };
        rows.push(row(
            "decode",
            format!("{:.0} % of the limit that the bandwidth sets{cached}", fraction * 100.0),
        ));
    }
    rows.push(row("load", human_seconds(load_seconds)));
    rows.push(row("KV cache", human_bytes(result.kv_cache_bytes as u64)));
    if let Some(bytes) = result.peak_rss_bytes {
        rows.push(row("peak memory", human_bytes(bytes)));
    }
    text.push_str(&columns(&rows));
    text.push_str(&execution.to_string());
    text
}
