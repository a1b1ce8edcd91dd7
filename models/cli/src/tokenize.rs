//! `bitnet tokenize`: text to token ids, and back.

use std::io::Read as _;

use anyhow::Context as _;
use bitnet_burn_engine::tokenizer::Tokenizer;
use clap::Args;
use serde::Serialize;

use crate::args::{FileArgs, ThreadArgs, parse_tokens};
use crate::output::{columns, print, print_json};

/// Turn text into token ids, or ids into text
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TokenizeArgs {
    #[command(flatten)]
    file: FileArgs,
    #[command(flatten)]
    _threads: ThreadArgs,
    /// The text, or with --decode the ids, separated by commas or white space [default: read from stdin]
    #[arg(value_name = "TEXT", allow_hyphen_values = true)]
    text: Option<String>,
    /// Turn ids into text
    #[arg(long, short)]
    decode: bool,
    /// Don't add the tokens that the model expects around a text (BOS); with --decode, leave out special tokens
    #[arg(long)]
    no_special: bool,
    /// Show each token's id and its text in the vocabulary
    #[arg(long, conflicts_with_all = ["decode", "json"])]
    pieces: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet tokenize -m model.gguf 'Hello, world!'
  bitnet tokenize -m model.gguf --pieces 'Hello, world!'
  bitnet tokenize -m model.gguf --json < text.txt
  bitnet tokenize -m model.gguf --decode '9906 11 1917 0'";

#[derive(Serialize)]
struct Output<'a> {
    text: &'a str,
    ids: &'a [u32],
    tokens: Vec<String>,
}

pub fn run(args: TokenizeArgs) -> anyhow::Result<()> {
    let checkpoint = args.file.open()?;
    let vocabulary = checkpoint.config().vocab_size;
    let tokenizer = Tokenizer::from_source(&checkpoint.tokenizer_source(), vocabulary)?;
    let input = match args.text {
        Some(text) => text,
        None => {
            let mut text = String::new();
            std::io::stdin().lock().read_to_string(&mut text).context("cannot read text from stdin")?;
            text
        }
    };
    let (text, ids) = if args.decode {
        let ids = parse_tokens(&input, vocabulary)?;
        (tokenizer.decode(&ids, args.no_special)?, ids)
    } else {
        let ids = tokenizer.encode(&input, !args.no_special)?;
        (input, ids)
    };
    let tokens = || ids.iter().map(|&id| tokenizer.token(id).unwrap_or_default());
    if args.json {
        print_json(&Output { text: &text, ids: &ids, tokens: tokens().collect() })
    } else if args.decode {
        print(text)
    } else if args.pieces {
        let rows: Vec<_> = ids.iter().zip(tokens()).map(|(id, token)| vec![id.to_string(), token]).collect();
        print(columns(&rows).trim_end_matches('\n'))
    } else {
        print(ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "))
    }
}
