//! From nothing to text in one file: stories are made, a small BitNet learns them, is exported as GGUF, loaded
//! from there, and continues several prompts at once. It takes a minute or two.
//!
//! ```text
//! cargo run --release --example train_export_serve
//! ```

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Context;
use bitnet_burn::Row;
use bitnet_burn_engine::Engine;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::gguf::GgufTypes;
use bitnet_burn_engine::sampling::{Sampler, SamplingConfig};
use bitnet_burn_examples::stories::{Stories, read};
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_train::export::{ExportOptions, Target, export};
use bitnet_burn_train::{Corpus, Event, TrainConfig, Trainer, newest};
use burn::tensor::Device;

/// Trains in a directory; returns the perplexity on stories that were kept for validation.
fn train(run: &Path, config: TrainConfig, stories: usize) -> anyhow::Result<f64> {
    let corpus = Corpus::new(Stories::new(1).take(stories).map(|story| story.text));
    let mut trainer = Trainer::start(run, config, &corpus, &Device::flex())?;
    let data = trainer.data();
    println!("{} tokens to learn from, of a vocabulary of {}", data.training_tokens(), data.vocab_size);
    // What no model can be better than: the stories' own entropy.
    let bits: f64 = data.validation_texts.iter().map(|text| read(text).bits).sum();
    let floor = (bits / data.validation_tokens() as f64).exp2();

    let mut perplexity = f64::NAN;
    trainer.run(&AtomicBool::new(false), &mut |event| {
        if let Event::Evaluation { step, evaluation } = event {
            perplexity = evaluation.perplexity();
            println!("step {step}: validation perplexity {perplexity:.2} (at best {floor:.2})");
        }
    })?;
    Ok(perplexity)
}

/// Writes the newest checkpoint of a run as one GGUF file: projections in I2_S, embedding in F16, tokenizer
/// inside.
fn to_gguf(run: &Path, file: &Path) -> anyhow::Result<u64> {
    let newest = newest(run)?.context("training ended without a checkpoint")?;
    let checkpoint = Checkpoint::open(&newest, &OpenOptions::default())?;
    let types = GgufTypes { dense: Some(DenseFormat::F16), ..GgufTypes::default() };
    let options = ExportOptions { overwrite: true, ..ExportOptions::new(Target::Gguf(types)) };
    let summary = export(&checkpoint, file, &options, &mut |_| ControlFlow::Continue(()))?;
    Ok(summary.bytes)
}

/// Continues all prompts together: every step computes one row for each sequence that has not ended, so
/// that the weights are read once for all of them. Returns the texts with their prompts, and the number
/// of tokens.
fn serve(
    engine: &Engine,
    prompts: &[&str],
    sampling: &SamplingConfig,
    limit: usize,
) -> anyhow::Result<(Vec<String>, usize)> {
    struct Request {
        tokens: Vec<u32>,
        /// Those of them that the model has seen.
        seen: usize,
        sampler: Sampler,
        ended: bool,
    }
    let tokenizer = engine.tokenizer().context("the model has no tokenizer")?;
    let ends = engine.end_tokens();
    let context = engine.settings().context;
    let mut cache = engine.cache()?;
    let mut requests = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let tokens = engine.encode(prompt, true)?;
        anyhow::ensure!(
            !tokens.is_empty() && tokens.len() < context,
            "{prompt:?} has {} tokens",
            tokens.len()
        );
        let sampler = Sampler::new(SamplingConfig { seed: sampling.seed + i as u64, ..sampling.clone() })?;
        let sequence = cache.add_sequence(tokens.len() + limit);
        requests.push((sequence, Request { tokens, seen: 0, sampler, ended: false }));
    }

    let mut count = 0;
    for answered in 0..limit {
        // The rows of a prompt the first time, then one row for each new token; and the last row of each.
        let (mut rows, mut last) = (Vec::new(), Vec::new());
        for (sequence, request) in requests.iter_mut().filter(|(_, request)| !request.ended) {
            let new = request.tokens[request.seen..].iter().enumerate();
            rows.extend(new.map(|(i, &token)| Row {
                token,
                sequence: *sequence,
                position: request.seen + i,
            }));
            request.seen = request.tokens.len();
            last.push(rows.len() - 1);
        }
        if rows.is_empty() {
            break;
        }
        let logits: Vec<f32> = engine.model().forward(&rows, &last, &mut cache)?.into_data().iter().collect();
        let live = requests.iter_mut().filter(|(_, request)| !request.ended);
        for ((_, request), logits) in live.zip(logits.chunks_exact(engine.model().config().vocab_size)) {
            let token = request.sampler.sample(logits, &request.tokens, answered)?;
            request.tokens.push(token);
            count += 1;
            request.ended = ends.contains(&token) || request.tokens.len() == context;
        }
    }
    let texts = requests.iter().map(|(_, request)| tokenizer.decode(&request.tokens, true));
    Ok((texts.collect::<Result<_, _>>()?, count))
}

