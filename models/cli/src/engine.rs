//! From flags to an engine, with progress bars and with errors that name the flags.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use bitnet_burn::backends::manager;
#[cfg(feature = "remote")]
use bitnet_burn::backends::remote;
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::device::{DeviceError, DeviceKind};
use bitnet_burn_engine::load::{ActivationRule, LoadProgress};
use bitnet_burn_engine::receipt::GenerationRecord;
use bitnet_burn_engine::report::Execution;
use bitnet_burn_engine::{Engine, EngineError, EngineOptions, OpenEvent, Session};
use bitnet_burn_manager::{KernelManager, ManagerConfig};
use bitnet_burn_train::export::newest_checkpoint;
use clap::ValueEnum as _;
use serde::Serialize;

use crate::args::{DraftArgs, EngineArgs, GapArgs, KernelArgs, LmHead, LoadArgs, ReceiptArgs, SecretArgs};
use crate::{output, settings};

/// The configuration below the flags, with this program as the gate's helper, and the file that it comes from
/// besides the environment.
pub fn config() -> anyhow::Result<(ManagerConfig, Option<PathBuf>)> {
    let (mut config, file) = settings::manager()?;
    config.plugins.helper =
        Some(std::env::current_exe().context("cannot find this program's file, which tries plugins")?);
    Ok((config, file))
}

impl KernelArgs {
    /// The configuration with the flags over it.
    pub fn over(&self, mut config: ManagerConfig) -> ManagerConfig {
        if let Some(threads) = self.threads.threads {
            config.threads = threads;
        }
        config.pin |= self.pin;
        if self.kernel.is_some() {
            config.force.clone_from(&self.kernel);
        }
        if let Some(objective) = self.optimise_for {
            config.objective = objective;
        }
        if let Some(strict) = self.strict {
            config.strict = strict;
        }
        config
    }

    /// Sets the process's kernel manager up from the flags and the configuration below them. A refused plugin is reported,
    /// and in strict mode it is an error.
    /// The reasons of the refused plugins come with the manager.
    pub fn configure_with(
        &self,
        config: ManagerConfig,
    ) -> anyhow::Result<(&'static KernelManager, Vec<String>)> {
        let (manager, refused) = manager::configure(self.over(config), &self.plugins)?;
        let refused: Vec<String> = refused.into_iter().map(output::in_one_line).collect();
        for problem in &refused {
            output::warning(format_args!("{problem}; it is not used"));
        }
        Ok((manager, refused))
    }
}

impl SecretArgs {
    /// The secret in the file, or in its variable.
    #[cfg(feature = "remote")]
    pub fn read(&self) -> anyhow::Result<Option<remote::Secret>> {
        match &self.secret_file {
            Some(path) => {
                remote::Secret::read(path).map(Some).map_err(|problem| anyhow!("--secret-file {problem}"))
            }
            None => remote::Secret::from_environment().map_err(|problem| anyhow!("{problem}")),
        }
    }

    /// Sets the secret for all workers that this process opens.
    pub fn use_for_workers(&self) -> anyhow::Result<()> {
        if self.secret_file.is_some() {
            DeviceKind::Remote.compiled_in().context("--secret-file")?;
            #[cfg(feature = "remote")]
            self.read()?.into_iter().for_each(remote::use_secret);
        }
        Ok(())
    }
}

impl EngineArgs {
    /// Opens the engine that the flags describe; `set` has the last word on the options. A progress bar shows how far
    /// loading is.
    pub fn open(&self, set: impl FnOnce(EngineOptions) -> EngineOptions) -> anyhow::Result<Engine> {
        let started = Instant::now();
        let checkpoint = self.file.open()?;
        self.load.open(checkpoint, started, &self.file.gaps, set)
    }
}

