//! `bitnet run`: a prompt in, tokens out.

use std::io;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};
use bitnet_burn_engine::Engine;
use bitnet_burn_engine::chat::{ChatTemplate, Message};
use bitnet_burn_engine::generate::{GenerateOptions, Step};
use bitnet_burn_engine::report::RunReport;
use clap::error::ErrorKind;
use clap::{ArgGroup, Args, CommandFactory as _};
use serde::Serialize;

use crate::args::{DraftArgs, EngineArgs, ReceiptArgs, positive, read_template, read_tokens};
use crate::constraint::ConstraintArgs;
use crate::output;
use crate::sampling::SamplingArgs;

/// Generate text behind a prompt
///
/// The text goes to stdout as it comes, a report of what was measured to stderr.
///
/// Without --model, the built-in model tells a small story: another one each time, unless --seed or --greedy
/// says otherwise. (Its sampling, where no flag changes it: --temperature 0.7 --top-p 0.95, up to 256 tokens.)
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("input"), after_help = EXAMPLES)]
pub struct RunArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    draft: DraftArgs,
    #[command(flatten)]
    receipt: ReceiptArgs,
    /// Take the memory of the KV cache for the whole --context at the start, so that nothing grows later
    #[arg(long, help_heading = "Model")]
    preallocate: bool,
    /// When the context is full, forget its oldest eighth and go on, instead of ending
    #[arg(long, help_heading = "Model")]
    sliding_window: bool,
    /// The prompt
    #[arg(long, short, value_name = "TEXT", group = "input")]
    prompt: Option<String>,
    /// A file with the prompt's token ids, separated by commas or white space; nothing is added to them
    #[arg(long, value_name = "FILE", group = "input")]
    tokens_file: Option<PathBuf>,
    /// Render the model's chat template with the prompt as the user's message
    #[arg(long, requires = "prompt", help_heading = "Chat")]
    chat: bool,
    /// The system's message of the chat template
    #[arg(long, value_name = "TEXT", requires = "prompt", help_heading = "Chat")]
    system: Option<String>,
    /// A chat template (Jinja) in place of the model's
    #[arg(long, value_name = "FILE", requires = "prompt", help_heading = "Chat")]
    chat_template: Option<PathBuf>,
    /// Tokens to generate at most [default: 128]
    #[arg(long, short = 'n', value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Don't stop where the model ends its text
    #[arg(long)]
    ignore_eos: bool,
    /// Stop before this text; may be repeated
    #[arg(long, value_name = "TEXT", conflicts_with = "print_ids")]
    stop: Vec<String>,
    /// Rows of the prompt that are computed at once [default: 256; with --device auto, as planned]
    #[arg(long, value_name = "N", value_parser = positive)]
    chunk: Option<usize>,
    /// Print the ids of the generated tokens, separated by spaces, instead of their text
    #[arg(long, conflicts_with = "json")]
    print_ids: bool,
    /// Print one JSON object with text, ids and report, at the end
    #[arg(long)]
    json: bool,
    /// Write the report as JSON to a file, too
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// No report on stderr
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    constraint: ConstraintArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

const EXAMPLES: &str = "\
Examples:
  bitnet run
  bitnet run -p 'Once there was a fox named Mo'
  bitnet run -m model.gguf -p 'The capital of France is' -n 32
  bitnet run -m model.gguf --chat -p 'Why is the sky blue?' --temperature 0.7 --top-p 0.9
  bitnet run -m model.gguf --tokens-file prompt.txt --greedy --print-ids
  bitnet run -m model.gguf --chat -p 'Is the sky blue?' --choice Yes --choice No
  bitnet run -m model.gguf --chat -p 'Name a city in Italy' --json-schema city.json
  bitnet run -m large.gguf --draft-model small.gguf -p 'The capital of France is'
  bitnet run -m model.gguf -p Hello --json | jq .decode_tokens_per_s
  bitnet run -m model.gguf -p Hello --receipt hello.json && bitnet receipt check hello.json --rerun";

#[derive(Serialize)]
struct Output<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    prompt_token_ids: &'a [u32],
    token_ids: &'a [u32],
    #[serde(flatten)]
    report: &'a RunReport,
}

