//! From flags to a model that is ready, with what the report wants to know about the way there.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bitnet_burn::BitNet;
use bitnet_burn::CacheType;
use bitnet_burn::backends::{devices, manager};
use bitnet_burn_engine::checkpoint::Checkpoint;
use bitnet_burn_engine::load::{DEFAULT_CHUNK, LoadOptions, LoadProgress};
use bitnet_burn_engine::plan::{
    COMMON_CONTEXT, CPU, Comparison, DeviceMemory, MachineProfile, Measure, MemoryProfile, PlacedModel,
    Placement, PlacementKind, Plan, PlanRequest, Prediction, PredictionOutcome, Requirements, RunSettings,
};
use bitnet_burn_engine::plausible;
use bitnet_burn_engine::receipt::{GenerationRecord, Receipt};
use bitnet_burn_engine::report::{DeviceUsage, Execution, ModelSummary};
use bitnet_burn_engine::text::{count, human_bytes};
use bitnet_burn_engine::tokenizer::Tokenizer;
use bitnet_burn_manager::ManagerConfig;
use bitnet_burn_manager::{KernelManager, ManagerReport};
use burn::tensor::Device;
use clap::ValueEnum as _;
use serde::Serialize;

use crate::args::{DeviceArg, DeviceKind, DeviceName, EngineArgs, KernelArgs, KvCacheType, LmHead};
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
    /// Sets the manager up from the flags and the configuration below them. What is refused is reported, and in strict
    /// mode an error.
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
    /// Matrices that were mapped from the file of packed weights.
    prepacked: usize,
    pub summary: ModelSummary,
    pub load_seconds: f64,
    /// Threads, context, KV cache and rows.
    pub settings: RunSettings,
    device: String,
    placement: Placement,
    notes: Vec<String>,
    requirements: Requirements,
    machine: MachineProfile,
    /// Main memory before the model was loaded.
    memory_before: Option<MemoryProfile>,
    cache_dir: Option<PathBuf>,
    prediction: Option<Prediction>,
    tuning: Option<Duration>,
    before: ManagerReport,
}

