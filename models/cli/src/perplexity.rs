//! `bitnet perplexity`: measures how well a model predicts a text.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use bitnet_burn_engine::compare::negative_log_likelihood;
use bitnet_burn_engine::generate::logits;
use bitnet_burn_engine::report::{Execution, ModelSummary};
use bitnet_burn_engine::text::human_seconds;
use bitnet_burn_train::{Corpus, DataOptions, Documents};
use clap::Args;
use serde::Serialize;

use crate::args::{EngineArgs, ReceiptArgs, positive, read_text, read_tokens};
use crate::output;

/// Measure how well a model predicts a text (perplexity: exp of the mean negative log-likelihood of its tokens)
///
/// The text is tokenised as a whole, with BOS in front if the model expects it, and cut into windows of --context
/// tokens that begin --stride tokens apart. The first token of a window is not predicted. Each token counts once, in
/// the first window that predicts it.
///
/// With --documents, every document is tokenised on its own, between BOS and EOS, and cut into windows that predict
/// --context tokens each. `bitnet train` measures its validation set in the same way.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, group = clap::ArgGroup::new("input").required(true))]
pub struct PerplexityArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    receipt: ReceiptArgs,
    /// The text file; - reads stdin
    #[arg(long, short, value_name = "FILE", group = "input")]
    file: Option<PathBuf>,
    /// A file with token ids instead of text, separated by commas or white space
    #[arg(long, value_name = "FILE", group = "input")]
    tokens_file: Option<PathBuf>,
    /// A file of documents: JSON Lines with the key `text` (.jsonl), or another file with one document per line
    #[arg(long, value_name = "FILE", group = "input", conflicts_with_all = ["stride", "max_tokens"])]
    documents: Option<PathBuf>,
    /// Tokens from the start of a window to the start of the next [default: the context, so windows don't overlap]
    #[arg(long, value_name = "N", value_parser = positive)]
    stride: Option<usize>,
    /// Use at most this many tokens of the text
    #[arg(long, value_name = "N", value_parser = positive)]
    max_tokens: Option<usize>,
    /// Rows that are computed at once
    #[arg(long, value_name = "N", value_parser = positive, default_value_t = 64)]
    chunk: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
The context is 512 tokens unless --context changes it.

Examples:
  bitnet perplexity -m model.gguf -f wiki.test.raw
  bitnet perplexity -m model.gguf -f wiki.test.raw --context 2048 --stride 1024 --json
  bitnet perplexity -m model.gguf --documents run/validation.jsonl --context 256";

const DEFAULT_CONTEXT: usize = 512;

#[derive(Serialize)]
struct Output {
    model: ModelSummary,
    perplexity: f64,
    /// Computed from the variance of the tokens' likelihoods, as if tokens were independent.
    perplexity_standard_error: f64,
    mean_negative_log_likelihood: f64,
    tokens: usize,
    tokens_scored: usize,
    windows: usize,
    context: usize,
    stride: usize,
    seconds: f64,
    tokens_per_s: f64,
    #[serde(flatten)]
    execution: Execution,
}

