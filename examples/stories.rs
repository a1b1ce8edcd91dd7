//! Writes simple stories to learn from, and states how well a model can possibly learn them; or reads text and
//! says which of it are such stories.
//!
//! ```text
//! cargo run --release --example stories -- --seed 1 --stories 60000 --out stories.txt
//! cargo run --release --example stories -- --check stories.txt
//! ```
//!
//! One story a line, or with `--jsonl` one object `{"text": ...}` a line. Stories of different seeds are
//! independent: use another one for validation. The grammar and what its entropy means are described in
//! `examples/src/stories/mod.rs`.

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use bitnet_burn_examples::stories::{Entropy, Stories, read};
use clap::Parser;

/// Writes stories from a seeded grammar, or checks text against it.
#[derive(Parser)]
struct Arguments {
    /// Seed; the same stories for the same seed, everywhere
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many stories
    #[arg(long, default_value_t = 60_000)]
    stories: usize,
    /// The file to write (default: stdout)
    #[arg(long)]
    out: Option<PathBuf>,
    /// Write an object {"text": ...} a line
    #[arg(long)]
    jsonl: bool,
    /// Instead of writing, read a file of one story or one {"text": ...} a line, and say which ones the grammar
    /// tells
    #[arg(long, conflicts_with_all = ["seed", "stories", "out", "jsonl"])]
    check: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(path) = &arguments.check {
        return check(path);
    }
    let entropy = match &arguments.out {
        None => write(&arguments, BufWriter::new(std::io::stdout().lock()))?,
        Some(path) => {
            // Beside its destination, and renamed when it is whole.
            let context = || format!("writing {}", path.display());
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let mut builder = tempfile::Builder::new();
            // The mode of any new file: temporary files are for their owner alone otherwise.
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
            let file = builder.tempfile_in(folder.unwrap_or(Path::new("."))).with_context(context)?;
            let entropy = write(&arguments, BufWriter::new(&file)).with_context(context)?;
            file.persist(path).with_context(context)?;
            entropy
        }
    };
    eprintln!("{} stories, {} words, {} characters", entropy.stories, entropy.words, entropy.characters);
    eprintln!(
        "entropy: {:.2} +- {:.2} bits per story, {:.4} per character, {:.4} per word",
        entropy.per_story(),
        entropy.standard_error(),
        entropy.per_character(),
        entropy.bits / entropy.words as f64
    );
    eprintln!("no model can expect a perplexity below 2^({:.1} / T) over their T tokens", entropy.bits);
    Ok(())
}

fn write(arguments: &Arguments, mut out: impl Write) -> anyhow::Result<Entropy> {
    let mut entropy = Entropy::default();
    for story in Stories::new(arguments.seed).take(arguments.stories) {
        if arguments.jsonl {
            writeln!(out, "{}", serde_json::json!({ "text": story.text }))?;
        } else {
            writeln!(out, "{}", story.text)?;
        }
        entropy.add(&story);
    }
    out.flush()?;
    Ok(entropy)
}

fn check(path: &Path) -> anyhow::Result<()> {
    let context = || format!("reading {}", path.display());
    let (mut lines, mut whole, mut cut, mut bits) = (0usize, 0usize, 0usize, 0.0);
    let (mut characters, mut understood) = (0, 0);
    for line in BufReader::new(std::fs::File::open(path).with_context(context)?).lines() {
        let line = line.with_context(context)?;
        lines += 1;
        let text = match serde_json::from_str::<serde_json::Value>(&line) {
            Ok(value) if value["text"].is_string() => value["text"].as_str().unwrap_or_default().to_owned(),
            _ => line,
        };
        let reading = read(&text);
        (characters, understood) = (characters + text.len(), understood + reading.understood);
        if reading.derivations > 0 {
            whole += 1;
            bits += reading.bits;
        } else if reading.understood == text.len() {
            cut += 1;
        } else {
            let (head, tail) = text.split_at(reading.understood);
            println!("line {lines}: {head} <-- no story goes on: {tail}");
        }
    }
    println!("{whole} of {lines} lines are stories, and {cut} begin like one and are cut off");
    println!(
        "{:.1} % of the text come before the first deviation",
        100.0 * understood as f64 / characters as f64
    );
    println!(
        "the stories have {bits:.1} bits: the perplexity over their T tokens is at least 2^({bits:.1} / T)"
    );
    Ok(())
}