pub fn run(args: RunArgs) -> anyhow::Result<()> {
    let built_in = args.engine.file.model.is_none();
    if !built_in && args.prompt.is_none() && args.tokens_file.is_none() {
        let message = "--prompt or --tokens-file is missing: what the text begins with";
        crate::Cli::command().error(ErrorKind::MissingRequiredArgument, message).exit();
    }
    let sampling = args.sampling.config(built_in)?;
    let max_new_tokens = args.max_new_tokens.unwrap_or(if built_in { 256 } else { 128 });
    if args.stop.iter().any(String::is_empty) {
        bail!("--stop '': an empty text would stop everything at once");
    }
    let template = args.chat_template.as_deref().map(read_template).transpose()?;
    let constraint = args.constraint.constraint()?;
    let draft = args.draft.open(&args.engine.load, &args.engine.file.gaps)?;
    let by_ids = args.tokens_file.is_some() && args.print_ids && constraint.is_none() && draft.is_none();
    let engine = args.engine.open(|options| {
        let mut options = options.packed_in_background().draft_model(draft);
        if by_ids {
            options = options.without_tokenizer();
        }
        if let Some(chunk) = args.chunk { options.rows(chunk) } else { options }
    })?;
    let context = engine.settings().context;
    let clock = Instant::now();
    let prompt = prompt(&args, &engine, template)?;
    let tokenisation = args.tokens_file.is_none().then(|| clock.elapsed());
    if prompt.len() > context && !args.sliding_window {
        bail!(
            "the prompt has {} tokens, the context {context}: shorten the prompt{}",
            prompt.len(),
            if args.engine.load.context.is_some() { ", or raise --context" } else { "" }
        );
    }
    let options = GenerateOptions {
        max_new_tokens,
        sampling,
        stop_tokens: if args.ignore_eos { Vec::new() } else { engine.end_tokens() },
        stop_strings: args.stop.clone(),
        constraint,
        ..engine.generate_options()
    };
    let mut session = args.draft.session(&engine)?;
    if args.preallocate {
        session = session.preallocated().context("--preallocate")?;
    }
    if args.sliding_window {
        session = session.sliding();
    }

    let request = Instant::now();
    let mut text = String::new();
    // On a pipe that is closed, the generation ends, and what was generated is reported.
    let mut unwritten = None;
    let mut write = |piece: &str| {
        unwritten = output::write_generated(piece).err();
        unwritten.is_none()
    };
    let generation = if engine.tokenizer().is_some() && !args.print_ids {
        let mut pieces = session.generate_text(&prompt, &options)?;
        let result = loop {
            match pieces.next() {
                None => break Ok(()),
                Some(Err(error)) => break Err(error),
                Some(Ok(piece)) if args.json => text.push_str(&piece),
                Some(Ok(piece)) => {
                    if !write(&piece) {
                        break Ok(());
                    }
                }
            }
        };
        result.map(|()| pieces.finish().generation)
    } else {
        let mut tokens = session.generate_tokens(&prompt, &options)?;
        let mut separator = "";
        let result = loop {
            match tokens.step() {
                Err(error) => break Err(error.into()),
                Ok(Step::Prompt { .. }) => {}
                Ok(Step::Finished(_)) => break Ok(()),
                Ok(Step::Token(token)) => {
                    if !args.json && !write(&format!("{separator}{token}")) {
                        tokens.cancel();
                    }
                    separator = " ";
                }
            }
        };
        result.map(|()| tokens.into_generation())
    };
    // What was generated before an error stays a line of its own.
    if !args.json && !write("\n") {
        let error = unwritten.unwrap_or_else(|| io::ErrorKind::BrokenPipe.into());
        return Err(error).context("cannot write to stdout");
    }
    let generation = generation?;

    let mut report = RunReport::new(engine.summary().clone(), &generation, engine.execution());
    report.load_seconds = Some(engine.load_time().as_secs_f64());
    report.seed = (options.sampling.temperature > 0.0).then_some(options.sampling.seed);
    report.start_to_first_token_seconds = generation
        .first_token
        .map(|first| (request.saturating_duration_since(crate::started()) + first).as_secs_f64());
    report.tokenisation_seconds = tokenisation.map(|time| time.as_secs_f64());
    report.end_to_end_seconds += report.tokenisation_seconds.unwrap_or_default();
    report.kv_cache_bytes = Some(session.cache_bytes());
    report.execution.memory = engine.memory(session.cache_bytes(), options.chunk.min(prompt.len()));
    // A sliding window looks back over no more than that.
    let at = (prompt.len() + generation.tokens.len() / 2).min(context);
    report.execution.prediction =
        engine.outcome(at, report.decode_tokens_per_s, Some(report.prefill_tokens_per_s));
    engine.check_figures(&report.execution, Some(report.prefill_tokens_per_s), report.decode_tokens_per_s)?;
    if let Some(path) = &args.report {
        output::write_file(path, |out| {
            serde_json::to_writer_pretty(&mut *out, &report)?;
            Ok(writeln!(out)?)
        })?;
    }
    args.receipt.write(&engine, "run", &report, || {
        Some(engine.generation_record(&prompt, &options, args.sliding_window, &generation))
    })?;
    if args.json {
        let text = engine.tokenizer().is_some().then_some(text.as_str());
        let token_ids = &generation.tokens;
        output::print_json(&Output { text, prompt_token_ids: &prompt, token_ids, report: &report })?;
    } else if !args.quiet {
        output::note(format_args!("\n{}", report.to_string().trim_end()));
    }
    Ok(())
}

/// The prompt's tokens.
fn prompt(args: &RunArgs, engine: &Engine, template: Option<ChatTemplate>) -> anyhow::Result<Vec<u32>> {
    if let Some(path) = &args.tokens_file {
        return read_tokens(path, engine.checkpoint().config().vocab_size);
    }
    let Some(tokenizer) = engine.tokenizer() else { bail!("a prompt needs a tokenizer") };
    // Without one: from the beginning of a text.
    let prompt = args.prompt.as_deref().unwrap_or_default();
    if !(args.chat || args.system.is_some() || template.is_some()) {
        return Ok(tokenizer.encode(prompt, true)?);
    }
    let template = template.map_or_else(|| engine.chat_template(), Ok)?;
    let system = args.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<_> = system.chain([Message::new("user", prompt)]).collect();
    let text = template.render(&messages, &tokenizer.template_tokens(), true)?;
    Ok(tokenizer.encode(&text, false)?)
}
