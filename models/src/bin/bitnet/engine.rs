//! From flags to a model that is ready, with what the report wants to know about the way there.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bitnet_burn::backends::manager;
use bitnet_burn::bitnet::{BitNet, LoadOptions, LoadProgress};
use bitnet_burn::checkpoint::Checkpoint;
use bitnet_burn::core::ManagerConfig;
use bitnet_burn::core::manager::{KernelManager, ManagerReport};
use bitnet_burn::plausible;
use bitnet_burn::receipt::{GenerationRecord, Receipt};
use bitnet_burn::report::{Execution, ModelSummary};
use bitnet_burn::tokenizer::Tokenizer;
use clap::ValueEnum as _;
use serde::Serialize;

use crate::args::{EngineArgs, KernelArgs, LmHead};
use crate::{output, settings};

/// The process's kernel manager, set up from the configuration and the flags.
pub struct Kernels {
    pub manager: &'static KernelManager,
    /// Plugins that were refused, with the reasons.
    pub refused: Vec<String>,
}

/// The configuration below the flags, with this program as the gate's helper, and the file that it comes from
/// besides the environment.
pub fn config() -> anyhow::Result<(ManagerConfig, Option<PathBuf>)> {
    let (mut config, file) = settings::manager()?;
    config.plugins.helper =
        Some(std::env::current_exe().context("cannot find this program's file, which tries plugins")?);
    Ok((config, file))
}

impl KernelArgs {
    /// Sets the manager up from the configuration and the flags. What is refused is reported, and in strict
    /// mode an error.
    pub fn configure(&self) -> anyhow::Result<Kernels> {
        self.configure_with(config()?.0)
    }

    /// The same with another configuration below the flags.
    pub fn configure_with(&self, mut config: ManagerConfig) -> anyhow::Result<Kernels> {
        if let Some(threads) = self.threads.threads {
            config.threads = threads;
        }
        config.pin |= self.pin;
        if self.kernel.is_some() {
            config.force.clone_from(&self.kernel);
        }
        if let Some(strict) = self.strict {
            config.strict = strict;
        }
        let (manager, errors) = manager::configure(config, &self.plugins)?;
        let mut refused = Vec::new();
        for error in errors {
            let text = output::in_one_line(error);
            output::warning(format_args!("{text}; it is not used"));
            refused.push(text);
        }
        Ok(Kernels { manager, refused })
    }
}

/// A model that is ready.
pub struct Engine {
    pub kernels: Kernels,
    pub checkpoint: Checkpoint,
    pub tokenizer: Option<Tokenizer>,
    pub model: BitNet,
    pub summary: ModelSummary,
    pub load_seconds: f64,
    device: &'static str,
    tuning: Option<Duration>,
    before: ManagerReport,
}

/// What a subcommand wants of its engine.
pub struct Wishes {
    /// Whether there has to be a tokenizer.
    pub tokenizer: bool,
    /// Whether activations are quantised, as BitNet does.
    pub quantise_activations: bool,
    /// Rows of the largest forward pass.
    pub max_rows: usize,
}

impl EngineArgs {
    /// Opens the files, chooses the kernels and loads the model, with progress bars.
    pub fn load(&self, wishes: &Wishes) -> anyhow::Result<Engine> {
        if self.lm_head != LmHead::File && !wishes.quantise_activations {
            let mode = self.lm_head.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
            bail!(
                "--lm-head {mode} quantises activations, --no-activation-quantisation leaves them: choose one"
            );
        }
        let device = self.device.open()?;
        let kernels = self.kernels.configure()?;
        let before = kernels.manager.report();
        let started = Instant::now();
        let checkpoint = self.file.open()?;
        // Before the work of loading: a wrong flag should not wait for it.
        self.context(&checkpoint, usize::MAX)?;
        let tokenizer = wishes
            .tokenizer
            .then(|| Tokenizer::from_source(&checkpoint.tokenizer_source(), checkpoint.config().vocab_size))
            .transpose()?;
        let options = LoadOptions {
            quantise_activations: wishes.quantise_activations,
            max_rows: wishes.max_rows,
            head: self.lm_head.into(),
            prepacked: !self.no_prepacked,
        };
        let bar = output::bar(1, "{msg} [{bar:30}] {pos}/{len}");
        let (mut tuning_since, mut tuning) = (None, None);
        let model = BitNet::from_checkpoint(&checkpoint, &device, &options, &mut |progress| {
            let (message, done, all) = match progress {
                LoadProgress::Tuning(done, all) => ("measuring kernels", done, all),
                LoadProgress::Packing(done, all) => ("loading layers   ", done, all),
            };
            if let LoadProgress::Tuning(done, all) = progress {
                let since = *tuning_since.get_or_insert_with(Instant::now);
                if done == all {
                    tuning = Some(since.elapsed());
                }
            }
            bar.set_message(message);
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        Ok(Engine {
            summary: ModelSummary::of(&checkpoint),
            load_seconds: started.elapsed().as_secs_f64(),
            device: self.device.name(),
            kernels,
            checkpoint,
            tokenizer,
            model,
            tuning,
            before,
        })
    }
}

impl Engine {
    /// Which kernels have computed since the engine was made.
    pub fn execution(&self) -> Execution {
        let mut execution = Execution::between(self.device, &self.before, &self.kernels.manager.report());
        execution.lm_head = Some(self.model.head_name());
        execution.prepacked = self.model.prepacked();
        execution.tuning.seconds = self.tuning.map(|time| time.as_secs_f64());
        execution.refused_plugins.clone_from(&self.kernels.refused);
        execution
    }

    /// In strict mode, that the machine can have what was measured, in tokens a second.
    pub fn check_figures(
        &self,
        execution: &Execution,
        prefill: Option<f64>,
        decode: Option<f64>,
    ) -> anyhow::Result<()> {
        if execution.strict.plausible_figures {
            plausible::check(&self.model, execution, self.kernels.manager.pool(), prefill, decode)?;
        }
        Ok(())
    }

    /// Writes a receipt of `report`, the whole report of the subcommand `command`.
    pub fn write_receipt(
        &self,
        path: &Path,
        command: &str,
        report: &impl Serialize,
        generation: Option<GenerationRecord>,
    ) -> anyhow::Result<()> {
        let receipt = Receipt::new(command, &self.checkpoint, report, generation)
            .context("cannot make a receipt")?
            .to_text()?;
        output::write_file(path, |out| Ok(out.write_all(receipt.as_bytes())?))
    }
}
