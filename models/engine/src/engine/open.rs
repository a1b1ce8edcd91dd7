//! How an engine is opened: files, device, plan, kernels, model.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bitnet_burn::CacheType;
use bitnet_burn_backends::{devices, manager, ops};
use bitnet_burn_manager::ManagerConfig;
use burn::tensor::Device;

use super::{Engine, EngineError, Inner};
use crate::adapter::Adapter;
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::device::{DeviceKind, DeviceName, DeviceSpec};
use crate::load::{ActivationRule, DEFAULT_CHUNK, HeadMode, LoadOptions, LoadProgress, Packings};
use crate::plan::{
    COMMON_CONTEXT, CPU, MachineProfile, Measure, PlacedModel, Placement, Plan, PlanRequest, Prediction,
    Requirements, RunSettings,
};
use crate::report::ModelSummary;
use crate::tokenizer::Tokenizer;

/// What happens while an engine opens.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenEvent {
    /// Something that the user should know and that does not keep the engine from opening.
    Warning(String),
    /// Kernels are measured, or layers loaded.
    Progress(LoadProgress),
}

/// How an engine is opened. Made by [`Engine::options`].
#[derive(Clone, Debug)]
pub struct EngineOptions {
    file: OpenOptions,
    tokenizer: bool,
    adapter: Option<PathBuf>,
    load: LoadOptions,
    rows: Option<usize>,
    device: Option<DeviceSpec>,
    gpu_layers: Option<usize>,
    context: Option<usize>,
    measured_context: Option<usize>,
    kv_cache: Option<CacheType>,
    kernels: Option<(ManagerConfig, Vec<PathBuf>)>,
    draft: Option<Engine>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            file: OpenOptions::default(),
            tokenizer: true,
            adapter: None,
            load: LoadOptions::default(),
            rows: None,
            device: None,
            gpu_layers: None,
            context: None,
            measured_context: None,
            kv_cache: None,
            kernels: None,
            draft: None,
        }
    }
}

impl EngineOptions {
    /// What the caller knows better than the model's file.
    pub fn file(mut self, options: OpenOptions) -> Self {
        self.file = options;
        self
    }

    /// Without a tokenizer: prompts are token ids then.
    pub fn without_tokenizer(mut self) -> Self {
        self.tokenizer = false;
        self
    }

    /// With the LoRA [adapter](crate::adapter) in this directory, which is added to the model's projections.
    pub fn adapter(mut self, path: impl Into<PathBuf>) -> Self {
        self.adapter = Some(path.into());
        self
    }

    /// Where the model computes. Default: on the CPU.
    pub fn device(mut self, device: DeviceSpec) -> Self {
        self.device = Some(device);
        self
    }

    /// The first `layers` layers are on the GPU, the others on the CPU.
    pub fn gpu_layers(mut self, layers: usize) -> Self {
        self.gpu_layers = Some(layers);
        self
    }

    /// Positions of the KV cache. Default: as many as the model was trained for.
    pub fn context(mut self, positions: usize) -> Self {
        self.context = Some(positions);
        self
    }

    /// For measurements whose results depend on context and KV cache: a plan leaves them as they are, f32 and at most
    /// `positions`, where nothing else was asked for.
    pub fn measured_context(mut self, positions: usize) -> Self {
        self.measured_context = Some(positions);
        self
    }

    /// Type of the cached keys and values. Default: f32; with [`DeviceSpec::Auto`], the most exact that fits.
    pub fn kv_cache(mut self, kv_cache: CacheType) -> Self {
        self.kv_cache = Some(kv_cache);
        self
    }

    /// How the output projection is computed. Default: with the file's weights and f32 activations.
    pub fn head(mut self, head: HeadMode) -> Self {
        self.load.head = head;
        self
    }

    /// How activations are quantised. Default: as the model's files declare.
    pub fn activations(mut self, rule: ActivationRule) -> Self {
        self.load.activations = rule;
        self
    }

    /// Rows of the largest forward pass: prompts are computed in chunks of as many. Default: a plan's, or
    /// [`DEFAULT_CHUNK`].
    pub fn rows(mut self, rows: usize) -> Self {
        self.rows = Some(rows);
        self
    }

    /// Packs the weights anew, whatever [`prepack`](crate::prepack) wrote beside the model.
    pub fn without_prepacked(mut self) -> Self {
        self.load.prepacked = false;
        self
    }