pub fn run(args: PerplexityArgs) -> anyhow::Result<()> {
    let text = args.file.as_deref().map(read_text).transpose()?;
    let documents = match &args.documents {
        Some(path) => {
            let mut options = DataOptions::default();
            options.documents = Documents::Line;
            Some(Corpus::read(std::slice::from_ref(path), &options)?)
        }
        None => None,
    };
    let wants_tokenizer = text.is_some() || documents.is_some();
    let engine = args.engine.open(|mut options| {
        if !wants_tokenizer {
            options = options.without_tokenizer();
        }
        options.rows(args.chunk).measured_context(DEFAULT_CONTEXT)
    })?;
    let vocabulary = engine.checkpoint().config().vocab_size;
    let context = engine.settings().context;
    let stride = args.stride.unwrap_or(context);
    if context < 2 || stride > context {
        bail!(
            "--context {context} --stride {stride}: the context must be at least 2, and the stride at most the context"
        );
    }
    // The tokens to predict, and the width of their windows.
    let (pieces, width) = match (&text, &documents, engine.tokenizer(), &args.tokens_file) {
        (Some(text), _, Some(tokenizer), _) => (vec![tokenizer.encode(text, true)?], context),
        (_, Some(documents), Some(tokenizer), _) => {
            let encode = |text: &String| -> anyhow::Result<Vec<u32>> {
                let mut tokens = tokenizer.encode(text, true)?;
                tokens.extend(tokenizer.eos());
                Ok(tokens)
            };
            // The last token of a window is predicted and is not an input.
            (documents.documents().iter().map(encode).collect::<Result<_, _>>()?, context + 1)
        }
        (_, _, _, Some(path)) => (vec![read_tokens(path, vocabulary)?], context),
        _ => bail!("--file, --documents or --tokens-file is needed"),
    };
    let mut pieces = pieces;
    pieces.iter_mut().for_each(|tokens| tokens.truncate(args.max_tokens.unwrap_or(usize::MAX)));
    let count: usize = pieces.iter().map(Vec::len).sum();
    if pieces.iter().all(|tokens| tokens.len() < 2) {
        bail!(
            "the text has {count} token(s): at least 2 are needed, because each is predicted from those before it"
        );
    }

    let mut cache = engine.model().cache(context, engine.settings().kv_cache)?;
    let longest = pieces.iter().map(Vec::len).max().unwrap_or(0);
    let sequence = cache.add_sequence(context.min(longest));
    let windows: Vec<(&[u32], Window)> = pieces
        .iter()
        .flat_map(|tokens| windows(tokens.len(), width, stride).into_iter().map(|w| (tokens.as_slice(), w)))
        .collect();
    let bar = output::bar(count as u64, "perplexity {msg} [{bar:30}] {pos}/{len} tokens, {eta} left");
    let started = Instant::now();
    let mut sum = Sum::default();
    let mut computed = 0;
    for (tokens, window) in &windows {
        cache.truncate(sequence, 0)?;
        let mut problem = None;
        // The prediction after the last token is not used.
        let input = &tokens[window.start..window.end - 1];
        logits(engine.model(), input, sequence, &mut cache, args.chunk, &mut |position, rows| {
            for (i, row) in rows.chunks_exact(vocabulary).enumerate() {
                let target = window.start + position + i + 1;
                if target >= window.first_scored {
                    match negative_log_likelihood(row, tokens[target] as usize) {
                        Some(nll) => sum.add(nll),
                        None => problem = Some(target),
                    }
                }
            }
        })?;
        if let Some(target) = problem {
            bail!("the logits after token {} are not finite: the model's output is not usable", target - 1);
        }
        computed += input.len();
        bar.set_position(computed as u64);
        bar.set_message(format!("{:.3}", sum.mean().exp()));
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();

    let perplexity = sum.mean().exp();
    let output = Output {
        model: engine.summary().clone(),
        perplexity,
        perplexity_standard_error: perplexity * sum.standard_error(),
        mean_negative_log_likelihood: sum.mean(),
        tokens: count,
        tokens_scored: sum.count,
        windows: windows.len(),
        context,
        stride,
        seconds,
        tokens_per_s: computed as f64 / seconds,
        execution: engine.execution(),
    };
    args.receipt.write(&engine, "perplexity", &output, || None)?;
    if args.json {
        return output::print_json(&output);
    }
    let error = output.perplexity_standard_error;
    output::print(format_args!("perplexity {perplexity:.4} +/- {error:.4}"))?;
    output::note(format_args!(
        "{} of {} tokens scored in {} windows of up to {context}, {stride} apart; {}, {:.1} tokens/s",
        sum.count,
        count,
        windows.len(),
        human_seconds(seconds),
        output.tokens_per_s
    ));
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Window {
    start: usize,
    end: usize,
    /// The first token that no window before this one has predicted.
    first_scored: usize,
}

fn windows(tokens: usize, context: usize, stride: usize) -> Vec<Window> {
    let mut windows = Vec::new();
    let (mut start, mut first_scored) = (0, 1);
    loop {
        let end = (start + context).min(tokens);
        // A window of one token predicts nothing.
        if end - start > 1 {
            windows.push(Window { start, end, first_scored: first_scored.max(start + 1) });
        }
        if end == tokens {
            return windows;
        }
        first_scored = end;
        start += stride;
    }
}

#[derive(Default)]
struct Sum {
    count: usize,
    sum: f64,
    squares: f64,
}

impl Sum {
    fn add(&mut self, value: f64) {
        self.count += 1;
        self.sum += value;
        self.squares += value * value;
    }

    fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }

    fn standard_error(&self) -> f64 {
        let n = self.count as f64;
        ((self.squares / n - self.mean().powi(2)).max(0.0) / (n - 1.0).max(1.0)).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_windows_first_ones_is_scored_once() {
        for (tokens, context, stride) in
            [(10, 4, 4), (10, 4, 2), (10, 4, 1), (3, 512, 512), (9, 4, 4), (2, 2, 1)]
        {
            let mut scored = vec![0; tokens];
            for window in windows(tokens, context, stride) {
                assert!(window.end - window.start <= context);
                (window.first_scored..window.end).for_each(|t| scored[t] += 1);
            }
            for (token, &times) in scored.iter().enumerate() {
                let first_of_its_window = token == 0 || stride == context && token % context == 0;
                assert_eq!(times, usize::from(!first_of_its_window), "{tokens} {context} {stride}: {token}");
            }
        }
    }
}
