//! `bitnet receipt`: checks receipts.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use bitnet_burn::backends::manager::with_built_in_kernels;
use bitnet_burn_engine::adapter::Adapter;
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::generate::{GenerateOptions, Step};
use bitnet_burn_engine::receipt::{
    Check, CheckOutcome, GenerationRecord, ModelRecord, Receipt, Sealed, TokensRecord,
};
use bitnet_burn_engine::text::count;
use bitnet_burn_manager::ManagerConfig;
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::args::{EngineArgs, FileArgs, GapArgs, KernelArgs, LoadArgs, Model, SecretArgs};
use crate::output::{self, columns};
use crate::status::Status;
use bitnet_burn_engine::device::DeviceSpec;

/// Check a receipt that `run`, `bench`, `perplexity`, `logits` or `embed` wrote with --receipt
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ReceiptArgs {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  bitnet run -m model.gguf -p Hello --receipt hello.json
  bitnet receipt check hello.json
  bitnet receipt check hello.json --rerun --threads 1
  bitnet receipt check hello.json --model elsewhere/model.gguf --plugin ./libmy_kernels.so --json";

#[derive(Debug, Subcommand)]
enum Command {
    Check(CheckArgs),
}

/// Compare a receipt with the files at hand
///
/// This checks the seal, the SHA-256 of the model's files and of the plugins that computed, and whether this build has
/// the built-in kernels that computed. --rerun also generates the tokens of a `run` again. They are the same on every
/// CPU, with all kernels and numbers of threads.
///
/// Exit status: 0 everything agrees, 1 something could not be checked, 3 something differs.
#[derive(Debug, Args)]
struct CheckArgs {
    /// The receipt file
    file: PathBuf,
    /// The model at hand: a GGUF file, a Hugging Face directory, or hf:OWNER/NAME of the Hugging Face Hub [default: the
    /// model that the receipt names]
    #[arg(long, short, value_name = "PATH", value_parser = Model::parser())]
    model: Option<Model>,
    /// The adapter at hand [default: the one that the receipt names]
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Generate the tokens again and compare them (only for receipts of `run`)
    #[arg(long)]
    rerun: bool,
    #[command(flatten)]
    kernels: KernelArgs,
    #[command(flatten)]
    secret: SecretArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: ReceiptArgs) -> anyhow::Result<ExitCode> {
    let Command::Check(args) = args.command;
    check(args)
}

#[derive(Serialize)]
struct Output<'a> {
    /// Whether everything agrees.
    passed: bool,
    checks: &'a [Check],
    receipt: &'a Receipt,
}

fn check(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let sealed = Receipt::read(&args.file)?;
    let receipt = &sealed.receipt;
    if args.rerun && receipt.generation.is_none() {
        bail!(
            "--rerun: {} is a receipt of `{}`, which generated no tokens",
            args.file.display(),
            receipt.program.command
        );
    }
    let mut checks = vec![sealed.check()];
    let file = file(&args, &sealed);
    let recorded = receipt.model.adapter.as_ref();
    let adapter = recorded.map(|recorded| args.adapter.clone().unwrap_or_else(|| recorded.path.clone()));
    let of_model = model(receipt, &file, adapter.as_deref());
    let same_model = of_model.iter().all(|check| check.outcome == CheckOutcome::Agrees);
    checks.extend(of_model);
    let (plugins, _) = ManagerConfig::default().plugins.find(&args.kernels.plugins);
    checks.extend(receipt.check_plugins(&plugins));
    let built_in = with_built_in_kernels(ManagerConfig { threads: 1, ..ManagerConfig::default() })?;
    checks.extend(receipt.check_kernels(&built_in.report().kernels));
    drop(built_in);
    if let (true, Some(record)) = (args.rerun, &receipt.generation) {
        checks.push(match same_model {
            true => record.result.check(&rerun(receipt, record, (file, adapter), args.kernels, args.secret)?),
            false => {
                Check::unchecked("tokens", "not generated again, because the model differs or is missing")
            }
        });
    }

    let worst = checks.iter().map(|check| check.outcome).max().unwrap_or(CheckOutcome::Agrees);
    if args.json {
        output::print_json(&Output { passed: worst == CheckOutcome::Agrees, checks: &checks, receipt })?;
    } else {
        output::print(text(&args.file, receipt, &checks).trim_end())?;
    }
    Ok(match worst {
        CheckOutcome::Agrees => Status::Done,
        CheckOutcome::Unchecked => Status::Error,
        CheckOutcome::Differs => Status::Mismatch,
    }
    .into())
}

/// The files of the model at hand.
fn file(args: &CheckArgs, sealed: &Sealed) -> FileArgs {
    let Receipt { model, generation, .. } = &sealed.receipt;
    let generation = generation.as_ref();
    FileArgs {
        model: args
            .model
            .clone()
            .or_else(|| (!is_built_in(&model.path)).then(|| Model::Path(model.path.clone()))),
        gaps: GapArgs {
            hidden_act: generation.and_then(|g| g.hidden_act),
            pre: generation.and_then(|g| g.pre.clone()),
        },
    }
}