/// What a subcommand wants of its engine.
pub struct Wishes {
    /// Whether there has to be a tokenizer.
    pub tokenizer: bool,
    /// Whether activations are quantised, as BitNet does.
    pub quantise_activations: bool,
    /// Rows of the largest forward pass; where nobody says, those of a plan, or as usual.
    pub max_rows: Option<usize>,
    /// What is measured depends on context and KV cache, which a plan must not change: where no flag says otherwise, a
    /// context of so many positions at most, and f32.
    pub measured_context: Option<usize>,
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
        let opening = Instant::now();
        let checkpoint = self.file.open()?;
        let opening = opening.elapsed();
        // Before the work of loading: a wrong flag should not wait for it.
        let context = self.context(&checkpoint, wishes.measured_context.unwrap_or(usize::MAX))?;
        let requirements = Requirements::of(&checkpoint, self.lm_head.into())?;
        let (mut config, _) = config()?;
        let cache_dir = config.cache_dir.clone();
        let memory_before = MachineProfile::detect(cache_dir.as_deref(), Measure::Nothing, None).memory;
        let fixed = self.context.or(wishes.measured_context).map(|_| context);
        let Place { host, placement, plan, mut notes } =
            self.place(&requirements, &mut config, wishes, fixed)?;
        let settings = RunSettings {
            threads: config.threads,
            context: match &plan {
                Some(plan) => plan.settings.context,
                None => context,
            },
            kv_cache: match &plan {
                Some(plan) => plan.settings.kv_cache,
                None => self.kv_cache.unwrap_or(KvCacheType::F32).into(),
            },
            rows: match &plan {
                Some(plan) => plan.settings.rows,
                None => wishes.max_rows.unwrap_or(DEFAULT_CHUNK),
            },
        };
        // A GPU's name may be wrong: that is told before kernels are measured.
        let mut opened: Vec<(String, Device)> = Vec::new();
        for device in placement.devices() {
            opened.push((device.to_owned(), open(device, host)?));
        }
        let mut open = |device: &str| match opened.iter().find(|(name, _)| name == device) {
            Some((_, device)) => Ok(device.clone()),
            None => open(device, host),
        };
        let kernels = self.kernels.configure_with(config)?;
        let before = kernels.manager.report();
        let started = Instant::now();
        let tokenizer = wishes
            .tokenizer
            .then(|| Tokenizer::from_source(&checkpoint.tokenizer_source(), checkpoint.config().vocab_size))
            .transpose()?;
        let options = LoadOptions {
            quantise_activations: wishes.quantise_activations,
            max_rows: settings.rows,
            head: self.lm_head.into(),
            prepacked: !self.no_prepacked,
        };
        let bar = output::bar(1, "{msg} [{bar:30}] {pos}/{len}");
        let (mut tuning_since, mut tuning) = (None, None);
        // Longer contexts grow when they are needed, unless somebody counts on them.
        let counted_on = self.context.is_some() || plan.is_some();
        let context = if counted_on { settings.context } else { settings.context.min(COMMON_CONTEXT) };
        let tried = RunSettings { context, ..settings };
        let placed =
            PlacedModel::load(&checkpoint, &placement, &tried, &options, &mut open, &mut |progress| {
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
        let PlacedModel { model, prepacked, placement, notes: failed } = placed;
        for note in &failed {
            output::warning(note);
        }
        notes.extend(failed);
        let load_seconds = (opening + started.elapsed()).as_secs_f64();
        let settings = RunSettings { threads: kernels.manager.pool().threads(), ..settings };
        let machine = MachineProfile::detect(cache_dir.as_deref(), Measure::Nothing, Some(settings.threads));
        Ok(Engine {
            summary: ModelSummary::of(&checkpoint),
            load_seconds,
            device: DeviceArg::of(&placement, host)?.to_string(),
            prediction: Prediction::of(&requirements, &machine, &placement, &settings),
            requirements,
            machine,
            memory_before,
            cache_dir,
            settings,
            placement,
            notes,
            kernels,
            checkpoint,
            tokenizer,
            model,
            prepacked,
            tuning,
            before,
        })
    }
}

/// Where a model is to be.
struct Place {
    /// The host's device that was named.
    host: Option<DeviceKind>,
    placement: Placement,
    /// What chose it, if that was a plan.
    plan: Option<Plan>,
    notes: Vec<String>,
}

/// A device by its name in plans.
fn open(device: &str, host: Option<DeviceKind>) -> anyhow::Result<Device> {
    match (device, host) {
        (CPU, Some(host)) => host.open(),
        (device, _) => device.parse::<DeviceName>().map_err(anyhow::Error::msg)?.open(),
    }
}

impl EngineArgs {
    /// Which layers are to be where: by the flags, or planned; a plan sets the threads, too, where nothing else does.
    /// `context` is what it is fixed to.
    fn place(
        &self,
        requirements: &Requirements,
        config: &mut ManagerConfig,
        wishes: &Wishes,
        context: Option<usize>,
    ) -> anyhow::Result<Place> {
        let layers = requirements.layers;
        let cache_dir = config.cache_dir.clone();
        let choice = self.device.clone().unwrap_or_else(|| DeviceArg::one(DeviceKind::compiled()));
        let choice =
            choice.resolved(&MachineProfile::detect(cache_dir.as_deref(), Measure::Nothing, None))?;
        let host = choice.host();
        let fixed = match (&choice, self.gpu_layers) {
            (_, Some(n)) if n > layers => bail!("--gpu-layers {n}: the model has {layers} layers"),
            (DeviceArg::Auto, _) => None,
            (choice, None) => choice.placement(layers)?,
            (DeviceArg::On(parts), Some(n)) => Some(match &parts[..] {
                [(name, None)] if !name.kind.is_host() => split(&name.to_string(), n, layers),
                [_] if n == 0 => Placement::cpu_only(layers),
                [_] if devices::runtimes().is_empty() => bail!(
                    "--gpu-layers {n}: this build computes on no GPU; build with `cargo build --release --features wgpu`"
                ),
                // The CPU was not asked for: it is the default. Layers go to the GPU that a plan would take.
                [_] if self.device.is_none() => {
                    let machine = MachineProfile::detect(cache_dir.as_deref(), Measure::Missing, None);
                    let Some(gpu) = machine.gpu(None) else {
                        let problems: String = machine.problems.iter().map(|p| format!(": {p}")).collect();
                        bail!("--gpu-layers {n}: there is no usable GPU here{problems}")
                    };
                    split(&gpu.device, n, layers)
                }
                [(_, None)] => bail!("--gpu-layers {n} with --device {choice}, which is no GPU"),
                _ => bail!("--gpu-layers {n} with --device {choice}, which says it already"),
            }),
        };
        if let Some(placement) = fixed {
            return Ok(Place { host, placement, plan: None, notes: Vec::new() });
        }
        if config.threads == 0 {
            config.threads = self.kernels.threads.threads.unwrap_or(0);
        }
        let threads = (config.threads > 0).then_some(config.threads);
        let machine = MachineProfile::detect(cache_dir.as_deref(), Measure::Missing, threads);
        for problem in &machine.problems {
            output::warning(problem);
        }
        let asked = PlanRequest {
            threads: self.kernels.threads.threads.or(threads),
            context,
            kv_cache: (self.kv_cache.map(Into::into))
                .or_else(|| wishes.measured_context.map(|_| CacheType::F32)),
            gpu_layers: self.gpu_layers,
            rows: wishes.max_rows,
            ..PlanRequest::default()
        };
        let mut plan = Plan::new(requirements, &machine, &asked)?;
        let mut notes = Vec::new();
        // What was found once may be gone.
        let gone = plan.placement.devices().find_map(|device| open(device, host).err());
        if let Some(problem) = gone {
            if self.kernels.strict.unwrap_or(config.strict).no_fallback {
                return Err(problem.context("strict mode (no-fallback): the plan can't be followed"));
            }
            let note = format!(
                "{problem:#}: the CPU computes (`bitnet plan --measure afresh` looks for GPUs again)"
            );
            output::warning(&note);
            notes.push(note);
            let on_cpu = PlanRequest { device: Some(CPU.into()), gpu_layers: None, ..asked };
            plan = Plan::new(requirements, &machine, &on_cpu)?;
        }
        if !plan.fits && !plan.fallback {
            output::warning(plan.reasons.first().map_or("the model does not fit", String::as_str));
        }
        config.threads = plan.settings.threads;
        Ok(Place { host, placement: plan.placement.clone(), plan: Some(plan), notes })
    }
}

/// The first layers on a GPU; with all of them, everything.
fn split(gpu: &str, on_gpu: usize, layers: usize) -> Placement {
    if on_gpu == layers {
        Placement::gpu_only(gpu, layers)
    } else {
        Placement::hybrid(gpu, on_gpu, layers - on_gpu)
    }
}

impl Engine {
    /// Which kernels have computed since the engine was made.
    pub fn execution(&self) -> Execution {
        let mut execution = Execution::between(&self.device, &self.before, &self.kernels.manager.report());
        execution.lm_head = Some(self.model.head().description());
        execution.prepacked = self.prepacked;
        execution.tuning.seconds = self.tuning.map(|time| time.as_secs_f64());
        execution.refused_plugins.clone_from(&self.kernels.refused);
        execution.placement = (self.placement.devices().count() > 1).then(|| self.placement.clone());
        execution.placement_notes.clone_from(&self.notes);
        execution.device_usage = self.device_usage();
        execution
    }

