//! From flags to a model that is ready, with what the report wants to know about the way there.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bitnet_burn::backends::manager;
use bitnet_burn::bitnet::{BitNet, LoadOptions, LoadProgress};
use bitnet_burn::checkpoint::Checkpoint;
use bitnet_burn::core::ManagerConfig;
use bitnet_burn::core::manager::{KernelManager, KernelReport, ManagerReport, Status};
use bitnet_burn::report::{ModelSummary, Receipt};
use bitnet_burn::tokenizer::Tokenizer;

use crate::args::{EngineArgs, KernelArgs, LmHead};
use crate::output;

/// The process's kernel manager, set up from the environment and the flags.
pub struct Kernels {
    pub manager: &'static KernelManager,
    /// Plugins that were refused, and kernels of theirs that were rejected, with the reasons.
    pub refused: Vec<String>,
}

impl KernelArgs {
    /// Sets the manager up. What is refused is reported, and in strict mode an error.
    pub fn configure(&self) -> anyhow::Result<Kernels> {
        let mut config = ManagerConfig::from_env()?;
        if let Some(threads) = self.threads.threads {
            config.threads = threads;
        }
        if self.kernel.is_some() {
            config.force.clone_from(&self.kernel);
        }
        let strict = config.strict;
        let (manager, errors) = manager::configure(config, &self.plugin_files()?)?;
        let mut refused = Vec::new();
        for error in errors {
            if strict {
                return Err(error).context("strict mode: a plugin is refused");
            }
            let text = output::in_one_line(error);
            output::warning(format_args!("{text}; it is not used"));
            refused.push(text);
        }
        for kernel in manager.report().kernels {
            // The manager has logged it.
            if let KernelReport { kernel, status: Status::Rejected(reason), sha256: Some(_), .. } = kernel {
                if strict {
                    bail!("strict mode: kernel {kernel} is rejected: {reason}");
                }
                refused.push(format!("{kernel}: {reason}"));
            }
        }
        Ok(Kernels { manager, refused })
    }

    /// The plugins of the environment and of the flags, each once.
    fn plugin_files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let from_env = std::env::var_os("BITNET_PLUGIN_PATH").unwrap_or_default();
        // An empty entry would mean the working directory in PATH; here it means nothing.
        let from_env = std::env::split_paths(&from_env).filter(|path| !path.as_os_str().is_empty());
        let mut files = Vec::new();
        for path in from_env.chain(self.plugins.iter().cloned()) {
            files.extend(libraries(&path)?);
        }
        let mut seen = Vec::new();
        files.retain(|file| {
            let file = file.canonicalize().unwrap_or_else(|_| file.clone());
            let new = !seen.contains(&file);
            seen.push(file);
            new
        });
        Ok(files)
    }
}

/// A file itself, or the libraries in a directory, by name.
fn libraries(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let action = || format!("cannot read the directory of plugins {}", path.display());
    let extension = std::env::consts::DLL_EXTENSION;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).with_context(action)? {
        let file = entry.with_context(action)?.path();
        if file.extension().is_some_and(|e| e == extension) {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        output::warning(format_args!("{}: there is no .{extension} file in this directory", path.display()));
    }
    Ok(files)
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
        if self.lm_head == LmHead::Int8 && !wishes.quantise_activations {
            bail!(
                "--lm-head int8 quantises activations, --no-activation-quantisation leaves them: choose one"
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
    pub fn receipt(&self) -> Receipt {
        let mut receipt = Receipt::between(self.device, &self.before, &self.kernels.manager.report());
        receipt.lm_head = Some(self.model.head_name());
        receipt.tuning.seconds = self.tuning.map(|time| time.as_secs_f64());
        receipt.refused_plugins.clone_from(&self.kernels.refused);
        receipt
    }
}
