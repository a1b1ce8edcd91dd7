//! `bitnet logits`: writes logits to a file, to compare them with other programs.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use bitnet_burn_engine::generate::logits;
use bitnet_burn_engine::report::{Execution, ModelSummary};
use bitnet_burn_engine::text::human_bytes;
use clap::Args;
use serde::Serialize;

use crate::args::{EngineArgs, ReceiptArgs, positive, read_tokens};
use crate::output;
use crate::status::discard_when_interrupted;

/// Write the logits of every position of a token sequence to a NumPy file
///
/// The file holds f32 [tokens, vocabulary] in NumPy format 1.0, little-endian. Row i has the logits after token i.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct LogitsArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    receipt: ReceiptArgs,
    /// A file with the token ids, separated by commas or white space
    #[arg(long, value_name = "FILE")]
    tokens_file: PathBuf,
    /// The file to write
    #[arg(long, short, value_name = "FILE.npy")]
    out: PathBuf,
    /// Rows that are computed at once
    #[arg(long, value_name = "N", value_parser = positive, default_value_t = 64)]
    chunk: usize,
    /// Print a report as one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  bitnet logits -m model.gguf --tokens-file ids.txt --out logits.npy
  python3 -c 'import numpy; print(numpy.load(\"logits.npy\").argmax(1))'";

#[derive(Serialize)]
struct Output {
    model: ModelSummary,
    out: PathBuf,
    shape: [usize; 2],
    #[serde(flatten)]
    execution: Execution,
}

pub fn run(args: LogitsArgs) -> anyhow::Result<()> {
    let engine = args
        .engine
        .open(|options| options.without_tokenizer().rows(args.chunk).measured_context(usize::MAX))?;
    let vocabulary = engine.checkpoint().config().vocab_size;
    let tokens = read_tokens(&args.tokens_file, vocabulary)?;
    let context = engine.settings().context;
    if tokens.len() > context {
        bail!(
            "{}: {} tokens do not fit into the context of {context}",
            args.tokens_file.display(),
            tokens.len()
        );
    }
    let mut cache = engine.model().cache(context, engine.settings().kv_cache)?;
    let sequence = cache.add_sequence(tokens.len());
    let shape = [tokens.len(), vocabulary];
    let bar = output::bar(tokens.len() as u64, "computing logits [{bar:30}] {pos}/{len}");
    discard_when_interrupted()?;
    output::write_file(&args.out, |out| {
        out.write_all(&npy_header(shape))?;
        let mut written = Ok(());
        logits(engine.model(), &tokens, sequence, &mut cache, args.chunk, &mut |_, rows| {
            if written.is_ok() {
                written = rows.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()));
                bar.inc((rows.len() / vocabulary) as u64);
            }
        })?;
        written.with_context(|| format!("cannot write {}", args.out.display()))
    })?;
    bar.finish_and_clear();
    let output =
        Output { model: engine.summary().clone(), out: args.out, shape, execution: engine.execution() };
    args.receipt.write(&engine, "logits", &output, || None)?;
    if args.json {
        return output::print_json(&output);
    }
    let size = human_bytes((shape[0] * shape[1] * 4) as u64);
    output::note(format_args!("{}: f32 [{}, {vocabulary}], {size}", output.out.display(), shape[0]));
    Ok(())
}

/// NumPy's format, version 1.0: magic, length, a Python dictionary padded so that the data is 64-byte
/// aligned.
pub fn npy_header([rows, columns]: [usize; 2]) -> Vec<u8> {
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    let before = 10;
    while !(before + text.len() + 1).is_multiple_of(64) {
        text.push(' ');
    }
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((text.len() as u16).to_le_bytes());
    header.extend(text.as_bytes());
    header
}

#[cfg(test)]
mod tests {
    #[test]
    fn headers_are_aligned_and_as_long_as_they_say() {
        for shape in [[1, 2], [12345, 128_256], [usize::MAX, usize::MAX]] {
            let header = super::npy_header(shape);
            assert!(header.len().is_multiple_of(64));
            assert_eq!(header.len() - 10, usize::from(u16::from_le_bytes([header[8], header[9]])));
            assert_eq!(header.last(), Some(&b'\n'));
        }
    }
}