    /// What the GPUs' runtimes have of their memory.
    fn device_usage(&self) -> Vec<DeviceUsage> {
        let layers = self.model.layer_devices();
        let device = |name: &str| match self.placement.stages.iter().find(|stage| stage.device == name) {
            Some(stage) => layers.get(stage.layers.start).cloned(),
            None => Some(self.model.device()),
        };
        let usage = |name: &str| Some(DeviceUsage::new(name, devices::usage(&device(name)?)?));
        self.placement.devices().filter_map(usage).collect()
    }

    /// That there is memory for so many sequences of so many positions beside the model, as far as that is known.
    pub fn check_room(&self, sequences: usize, positions: usize) -> anyhow::Result<()> {
        let machine = MachineProfile { memory: self.memory_before, ..self.machine.clone() };
        let rows = self.settings.rows.max(sequences);
        let settings = RunSettings { context: positions, rows, ..self.settings };
        let one = self.requirements.kv_bytes(settings.kv_cache, positions, self.requirements.layers);
        match self.placement.sequences(&self.requirements, &machine, &settings) {
            Some(room) if (sequences as u64) > room => bail!(
                "there is memory for {} of {positions} positions beside the model, of {} each, and {sequences} were asked \
                 for: `--kv-cache f16` or `int8` takes less, and so do fewer positions",
                count(room, "sequence"),
                human_bytes(one)
            ),
            _ => Ok(()),
        }
    }

