//! An engine: a model that was opened, with its tokenizer, its kernels and its place on the devices.
//!
//! ```
//! use bitnet_burn_engine::{Engine, GenerateOptions};
//!
//! # #[cfg(feature = "default-model")] {
//! let engine = Engine::options().open_built_in()?;
//! let options = GenerateOptions { max_new_tokens: 8, ..engine.generate_options() };
//! let mut session = engine.session()?;
//! let mut text = session.generate("There was", &options)?;
//! for piece in &mut text {
//!     print!("{}", piece?);
//! }
//! println!("\n{}", text.finish().report);
//! # }
//! # Ok::<(), bitnet_burn_engine::EngineError>(())
//! ```

mod error;
mod open;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bitnet_burn::{ActivationRule, BitBlock, BitLinear, BitLinearWeight, BitNet, KvCache};
use bitnet_burn_backends::devices;
use bitnet_burn_manager::{KernelManager, ManagerReport};
use serde::Serialize;

pub use self::error::EngineError;
pub use self::open::{EngineOptions, OpenEvent};
use crate::adapter::Adapter;
use crate::chat::{ChatError, ChatTemplate};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::constraint::{Constrained, Constraint, ConstraintError, Constraints};
use crate::device::DeviceSpec;
use crate::generate::{GenerateError, GenerateOptions, Generation};
use crate::load::HeadMode;
use crate::plan::{
    Comparison, DeviceMemory, MachineProfile, MemoryProfile, Placement, PlacementKind, Prediction,
    PredictionOutcome, Requirements, RunSettings,
};
use crate::plausible;
use crate::receipt::{GenerationRecord, ModelRecord, Receipt, TokensRecord};
use crate::report::{AdapterSummary, DeviceUsage, Execution, ModelSummary};
use crate::session::Session;
use crate::tokenizer::Tokenizer;