    /// Opens without waiting for measurements and packings: projections whose rows can be read where they lie in the file do
    /// that, while a thread packs them for the fastest kernels. The first token is there sooner, and those until all is packed
    /// take longer. Results are the same bits.
    pub fn packed_in_background(mut self) -> Self {
        self.load.in_place = true;
        self
    }

    /// Sets the process's kernel manager up, with the plugins in these files and directories. That is possible once in a
    /// process, before its first use; without this, the manager is as it is, or as the environment says.
    pub fn kernels(mut self, config: ManagerConfig, plugins: &[PathBuf]) -> Self {
        self.kernels = Some((config, plugins.to_vec()));
        self
    }

    /// A smaller model with the same tokenizer, which guesses tokens ahead ([`speculate`](crate::speculate)). It changes no
    /// token.
    pub fn draft_model(mut self, draft: impl Into<Option<Engine>>) -> Self {
        self.draft = draft.into();
        self
    }

    /// Opens a GGUF file or a Hugging Face directory, chooses the kernels and loads the model.
    ///
    /// # Errors
    /// If a file, a device or a kernel is wrong.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Engine, EngineError> {
        let started = Instant::now();
        let checkpoint = Checkpoint::open(path.as_ref(), &self.file)?;
        self.open_checkpoint(checkpoint, started.elapsed(), &mut |_| {})
    }

    /// [`open`](Self::open) with the model that this package carries.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    #[cfg(feature = "default-model")]
    pub fn open_built_in(self) -> Result<Engine, EngineError> {
        self.open_checkpoint(crate::embedded::checkpoint()?, Duration::ZERO, &mut |_| {})
    }

    /// [`open`](Self::open) with a checkpoint that is open already, which took `opening`. `on_event` is told what happens.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_checkpoint(
        mut self,
        checkpoint: Checkpoint,
        opening: Duration,
        on_event: &mut dyn FnMut(OpenEvent),
    ) -> Result<Engine, EngineError> {
        self.load.activations = checkpoint.activations(self.load.activations);
        if self.load.activations == ActivationRule::Float && self.load.head != HeadMode::File {
            return Err(EngineError::HeadOfFloats { head: self.load.head });
        }
        // Before the work of loading: a wrong option should not wait for it.
        let trained = checkpoint.config().context_length;
        let context = match self.context {
            None => trained.min(self.measured_context.unwrap_or(usize::MAX)),
            Some(context) if context <= trained => context,
            Some(asked) => return Err(EngineError::Context { asked, trained }),
        };
        let mut requirements = Requirements::of(&checkpoint, self.load.head)?;
        if let Some(path) = &self.adapter {
            let adapter = Adapter::open(path, checkpoint.config())?;
            let of_layer = adapter.bytes().div_ceil(requirements.layers.max(1) as u64);
            requirements.layer_norms = requirements.layer_norms.saturating_add(of_layer);
            self.load.adapter = Some(Arc::new(adapter));
        }
        let mut config = match &self.kernels {
            Some((config, _)) => config.clone(),
            None => manager::manager().config().clone(),
        };
        let cache_dir = config.cache_dir.clone();
        let memory_before = MachineProfile::detect(cache_dir.as_deref(), Measure::Nothing, None).memory;
        let Place { host, placement, plan, mut notes } =
            self.place(&requirements, &mut config, context, on_event)?;
        let planned = plan.as_ref().map(|plan| plan.settings);
        let settings = RunSettings {
            threads: config.threads,
            context: planned.map_or(context, |settings| settings.context),
            kv_cache: planned.map_or(self.kv_cache.unwrap_or(CacheType::F32), |settings| settings.kv_cache),
            rows: planned.map_or(self.rows.unwrap_or(DEFAULT_CHUNK), |settings| settings.rows),
        };
        // A GPU's name may be wrong: the user is told before kernels are measured.
        let mut opened: Vec<(String, Device)> = Vec::new();
        for device in placement.devices() {
            opened.push((device.to_owned(), DeviceName::open_planned(device, host)?));
        }
        let mut open = |device: &str| -> Result<Device, EngineError> {
            match opened.iter().find(|(name, _)| name == device) {
                Some((_, device)) => Ok(device.clone()),
                None => Ok(DeviceName::open_planned(device, host)?),
            }
        };
        let (manager, refused) = match self.kernels {
            None => (manager::manager(), Vec::new()),
            Some((_, plugins)) => manager::configure(config, &plugins)?,
        };
        let refused: Vec<String> = refused.iter().map(|error| in_one_line(error)).collect();
        for problem in &refused {
            on_event(OpenEvent::Warning(format!("{problem}; it is not used")));
        }
        let before = manager.report();
        let started = Instant::now();
        let tokenizer = self
            .tokenizer
            .then(|| Tokenizer::from_source(&checkpoint.tokenizer_source(), checkpoint.config().vocab_size))
            .transpose()?;
        if let Some(draft) = &self.draft {
            check_draft(draft, tokenizer.as_ref(), &opened)?;
        }
        let options = LoadOptions { max_rows: settings.rows, ..self.load };
        let activations = options.activations;
        let (mut tuning_since, mut tuning) = (None, None);
        // Longer contexts grow when they are needed, unless the caller counts on them.
        let counted_on = self.context.is_some() || plan.is_some();
        let context = if counted_on { settings.context } else { settings.context.min(COMMON_CONTEXT) };
        let tried = RunSettings { context, ..settings };
        let placed =
            PlacedModel::load(&checkpoint, &placement, &tried, &options, &mut open, &mut |progress| {
                if let LoadProgress::Tuning(done, all) = progress {
                    let since = *tuning_since.get_or_insert_with(Instant::now);
                    if done == all {
                        tuning = Some(since.elapsed());
                    }
                }
                on_event(OpenEvent::Progress(progress));
            })?;
        let PlacedModel { model, prepacked, packings, placement, notes: failed } = placed;
        for note in &failed {
            on_event(OpenEvent::Warning(note.clone()));
        }
        notes.extend(failed);
        let settings = RunSettings { threads: manager.pool().threads(), ..settings };
        let machine = MachineProfile::detect(cache_dir.as_deref(), Measure::Nothing, Some(settings.threads));
        Ok(Engine(Arc::new(Inner {
            summary: ModelSummary::of(&checkpoint),
            load_time: opening + started.elapsed(),
            device: DeviceSpec::of(&placement, host)?,
            prediction: Prediction::of(&requirements, &machine, &placement, &settings),
            requirements,
            machine,
            memory_before,
            cache_dir,
            settings,
            head: options.head,
            file: self.file,
            activations,
            adapter: options.adapter,
            placement,
            notes,
            manager,
            refused,
            checkpoint,
            tokenizer,
            constraints: OnceLock::new(),
            model,
            draft: self.draft,
            prepacked,
            _packer: Packer::start(packings),
            tuning,
            before,
        })))
    }

    /// Which layers are where: as the options say, or as planned. A plan sets the threads, too, where nothing else does.
    fn place(
        &self,
        requirements: &Requirements,
        config: &mut ManagerConfig,
        context: usize,
        on_event: &mut dyn FnMut(OpenEvent),
    ) -> Result<Place, EngineError> {
        let layers = requirements.layers;
        let cache_dir = config.cache_dir.clone();
        let spec = self.device.clone().unwrap_or_else(|| DeviceKind::compiled().into());
        let spec = spec.resolved(&MachineProfile::detect(cache_dir.as_deref(), Measure::Nothing, None))?;
        let host = spec.host();
        let fixed = match self.gpu_layers {
            Some(n) => self.gpu_placement(n, layers, &spec, cache_dir.as_deref())?,
            None => spec.placement(layers)?,
        };
        if let Some(placement) = fixed {
            return Ok(Place { host, placement, plan: None, notes: Vec::new() });
        }
        let threads = (config.threads > 0).then_some(config.threads);
        let machine = MachineProfile::detect(cache_dir.as_deref(), Measure::Missing, threads);
        for problem in &machine.problems {
            on_event(OpenEvent::Warning(problem.clone()));
        }
        let request = PlanRequest {
            threads,
            context: self.context.or(self.measured_context).map(|_| context),
            kv_cache: self.kv_cache.or_else(|| self.measured_context.map(|_| CacheType::F32)),
            gpu_layers: self.gpu_layers,
            rows: self.rows,
            ..PlanRequest::default()
        };
        let mut plan = Plan::new(requirements, &machine, &request)?;
        let mut notes = Vec::new();
        // A GPU that was found once may be gone.
        let gone = plan.placement.devices().find_map(|device| DeviceName::open_planned(device, host).err());
        if let Some(problem) = gone {
            if config.strict.no_fallback {
                return Err(EngineError::StrictPlan(problem));
            }
            let note =
                format!("{problem}: the CPU computes (`bitnet plan --measure afresh` looks for GPUs again)");
            on_event(OpenEvent::Warning(note.clone()));
            notes.push(note);
            plan = Plan::new(
                requirements,
                &machine,
                &PlanRequest { device: Some(CPU.into()), gpu_layers: None, ..request },
            )?;
        }
        if !plan.fits && !plan.fallback {
            let reason = plan.reasons.first().map_or("the model does not fit", String::as_str);
            on_event(OpenEvent::Warning(reason.to_owned()));
        }
        config.threads = plan.settings.threads;
        Ok(Place { host, placement: plan.placement.clone(), plan: Some(plan), notes })
    }

    /// The placement of [`gpu_layers`](Self::gpu_layers); `None` where a plan finds it.
    fn gpu_placement(
        &self,
        n: usize,
        layers: usize,
        spec: &DeviceSpec,
        cache_dir: Option<&Path>,
    ) -> Result<Option<Placement>, EngineError> {
        let refuse = |problem: String| Err(EngineError::GpuLayers { layers: n, problem });
        if n > layers {
            return refuse(format!("the model has {layers} layers"));
        }
        let DeviceSpec::On(parts) = spec else { return Ok(None) };
        match &parts[..] {
            [(name, None)] if !name.kind.is_host() => Ok(Some(split(&name.to_string(), n, layers))),
            [_] if n == 0 => Ok(Some(Placement::cpu_only(layers))),
            [_] if devices::runtimes().is_empty() => refuse(
                "this build computes on no GPU; build with `cargo build --release --features wgpu`".into(),
            ),
            // The CPU was not asked for: it is the default. Layers go to the GPU that a plan would take.
            [_] if self.device.is_none() => {
                let machine = MachineProfile::detect(cache_dir, Measure::Missing, None);
                match machine.gpu(None) {
                    Some(gpu) => Ok(Some(split(&gpu.device, n, layers))),
                    None => {
                        let problems: String = machine.problems.iter().map(|p| format!(": {p}")).collect();
                        refuse(format!("there is no usable GPU here{problems}"))
                    }
                }
            }
            [(_, None)] => refuse(format!("the device {spec} is no GPU")),
            _ => refuse(format!("the devices {spec} say it already")),
        }
    }
}