fn is_built_in(path: &Path) -> bool {
    #[cfg(feature = "default-model")]
    return path == Path::new(bitnet_burn_engine::embedded::NAME);
    #[cfg(not(feature = "default-model"))]
    return false;
}

fn model(receipt: &Receipt, file: &FileArgs, adapter: Option<&Path>) -> Vec<Check> {
    let record = |checkpoint: Checkpoint| {
        let adapter = adapter.map(|path| Adapter::open(path, checkpoint.config())).transpose()?;
        Ok(ModelRecord::of(&checkpoint)?.with_adapter(adapter.as_ref())?)
    };
    let shown = match &file.model {
        Some(model) => model.to_string(),
        None => receipt.model.path.display().to_string(),
    };
    match file.open().and_then(record) {
        Ok(at_hand) => receipt.check_model(&at_hand),
        Err(error) => {
            let hint = match adapter {
                None => "--model names the model at hand",
                Some(_) => "--model and --adapter name what is at hand",
            };
            let why = format!("{}; {hint}", output::in_one_line(error));
            vec![Check::unchecked(format!("model {shown}"), why)]
        }
    }
}

/// Generates the tokens again, with the receipt's settings.
fn rerun(
    receipt: &Receipt,
    record: &GenerationRecord,
    (file, adapter): (FileArgs, Option<PathBuf>),
    kernels: KernelArgs,
    secret: SecretArgs,
) -> anyhow::Result<TokensRecord> {
    let device = match receipt.report.device.parse::<DeviceSpec>() {
        Ok(device) => device,
        Err(_) => {
            bail!("the receipt's device is {:?}, which this program does not have", receipt.report.device)
        }
    };
    let load = LoadArgs {
        kernels,
        device: Some(device),
        gpu_layers: None,
        context: Some(record.context),
        kv_cache: Some(record.kv_cache.into()),
        lm_head: record.lm_head.try_into()?,
        activations: record.activations,
        // Use only the files whose hashes the receipt has.
        no_prepacked: true,
        adapter,
        secret,
    };
    let args = EngineArgs { file, load };
    let (prompt, context) = (&record.prompt_token_ids, record.context);
    if prompt.len() > context && !record.sliding_window {
        bail!("the receipt's prompt of {} tokens does not fit into its context of {context}", prompt.len());
    }
    let by_text = !record.stop_strings.is_empty();
    // A chunk never has more rows than the prompt.
    let chunk = record.chunk.clamp(1, prompt.len().max(1));
    let engine = args.open(|options| {
        let options = options.rows(chunk);
        if by_text || record.constraint.is_some() { options } else { options.without_tokenizer() }
    })?;
    let options = GenerateOptions {
        max_new_tokens: record.max_new_tokens,
        chunk,
        sampling: record.sampling.clone(),
        stop_tokens: record.stop_tokens.clone(),
        stop_strings: record.stop_strings.clone(),
        constraint: record.constraint.clone(),
    };
    let mut session = engine.session()?;
    if record.sliding_window {
        session = session.sliding();
    }
    let generation = if by_text {
        let mut text = session.generate_text(prompt, &options)?;
        for piece in text.by_ref() {
            piece?;
        }
        text.finish().generation
    } else {
        let mut tokens = session.generate_tokens(prompt, &options)?;
        while !matches!(tokens.step()?, Step::Finished(_)) {}
        tokens.into_generation()
    };
    Ok(TokensRecord::of(&generation))
}

fn text(file: &Path, receipt: &Receipt, checks: &[Check]) -> String {
    let Receipt { program, machine, report, .. } = receipt;
    let mut text = format!(
        "{}: `{}` by bitnet {} on {} ({}), {}, {}\n",
        file.display(),
        program.command,
        program.version,
        machine.cpu,
        machine.os,
        report.device,
        count(report.threads as u64, "thread"),
    );
    let mut rows = Vec::new();
    for Check { what, outcome, expected, found } in checks {
        let outcome = match outcome {
            CheckOutcome::Agrees => "agrees",
            CheckOutcome::Unchecked => "unchecked",
            CheckOutcome::Differs => "DIFFERS",
        };
        let found = found.clone().unwrap_or_default();
        match expected {
            None => rows.push(vec![format!("  {outcome}"), what.clone(), found]),
            Some(expected) => {
                rows.push(vec![format!("  {outcome}"), what.clone(), format!("expected: {expected}")]);
                rows.push(vec![String::new(), String::new(), format!("found:    {found}")]);
            }
        }
    }
    // Receipts come from others: control characters must not reach the terminal.
    text.push_str(&columns(&rows));
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}