    /// What was measured, beside what was predicted for it, where this machine is known: decode behind `at` positions on
    /// the average.
    pub fn outcome(&self, at: usize, decode: Option<f64>, prefill: Option<f64>) -> Option<PredictionOutcome> {
        let prediction = self.prediction.as_ref()?;
        Some(PredictionOutcome::of(prediction, (at, self.settings.context), decode, prefill))
    }

    /// What memory was for on each device, with a KV cache of so many bytes and so many rows at once.
    pub fn memory(&self, kv_cache_bytes: usize, rows: usize) -> Vec<DeviceMemory> {
        let Requirements { layers, .. } = self.requirements;
        let position = self.requirements.kv_bytes(self.settings.kv_cache, 1, layers).max(1);
        let context = (kv_cache_bytes as u64).div_ceil(position) as usize;
        self.requirements.memory(&self.placement, &RunSettings { context, rows, ..self.settings })
    }

    /// Remembers what a run on the CPU alone reached of the roofline, for later plans: with the kernels that they will
    /// have, too. Weights that fit a cache are none of the roofline's.
    pub fn remember(&self, execution: &Execution, at: usize, decode: Option<f64>, prefill: Option<f64>) {
        let config = self.kernels.manager.config();
        let chosen = config.force.is_none() && config.masked_features.is_empty();
        if !chosen || !execution.fallbacks.is_empty() || execution.reference_calls > 0 {
            return;
        }
        let bytes = self.requirements.layer_bytes(self.requirements.layers) + self.requirements.head_read;
        if cfg!(debug_assertions)
            || self.placement.kind() != PlacementKind::CpuOnly
            || bytes < plausible::SMALLEST
        {
            return;
        }
        let machine = self.machine.without_efficiency();
        let roofline = Prediction::of(&self.requirements, &machine, &self.placement, &self.settings);
        let Some(roofline) = roofline else { return };
        let outcome = PredictionOutcome::of(&roofline, (at, self.settings.context), decode, prefill);
        let ratio = |comparison: Option<Comparison>| comparison.map(|c| c.ratio);
        let (decode, prefill) = (ratio(outcome.decode), ratio(outcome.prefill));
        let kept =
            MachineProfile::remember(self.cache_dir.as_deref(), self.settings.threads, decode, prefill);
        if let Err(error) = kept {
            output::warning(format_args!("what this run reached can't be kept for later plans: {error}"));
        }
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