/// That a draft model can guess for a model with this tokenizer on these devices.
fn check_draft(
    draft: &Engine,
    tokenizer: Option<&Tokenizer>,
    devices: &[(String, Device)],
) -> Result<(), EngineError> {
    let host = devices.iter().all(|(_, device)| ops::is_host(device));
    if !host || !draft.model().is_host() {
        return Err(EngineError::DraftDevice);
    }
    let tokenizer = tokenizer.ok_or(EngineError::DraftNoTokenizer { of: "model" })?;
    let of_draft = draft.tokenizer().ok_or(EngineError::DraftNoTokenizer { of: "draft model" })?;
    // What only one of them has at its end fills its embedding up.
    let both = tokenizer.vocab_size().min(of_draft.vocab_size()) as u32;
    let differs = |id| match (tokenizer.token(id), of_draft.token(id)) {
        (Some(model), Some(draft)) if model != draft => {
            Some(EngineError::DraftTokenizer { id, model, draft })
        }
        _ => None,
    };
    (0..both).find_map(differs).map_or(Ok(()), Err)
}

/// The thread that packs what computes in place.
#[derive(Debug)]
pub(super) struct Packer {
    stop: Arc<AtomicBool>,
}

impl Packer {
    fn start(packings: Packings) -> Option<Self> {
        if packings.is_empty() {
            return None;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("packing".into());
        match thread.spawn(move || packings.run(&stopped)) {
            Ok(_) => Some(Self { stop }),
            Err(error) => {
                tracing::warn!(
                    "weights are read where they lie: the thread that packs them can't be started: {error}"
                );
                None
            }
        }
    }
}

impl Drop for Packer {
    /// The thread ends with the matrix that it packs. Nobody waits for it.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Where a model is to be.
struct Place {
    /// The host's device that was named.
    host: Option<DeviceKind>,
    placement: Placement,
    /// What chose it, if a plan did.
    plan: Option<Plan>,
    notes: Vec<String>,
}

/// The first layers on a GPU; with all of them, everything.
fn split(gpu: &str, on_gpu: usize, layers: usize) -> Placement {
    if on_gpu == layers {
        Placement::gpu_only(gpu, layers)
    } else {
        Placement::hybrid(gpu, on_gpu, layers - on_gpu)
    }
}

/// An error with its causes, on one line.
fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = error.source();
    }
    line
}
