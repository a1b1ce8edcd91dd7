//! `bitnet embed`: a vector for each text.

use std::path::{Path, PathBuf};

use anyhow::bail;
use bitnet_burn_engine::embed::{EmbedOptions, Embedding, Pooling, Prompt};
use bitnet_burn_engine::report::{Execution, ModelSummary};
use bitnet_burn_engine::text::count;
use clap::Args;
use serde::Serialize;

use crate::args::{EngineArgs, ReceiptArgs, positive, read_text};
use crate::logits::npy_header;
use crate::output;

/// Turn texts into vectors (embeddings)
///
/// Prints one line for each text: the values of its vector, separated by spaces. The vector is pooled from the hidden states
/// of the text's tokens behind the last norm and divided by its L2 norm, as the model's files say; where they say nothing, it
/// is the last token's state.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct EmbedArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    receipt: ReceiptArgs,
    /// The texts [default: each line of stdin]; behind -- they may begin with a hyphen
    #[arg(value_name = "TEXT", conflicts_with = "file")]
    texts: Vec<String>,
    /// A file with a text on each line; - for stdin
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// What is pooled: last (the last token's state) or mean (of all tokens) [default: as the model's files say, else last]
    #[arg(long, value_name = "NAME")]
    pooling: Option<Pooling>,
    /// The task, for models that were trained with instructions. Puts `Instruct: TEXT`, a line break and `Query: ` in front
    /// of each text
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_name", help_heading = "Prompt")]
    instruction: Option<String>,
    /// Put this text in front of each text; "" puts nothing there
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["instruction", "prompt_name"], help_heading = "Prompt")]
    prompt: Option<String>,
    /// Put the prompt of this name in front of each text, from the model's config_sentence_transformers.json
    #[arg(long, value_name = "NAME", help_heading = "Prompt")]
    prompt_name: Option<String>,
    /// Leave the vectors as long as they are
    #[arg(long)]
    no_normalise: bool,
    /// Rows (tokens) that are computed at once
    #[arg(long, value_name = "N", value_parser = positive)]
    chunk: Option<usize>,
    /// Write the vectors to a NumPy file, f32 [texts, hidden size], instead of printing them
    #[arg(long, short, value_name = "FILE.npy")]
    out: Option<PathBuf>,
    /// Print one JSON object with the vectors and a report
    #[arg(long, conflicts_with = "out")]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet embed -m model.gguf 'The capital of France' 'Paris'
  bitnet embed -m hf:OWNER/NAME --file documents.txt --out documents.npy
  bitnet embed -m hf:OWNER/NAME --instruction 'Find the document that answers the question' 'Who wrote Faust?'
  bitnet embed -m model.gguf --pooling mean --json < texts.txt";

#[derive(Serialize)]
struct Output<'a> {
    model: ModelSummary,
    pooling: Pooling,
    normalised: bool,
    /// What went in front of each text.
    prompt: &'a str,
    dimensions: usize,
    embeddings: &'a [Embedding],
    #[serde(flatten)]
    execution: Execution,
}

pub fn run(args: EmbedArgs) -> anyhow::Result<()> {
    let texts = match (&args.file, args.texts.is_empty()) {
        (Some(path), _) => lines(path)?,
        (None, true) => lines(Path::new("-"))?,
        (None, false) => args.texts.clone(),
    };
    if texts.is_empty() {
        bail!("there is no text to embed");
    }
    let engine = args.engine.open(|options| match args.chunk {
        Some(rows) => options.rows(rows),
        None => options,
    })?;
    let embedder = engine.embedder(&EmbedOptions {
        pooling: args.pooling,
        normalise: args.no_normalise.then_some(false),
        prompt: args
            .instruction
            .map(Prompt::Instruction)
            .or(args.prompt_name.map(Prompt::Named))
            .or(args.prompt.map(Prompt::Text)),
    })?;
    let embeddings = embedder.embed(&texts)?;
    let dimensions = engine.checkpoint().config().hidden_size;
    let output = Output {
        model: engine.summary().clone(),
        pooling: embedder.pooling(),
        normalised: embedder.normalises(),
        prompt: embedder.prompt(),
        dimensions,
        embeddings: &embeddings,
        execution: engine.execution(),
    };
    args.receipt.write(&engine, "embed", &output, || None)?;
    if args.json {
        return output::print_json(&output);
    }
    let shape = [embeddings.len(), dimensions];
    let values = embeddings.iter().map(|embedding| &embedding.values);
    match &args.out {
        Some(path) => {
            output::write_file(path, |out| {
                out.write_all(&npy_header(shape))?;
                Ok(values.flatten().try_for_each(|value| out.write_all(&value.to_le_bytes()))?)
            })?;
            output::note(format_args!("{}: f32 {shape:?}", path.display()));
        }
        None => {
            for values in values {
                let line: Vec<String> = values.iter().map(f32::to_string).collect();
                output::print(line.join(" "))?;
            }
        }
    }
    let tokens: usize = embeddings.iter().map(|embedding| embedding.tokens).sum();
    output::note(format_args!(
        "{} of {}, {dimensions} values each; pooling {}{}",
        count(shape[0] as u64, "text"),
        count(tokens as u64, "token"),
        output.pooling,
        if output.normalised { ", L2 norm 1" } else { "" }
    ));
    Ok(())
}

/// The lines of a file, or of stdin.
fn lines(path: &Path) -> anyhow::Result<Vec<String>> {
    Ok(read_text(path)?.lines().map(str::to_owned).collect())
}