/// A model that is ready, with its tokenizer and its kernels. Clones share it.
#[derive(Clone, Debug)]
pub struct Engine(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    manager: &'static KernelManager,
    /// Plugins that were refused, with the reasons.
    refused: Vec<String>,
    checkpoint: Checkpoint,
    tokenizer: Option<Tokenizer>,
    /// Made when the first answer needs it.
    constraints: OnceLock<Result<Constraints, ConstraintError>>,
    model: BitNet,
    /// Guesses tokens ahead.
    draft: Option<Engine>,
    /// Packs what computes in place, until the engine is dropped.
    _packer: Option<open::Packer>,
    /// Matrices that were mapped from the file of packed weights.
    prepacked: usize,
    summary: ModelSummary,
    load_time: Duration,
    settings: RunSettings,
    head: HeadMode,
    file: OpenOptions,
    activations: ActivationRule,
    adapter: Option<Arc<Adapter>>,
    device: DeviceSpec,
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

impl Engine {
    /// How an engine is opened: with the defaults, until a method changes one.
    pub fn options() -> EngineOptions {
        EngineOptions::default()
    }

    /// Opens a GGUF file or a Hugging Face directory with the default [options](Self::options).
    ///
    /// # Errors
    /// If a file, a device or a kernel is wrong.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, EngineError> {
        Self::options().open(path)
    }

    /// A conversation, or any other sequence of prompts, with a KV cache of its own.
    ///
    /// # Errors
    /// If a device does not support the KV cache's type.
    pub fn session(&self) -> Result<Session, EngineError> {
        Session::new(self.clone(), self.cache()?)
    }

    /// An empty KV cache of this engine's context and type.
    ///
    /// # Errors
    /// If a device does not support the type.
    pub fn cache(&self) -> Result<KvCache, EngineError> {
        Ok(self.model().cache(self.0.settings.context, self.0.settings.kv_cache)?)
    }

    /// Greedy, in chunks of this engine's rows, and ending where the model ends its text.
    pub fn generate_options(&self) -> GenerateOptions {
        GenerateOptions {
            chunk: self.0.settings.rows,
            stop_tokens: self.end_tokens(),
            ..GenerateOptions::default()
        }
    }

    /// The tokens that end a text, by the tokenizer and by the model's configuration.
    pub fn end_tokens(&self) -> Vec<u32> {
        let by_tokenizer = self.tokenizer().into_iter().flat_map(|tokenizer| tokenizer.end_of_generation());
        by_tokenizer.chain(&self.checkpoint().config().eos_tokens).copied().collect()
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// If there is no tokenizer, or the text can't be encoded.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EngineError> {
        Ok(self.tokenizer().ok_or(EngineError::NoTokenizer)?.encode(text, add_special)?)
    }

    /// The chat template that came with the model.
    ///
    /// # Errors
    /// If there is none, or it is not valid.
    pub fn chat_template(&self) -> Result<ChatTemplate, EngineError> {
        let tokenizer = self.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let source = tokenizer.chat_template().ok_or(ChatError::NoTemplate)?;
        let name = format!("the chat template of {}", self.checkpoint().path().display());
        Ok(ChatTemplate::named(name, source)?)
    }

    /// Checks that answers can have this form, and compiles it for them.
    ///
    /// # Errors
    /// If there is no tokenizer, or the constraint is not valid, too large or can't be written with the model's tokens.
    pub fn check_constraint(&self, constraint: &Constraint) -> Result<(), EngineError> {
        self.constrain(Some(constraint)).map(|_| ())
    }

    /// What constrains one answer, if anything does.
    pub(crate) fn constrain(
        &self,
        constraint: Option<&Constraint>,
    ) -> Result<Option<Box<Constrained>>, EngineError> {
        let Some(constraint) = constraint else { return Ok(None) };
        let tokenizer = self.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let constraints = self.0.constraints.get_or_init(|| Constraints::new(tokenizer)).as_ref();
        let constrained = constraints.map_err(Clone::clone).and_then(|all| all.of(constraint));
        Ok(Some(Box::new(constrained.map_err(GenerateError::from)?)))
    }

    /// The model.
    pub fn model(&self) -> &BitNet {
        &self.0.model
    }

    /// The model that guesses tokens ahead, if there is one.
    pub fn draft_model(&self) -> Option<&Self> {
        self.0.draft.as_ref()
    }

    /// The files that it was read from.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.0.checkpoint
    }

    /// The adapter that is added to its projections.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.0.adapter.as_deref()
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.0.tokenizer.as_ref()
    }

    /// Threads, context, KV cache and rows.
    pub fn settings(&self) -> &RunSettings {
        &self.0.settings
    }

    /// The kernels' manager.
    pub fn manager(&self) -> &'static KernelManager {
        self.0.manager
    }

    /// What the model is, for reports.
    pub fn summary(&self) -> &ModelSummary {
        &self.0.summary
    }

    /// How activations are quantised, as an option that does not depend on this version's default: by the groups that are
    /// computed. A rule that stands for groups of several sizes, as rows and scales of weights allow, remains as it is.
    pub fn activations(&self) -> ActivationRule {
        let model = &self.0.model;
        let head = model.output.as_ref().and_then(activation_group);
        let groups: BTreeSet<_> = activation_groups(model).into_iter().chain(head).collect();
        match (self.0.activations, groups.first(), groups.last()) {
            (ActivationRule::Model, _, Some(&group)) if group > 0 => {
                ActivationRule::Group(ActivationRule::GROUP)
            }
            (ActivationRule::Group(_), Some(0), Some(0)) => ActivationRule::Row,
            (ActivationRule::Group(_), Some(first), Some(&last)) if *first == last => {
                ActivationRule::Group(last)
            }
            (rule, ..) => rule,
        }
    }

    /// Time from the start of opening to a model that is ready.
    pub fn load_time(&self) -> Duration {
        self.0.load_time
    }

    /// Which kernels have computed since the engine was opened, and where.
    pub fn execution(&self) -> Execution {
        let inner = &*self.0;
        let mut execution =
            Execution::between(&inner.device.to_string(), &inner.before, &inner.manager.report());
        execution.lm_head = Some(inner.model.head_description());
        execution.activations = activations(&inner.model);
        execution.dense_projections = dense_projections(&inner.model);
        execution.adapter = self.adapter().map(AdapterSummary::of);
        execution.prepacked = inner.prepacked;
        execution.tuning.seconds = inner.tuning.map(|time| time.as_secs_f64());
        execution.refused_plugins.clone_from(&inner.refused);
        execution.placement = (inner.placement.devices().count() > 1).then(|| inner.placement.clone());
        execution.placement_notes.clone_from(&inner.notes);
        execution.device_usage = self.device_usage();
        execution
    }

    /// What the GPUs' runtimes have of their memory.
    fn device_usage(&self) -> Vec<DeviceUsage> {
        let layers = self.model().layer_devices();
        let device = |name: &str| match self.0.placement.stages.iter().find(|stage| stage.device == name) {
            Some(stage) => layers.get(stage.layers.start).cloned(),
            None => Some(self.model().device()),
        };
        let usage = |name: &str| Some(DeviceUsage::new(name, devices::usage(&device(name)?)?));
        self.0.placement.devices().filter_map(usage).collect()
    }

    /// That there is memory for `sequences` sequences of `positions` positions beside the model, as far as that is known.
    ///
    /// # Errors
    /// [`EngineError::NoRoom`].
    pub fn check_room(&self, sequences: usize, positions: usize) -> Result<(), EngineError> {
        let inner = &*self.0;
        let machine = MachineProfile { memory: inner.memory_before, ..inner.machine.clone() };
        let rows = inner.settings.rows.max(sequences);
        let settings = RunSettings { context: positions, rows, ..inner.settings };
        match inner.placement.sequences(&inner.requirements, &machine, &settings) {
            Some(room) if (sequences as u64) > room => Err(EngineError::NoRoom {
                asked: sequences,
                room,
                positions,
                bytes: self.sequence_bytes(positions),
            }),
            _ => Ok(()),
        }
    }

    /// Bytes of the KV cache for a sequence of `positions` positions.
    pub fn sequence_bytes(&self, positions: usize) -> u64 {
        let inner = &*self.0;
        inner.requirements.sequence_bytes(inner.settings.kv_cache, positions, inner.requirements.layers)
    }

    /// Bytes of memory that were free for KV caches when the engine was opened, as far as that is known.
    pub fn cache_room(&self) -> Option<u64> {
        /// Positions of the sequences that the room is measured in.
        const PIECE: usize = 256;
        let inner = &*self.0;
        let machine = MachineProfile { memory: inner.memory_before, ..inner.machine.clone() };
        let settings = RunSettings { context: PIECE, ..inner.settings };
        let pieces = inner.placement.sequences(&inner.requirements, &machine, &settings)?;
        Some(pieces.saturating_mul(self.sequence_bytes(PIECE)))
    }

    /// What was measured, with what was predicted for it, where this machine is known: decode behind `at` positions on
    /// average.
    pub fn outcome(&self, at: usize, decode: Option<f64>, prefill: Option<f64>) -> Option<PredictionOutcome> {
        let prediction = self.0.prediction.as_ref()?;
        Some(PredictionOutcome::of(prediction, (at, self.0.settings.context), decode, prefill))
    }

    /// What memory is for on each device, with a KV cache of `kv_cache_bytes` and `rows` rows at once.
    pub fn memory(&self, kv_cache_bytes: usize, rows: usize) -> Vec<DeviceMemory> {
        let requirements = &self.0.requirements;
        let position = requirements.kv_bytes(self.0.settings.kv_cache, 1, requirements.layers).max(1);
        // The cache has the states that the requirements add, too: as they are, and as they were kept.
        let states =
            requirements.state_per_layer.saturating_mul(2).saturating_mul(requirements.layers as u64);
        let context = (kv_cache_bytes as u64).saturating_sub(states).div_ceil(position) as usize;
        requirements.memory(&self.0.placement, &RunSettings { context, rows, ..self.0.settings })
    }

    /// Remembers which share of the roofline a run on the CPU alone reached, for later plans. Runs with forced kernels or
    /// fallbacks are left out, and so are weights that fit a cache.
    ///
    /// # Errors
    /// If the cache directory can't be written.
    pub fn remember(
        &self,
        execution: &Execution,
        at: usize,
        decode: Option<f64>,
        prefill: Option<f64>,
    ) -> std::io::Result<()> {
        let inner = &*self.0;
        let config = inner.manager.config();
        let chosen = config.force.is_none() && config.masked_features.is_empty();
        if !chosen || !execution.fallbacks.is_empty() || execution.reference_calls > 0 {
            return Ok(());
        }
        let requirements = &inner.requirements;
        let bytes = requirements.layer_bytes(requirements.layers) + requirements.head_read;
        let on_cpu = inner.placement.kind() == PlacementKind::CpuOnly;
        if cfg!(debug_assertions) || !on_cpu || bytes < plausible::SMALLEST {
            return Ok(());
        }
        let machine = inner.machine.without_efficiency();
        let roofline = Prediction::of(requirements, &machine, &inner.placement, &inner.settings);
        let Some(roofline) = roofline else { return Ok(()) };
        let outcome = PredictionOutcome::of(&roofline, (at, inner.settings.context), decode, prefill);
        let ratio = |comparison: Option<Comparison>| comparison.map(|c| c.ratio);
        let (decode, prefill) = (ratio(outcome.decode), ratio(outcome.prefill));
        MachineProfile::remember(inner.cache_dir.as_deref(), inner.settings.threads, decode, prefill)
    }

    /// In strict mode, checks that the machine can have reached these figures, in tokens a second.
    ///
    /// # Errors
    /// [`EngineError::Figure`].
    pub fn check_figures(
        &self,
        execution: &Execution,
        prefill: Option<f64>,
        decode: Option<f64>,
    ) -> Result<(), EngineError> {
        if execution.strict.plausible_figures {
            plausible::check(self.model(), execution, self.manager().pool(), prefill, decode)?;
        }
        Ok(())
    }

    /// What determines a generation's tokens, and their digest, for a receipt. `sliding`: a full context forgot its
    /// oldest positions.
    pub fn generation_record(
        &self,
        prompt: &[u32],
        options: &GenerateOptions,
        sliding: bool,
        generation: &Generation,
    ) -> GenerationRecord {
        let inner = &*self.0;
        GenerationRecord {
            prompt_token_ids: prompt.to_vec(),
            max_new_tokens: options.max_new_tokens,
            sampling: options.sampling.clone(),
            stop_tokens: options.stop_tokens.clone(),
            stop_strings: options.stop_strings.clone(),
            constraint: options.constraint.clone(),
            chunk: options.chunk,
            context: inner.settings.context,
            kv_cache: inner.settings.kv_cache,
            sliding_window: sliding,
            lm_head: inner.head,
            activations: self.activations(),
            hidden_act: inner.file.hidden_act,
            pre: inner.file.pre.clone(),
            result: TokensRecord::of(generation),
        }
    }

    /// A receipt of `report`, the whole report of the subcommand `command`.
    ///
    /// # Errors
    /// If the model's files can't be read again.
    pub fn receipt(
        &self,
        command: &str,
        report: &impl Serialize,
        generation: Option<GenerationRecord>,
    ) -> std::io::Result<Receipt> {
        Receipt::new(command, self.model_record()?, report, generation)
    }

    /// The files of the model and of its adapter with their hashes, for receipts.
    ///
    /// # Errors
    /// If they can't be read again.
    pub fn model_record(&self) -> std::io::Result<ModelRecord> {
        ModelRecord::of(self.checkpoint())?.with_adapter(self.adapter())
    }
}
/// The groups of activations that share a scale in the ternary projections; 0 is a row.
fn activation_groups(model: &BitNet) -> BTreeSet<usize> {
    let layers = model.blocks.iter().flat_map(BitBlock::projections);
    layers.filter_map(|(_, layer)| activation_group(layer)).collect()
}

/// The activations that share a scale in a layer, if it is ternary; 0 is a row.
fn activation_group(layer: &BitLinear) -> Option<usize> {
    Some(layer.matrix()?.scales.activation_group())
}

/// How the activations of the ternary projections are quantised.
fn activations(model: &BitNet) -> Option<String> {
    if !model.quantises() {
        return Some("f32".into());
    }
    let of = |&group: &usize| match group {
        0 => "int8 by rows".to_owned(),
        group => format!("int8 by groups of {group}"),
    };
    let groups: Vec<_> = activation_groups(model).iter().map(of).collect();
    (!groups.is_empty()).then(|| groups.join(", "))
}

/// The projections that are computed with f32 activations, by format: `196 x Q2_0`.
fn dense_projections(model: &BitNet) -> Option<String> {
    let mut formats: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, layer) in model.blocks.iter().flat_map(BitBlock::projections) {
        if let BitLinearWeight::Dense(matrix) = &layer.weight {
            *formats.entry(matrix.args().format.name()).or_default() += 1;
        }
    }
    let formats: Vec<_> = formats.iter().map(|(format, count)| format!("{count} x {format}")).collect();
    (!formats.is_empty()).then(|| formats.join(", "))
}