impl LoadArgs {
    /// [`EngineArgs::open`] for a checkpoint that is open since `started`. The first model of a process sets its kernels up.
    pub fn open(
        &self,
        checkpoint: Checkpoint,
        started: Instant,
        gaps: &GapArgs,
        set: impl FnOnce(EngineOptions) -> EngineOptions,
    ) -> anyhow::Result<Engine> {
        let opening = started.elapsed();
        self.secret.use_for_workers()?;
        let mut options =
            Engine::options().file(gaps.options()).head(self.lm_head.into()).activations(self.activations);
        if !manager::is_set_up() {
            let (config, _) = config()?;
            options = options.kernels(self.kernels.over(config), &self.kernels.plugins);
        }
        if let Some(adapter) = &self.adapter {
            options = options.adapter(newest_checkpoint(adapter)?);
        }
        if let Some(device) = &self.device {
            options = options.device(device.clone());
        }
        if let Some(layers) = self.gpu_layers {
            options = options.gpu_layers(layers);
        }
        if let Some(context) = self.context {
            options = options.context(context);
        }
        if let Some(kv_cache) = self.kv_cache {
            options = options.kv_cache(kv_cache.into());
        }
        if self.no_prepacked {
            options = options.without_prepacked();
        }
        let bar = output::bar(1, "{msg} [{bar:30}] {pos}/{len}");
        let engine = set(options).open_checkpoint(checkpoint, opening, &mut |event| match event {
            OpenEvent::Progress(progress) => {
                let (message, done, all) = match progress {
                    LoadProgress::Tuning(done, all) => ("measuring kernels", done, all),
                    LoadProgress::Packing(done, all) => ("loading layers   ", done, all),
                };
                bar.set_message(message);
                bar.set_length(all as u64);
                bar.set_position(done as u64);
            }
            OpenEvent::Warning(text) => output::warning(text),
            _ => {}
        });
        bar.finish_and_clear();
        engine.map_err(|error| self.with_flags(error))
    }

    /// An engine's error in terms of the flags.
    fn with_flags(&self, error: EngineError) -> anyhow::Error {
        match error {
            EngineError::Load(error) => error.into(),
            EngineError::Model(error) => error.into(),
            EngineError::Tokenizer(error) => error.into(),
            EngineError::Kernels(error) => (*error).into(),
            EngineError::Plan(error) => error.into(),
            EngineError::Device(error) => device_error(error),
            EngineError::StrictPlan(error) => {
                device_error(error).context("strict mode (no-fallback): the plan can't be followed")
            }
            EngineError::Context { asked, trained } => {
                anyhow!("--context {asked}: the model was trained for {trained} positions")
            }
            EngineError::HeadOfFloats { .. } => {
                let mode = LmHead::to_possible_value(&self.lm_head);
                let mode = mode.map_or_else(String::new, |value| value.get_name().to_owned());
                anyhow!("--lm-head {mode} quantises activations, --activations float leaves them: choose one")
            }
            EngineError::DraftTokenizer { .. }
            | EngineError::DraftNoTokenizer { .. }
            | EngineError::DraftDevice => anyhow!("--draft-model: {error}"),
            EngineError::GpuLayers { layers, problem } => anyhow!("--gpu-layers {layers}: {problem}"),
            error => error.into(),
        }
    }
}

impl DraftArgs {
    /// Opens the draft model, if there is one, as `load` says, but without its adapter, and with a context, activations and an
    /// output projection of its own: they change no token.
    pub fn open(&self, load: &LoadArgs, gaps: &GapArgs) -> anyhow::Result<Option<Engine>> {
        let Some(model) = &self.draft_model else { return Ok(None) };
        let open = || {
            let started = Instant::now();
            let checkpoint = Checkpoint::open(&model.locate()?, &gaps.options())?;
            let load = LoadArgs {
                context: None,
                lm_head: LmHead::File,
                activations: ActivationRule::Model,
                adapter: None,
                ..load.clone()
            };
            load.open(checkpoint, started, gaps, EngineOptions::packed_in_background)
        };
        open().map(Some).context("--draft-model")
    }

    /// A session that guesses as the flags say.
    pub fn session(&self, engine: &Engine) -> anyhow::Result<Session> {
        let session = engine.session()?;
        Ok(if let Some(most) = self.draft { session.draft(most)? } else { session })
    }
}

impl ReceiptArgs {
    /// Writes a receipt of `report`, the whole report of the subcommand `command`, where one was asked for.
    pub fn write(
        &self,
        engine: &Engine,
        command: &str,
        report: &impl Serialize,
        generation: impl FnOnce() -> Option<GenerationRecord>,
    ) -> anyhow::Result<()> {
        let Some(path) = &self.receipt else { return Ok(()) };
        let receipt = engine.receipt(command, report, generation()).context("cannot make a receipt")?;
        let text = receipt.to_text()?;
        output::write_file(Path::new(path), |out| Ok(out.write_all(text.as_bytes())?))
    }
}

/// A device's error with the flag that named it.
pub fn device_error(error: DeviceError) -> anyhow::Error {
    match error {
        DeviceError::NotCompiledIn(name) => anyhow!(
            "--device {name} is not compiled in: build with `cargo build --release --features {name}`"
        ),
        error => anyhow!("--device {error}"),
    }
}

/// Keeps what a run on the CPU reached, for later plans.
pub fn remember(
    engine: &Engine,
    execution: &Execution,
    at: usize,
    decode: Option<f64>,
    prefill: Option<f64>,
) {
    if let Err(error) = engine.remember(execution, at, decode, prefill) {
        output::warning(format_args!("what this run reached can't be kept for later plans: {error}"));
    }
}
