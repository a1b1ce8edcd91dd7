//! Makes the model that the program carries: writes stories by the grammar, trains on them, exports the result
//! to models/engine/assets/stories.gguf, and says how close it came to the entropy of the grammar. From the root of the
//! repository:
//!
//! ```text
//! cargo run --release --example default_model
//! cargo run --release --example default_model -- --twin   # its float twin, and both curves in docs/training.svg
//! ```
//!
//! What was trained lies in target/default-model; a run that was interrupted goes on where it was.

use bitnet_burn_engine::load::load;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Context as _;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::gguf::GgufTypes;
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_examples::stories::{Stories, read};
use bitnet_burn_formats::dense::DenseFormat;
use bitnet_burn_train::export::{ExportOptions, Target, export};
use bitnet_burn_train::{
    Corpus, Curve, Evaluation, Event, Metrics, TrainConfig, Trainer, evaluate, is_run, newest, plot,
};
use burn::module::Module as _;
use burn::tensor::Device;
use clap::Parser;

/// Makes the model that the program carries.
#[derive(Parser)]
struct Args {
    /// Train the float twin instead, with the same data, steps and size, and plot both
    #[arg(long)]
    twin: bool,
}

const STORIES: usize = 60_000;
const RUNS: &str = "target/default-model";
const MODEL: &str = "models/engine/assets/stories.gguf";
const PLOT: &str = "docs/training.svg";

fn report(what: &str, evaluation: Evaluation) {
    println!("{what}: {:.4} nats per token, perplexity {:.4}", evaluation.loss(), evaluation.perplexity());
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut config = TrainConfig::from_toml(include_str!("../models/engine/assets/stories.toml"))
        .map_err(anyhow::Error::msg)?;
    config.model.ternary = !args.twin;
    let corpus = Corpus::new(Stories::new(config.seed).take(STORIES).map(|story| story.text));
    let run = |twin: bool| Path::new(RUNS).join(if twin { "float" } else { "ternary" });
    let dir = run(args.twin);
    let device = Device::flex();
    let mut trainer = if is_run(&dir) {
        Trainer::resume(&dir, &corpus, &device)?
    } else {
        Trainer::start(&dir, config.clone(), &corpus, &device)?
    };
    let data = trainer.data();
    let bits: f64 = data.validation_texts.iter().map(|text| read(text).bits).sum();
    let entropy = bits * std::f64::consts::LN_2 / data.validation_tokens() as f64;
    println!(
        "{} tokens to learn from; the grammar's entropy, of the validation set: {entropy:.4} nats per token, \
         perplexity {:.4}",
        data.training_tokens(),
        entropy.exp()
    );
    let start = Instant::now();
    trainer.run(&AtomicBool::new(false), &mut |event| {
        if let Event::Evaluation { step, evaluation } = event {
            report(&format!("step {step}, {:.0} s", start.elapsed().as_secs_f64()), evaluation);
        }
    })?;

    // All of the validation set, in the training state.
    let windows = trainer.data().validation().to_vec();
    let batch = config.run.batch_size;
    report("in its training state", evaluate(&trainer.model().clone().valid(), &windows, batch)?);
    if args.twin {
        let curve = |name: &str, twin: bool| -> anyhow::Result<Curve> {
            let rows = Metrics::read(&run(twin)).context("train the ternary model first, without --twin")?;
            Ok(Curve { name: name.into(), rows })
        };
        let curves = [curve("BitNet", false)?, curve("float twin", true)?];
        std::fs::write(PLOT, plot(&curves, &[("entropy of the grammar".into(), entropy)]))?;
        println!("{PLOT}");
        return Ok(());
    }

    let checkpoint = newest(&dir)?.context("training ended without a checkpoint")?;
    let checkpoint = Checkpoint::open(&checkpoint, &OpenOptions::default())?;
    let types = GgufTypes { dense: Some(DenseFormat::F16), ..GgufTypes::default() };
    let options = ExportOptions { overwrite: true, ..ExportOptions::new(Target::Gguf(types)) };
    let summary = export(&checkpoint, Path::new(MODEL), &options, &mut |_| ControlFlow::Continue(()))?;
    println!("{MODEL}: {} bytes", summary.bytes);
    let exported = Checkpoint::open(Path::new(MODEL), &OpenOptions::default())?;
    let model = load(&exported, &device, &LoadOptions::default(), &mut |_| {})?;
    report("exported, through the kernels", evaluate(&model, &windows, batch)?);
    Ok(())
}