fn main() -> anyhow::Result<()> {
    let config = TrainConfig::from_toml(
        "
        [model]
        name = 'small stories'
        hidden_size = 128
        intermediate_size = 384
        n_layers = 3
        n_heads = 4
        n_kv_heads = 2
        context_length = 256
        [tokenizer]
        vocab_size = 768
        [run]
        steps = 1000
        batch_size = 4
        evaluate_every = 200
        evaluation_sequences = 64
        checkpoint_every = 1000
        ",
    )
    .map_err(anyhow::Error::msg)?;
    let run = tempfile::tempdir()?;
    train(run.path(), config, 8000)?;

    let file = Path::new("target/small-stories.gguf");
    std::fs::create_dir_all("target")?;
    println!("{}: {} bytes", file.display(), to_gguf(run.path(), file)?);

    let engine = Engine::open(file)?;
    let sampling = SamplingConfig { temperature: 0.7, ..SamplingConfig::default() };
    let prompts =
        ["Once there was a mouse named Pip", "Far away, behind seven hills,", "One dark night", "\"Look!\""];
    let start = Instant::now();
    let (texts, tokens) = serve(&engine, &prompts, &sampling, 200)?;
    let seconds = start.elapsed().as_secs_f64();
    for text in texts {
        println!("\n{text}");
    }
    println!("\n{} prompts at once: {tokens} tokens in {seconds:.2} s", prompts.len());
    Ok(())
}

#[test]
fn what_was_trained_is_what_is_served() {
    let config = TrainConfig::from_toml(
        "
        [model]
        hidden_size = 128
        intermediate_size = 128
        n_layers = 1
        n_heads = 2
        n_kv_heads = 1
        context_length = 64
        [tokenizer]
        vocab_size = 300
        [optimizer]
        warmup_steps = 5
        [run]
        steps = 20
        batch_size = 4
        evaluate_every = 20
        checkpoint_every = 20
        evaluation_sequences = 0
        ",
    )
    .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (run, file) = (directory.path().join("run"), directory.path().join("model.gguf"));
    let trained = train(&run, config, 200).unwrap();
    // A guess among all tokens has a perplexity of 300.
    assert!(trained < 150.0, "{trained}");
    to_gguf(&run, &file).unwrap();
    let engine = Engine::open(&file).unwrap();

    // The file has learned what the training model has: up to the F16 embedding.
    let corpus = Corpus::new(Stories::new(1).take(200).map(|story| story.text));
    let trainer = Trainer::resume(&run, &corpus, &Device::flex()).unwrap();
    let windows = trainer.data().validation();
    let served = bitnet_burn_train::evaluate(engine.model(), windows, 8).unwrap().perplexity();
    assert!((served / trained - 1.0).abs() < 0.02, "{served}, trained {trained}");

    // Prompts of different lengths, together and alone.
    let prompts = ["Once", "In a village by the river lived", "Far away,"];
    let greedy = SamplingConfig::greedy();
    let (together, _) = serve(&engine, &prompts, &greedy, 10).unwrap();
    for (prompt, text) in prompts.iter().zip(&together) {
        assert!(text.starts_with(prompt) && text.len() > prompt.len(), "{text}");
        assert_eq!(&serve(&engine, &[prompt], &greedy, 10).unwrap().0[0], text);
    }
}
