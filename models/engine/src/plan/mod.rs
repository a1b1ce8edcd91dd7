//! Where a model should run on a machine, and how fast it will be, before anything is loaded.
//!
//! A [`MachineProfile`] and the [`Requirements`] of a model's headers, both plain data, give a [`Plan`]: which layers on
//! which device, threads, context, type of the KV cache, rows at once, with the memory that each device needs, a
//! predicted speed and the reasons in words. Nothing is tried out, so a plan for another machine is made the same way.
//!
//! How one is chosen: every sensible combination of devices, KV cache, context and rows is a candidate. Those that don't
//! fit the memory are out. Of the others, the [`Strategy`] takes the fastest by [`Prediction`]; of those about as fast the
//! one with the longer context, then with the more exact KV cache. So precision is given up when memory asks for it, and
//! context when precision was not enough.
//!
//! ```no_run
//! use bitnet_burn_engine::load::HeadMode;
//! use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
//! use bitnet_burn_engine::plan::{MachineProfile, Measure, Plan, Requirements, PlanRequest};
//!
//! let checkpoint = Checkpoint::open("model.gguf".as_ref(), &OpenOptions::default())?;
//! let model = Requirements::of(&checkpoint, HeadMode::File)?;
//! let machine = MachineProfile::detect(None, Measure::Missing, None);
//! println!("{}", Plan::new(&model, &machine, &PlanRequest::default())?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod choose;
mod execute;
mod explain;
mod machine;
mod placement;
mod predict;
mod requirements;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use self::choose::COMMON_CONTEXT;
pub use self::execute::PlacedModel;
pub use self::machine::{
    CpuProfile, CpuRate, GpuProfile, MachineProfile, Measure, MemoryProfile, ProfileError,
};
pub use self::placement::{Placement, PlacementKind, Stage};
pub use self::predict::{Basis, Comparison, Prediction, PredictionOutcome};
pub use self::requirements::{DenseBytes, DeviceClass, ForwardSize, Requirements};
use bitnet_burn::CacheType;
pub use bitnet_burn_manager::cpu::Cache;

/// The name of host memory and the CPU in placements.
pub const CPU: &str = "cpu";

/// What a plan is to be good at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Speed, with all cores and almost all memory.
    #[default]
    Performance,
    /// Few bytes: the smallest KV cache, few rows at once.
    Memory,
    /// One device alone, and no more threads than reach 90 % of the speed.
    PowerEfficiency,
    /// Speed, but a core and a quarter of the memory are left to other programs.
    Balanced,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Performance, Self::Memory, Self::PowerEfficiency, Self::Balanced];

    /// Its name: `performance`, `memory`, `power-efficiency`, `balanced`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Performance => "performance",
            Self::Memory => "memory",
            Self::PowerEfficiency => "power-efficiency",
            Self::Balanced => "balanced",
        }
    }
}

/// What is fixed beforehand; what is `None` is planned.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PlanRequest {
    /// What matters.
    pub strategy: Strategy,
    /// Compute there: `cpu`, a GPU (`wgpu:0`), or the best GPU of a runtime (`wgpu`).
    pub device: Option<String>,
    /// So many layers on the GPU; all of them: embedding and output, too.
    pub gpu_layers: Option<usize>,
    /// Threads of the kernels.
    pub threads: Option<usize>,
    /// Bytes of main memory that may be used.
    pub memory: Option<u64>,
    /// The part of a GPU's memory that may be used, above 0 and at most 1.
    pub gpu_memory_fraction: Option<f64>,
    /// Positions of the KV cache.
    pub context: Option<usize>,
    /// Type of the KV cache.
    pub kv_cache: Option<CacheType>,
    /// Rows of a prompt at once.
    pub rows: Option<usize>,
}

/// PlanRequest that can't be met on a machine, whatever the plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The device is not there.
    #[error("the device {device} is not there; there are {there}")]
    NoDevice {
        /// What was asked for.
        device: String,
        /// What there is.
        there: String,
    },
    /// Layers for a GPU, and the CPU asked for or no GPU there.
    #[error("{layers} layers on a GPU were asked for, and {problem}")]
    GpuLayers {
        /// What was asked for.
        layers: usize,
        /// Why not.
        problem: String,
    },
    /// A number out of its range.
    #[error("{what} is {found}; it must be {expected}")]
    Range {
        /// The wish.
        what: &'static str,
        /// Its value.
        found: String,
        /// What is possible.
        expected: String,
    },
}

/// What a model is run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RunSettings {
    /// Threads of the kernels.
    pub threads: usize,
    /// Positions of the KV cache.
    pub context: usize,
    /// Its type.
    pub kv_cache: CacheType,
    /// Rows of a prompt at once.
    pub rows: usize,
}

/// What a device's memory is for, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    /// `cpu`, or a GPU.
    pub device: String,
    /// Ternary weights, norms, embedding and output. On the CPU they are in the page cache as far as kernels read
    /// them where the file has them.
    pub weights: u64,
    /// The KV cache of one sequence that fills the context.
    pub kv_cache: u64,
    /// Activations of the rows of a forward pass.
    pub activations: u64,
    /// What operations need beside their operands.
    pub workspace: u64,
    /// What may be used; absent where nobody knows, or it does not matter any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<u64>,
}

impl DeviceMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        [self.weights, self.kv_cache, self.activations, self.workspace]
            .into_iter()
            .fold(0, u64::saturating_add)
    }

    /// Whether the budget, if there is one, is kept.
    pub fn fits(&self) -> bool {
        self.budget.is_none_or(|budget| self.total() <= budget)
    }
}

/// How it feels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Much faster than people read: at least 20 tokens a second.
    Fast,
    /// As fast as people read: at least 5.
    Interactive,
    /// For who can wait: at least 1.
    Slow,
    /// For a night.
    Offline,
    /// Nothing was measured that it could be told from.
    Unknown,
}

impl Tier {
    /// Of a predicted speed in tokens a second.
    pub fn of(decode: Option<f64>) -> Self {
        match decode {
            None => Self::Unknown,
            Some(rate) if rate >= 20.0 => Self::Fast,
            Some(rate) if rate >= 5.0 => Self::Interactive,
            Some(rate) if rate >= 1.0 => Self::Slow,
            Some(_) => Self::Offline,
        }
    }
}

/// Another way, and why it was not taken.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alternative {
    /// Its placement.
    pub placement: Placement,
    /// Type of its KV cache.
    pub kv_cache: CacheType,
    /// Its context.
    pub context: usize,
    /// What it would give.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<f64>,
    /// Why not.
    pub why_not: String,
}

/// Where and how to run a model on a machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// What it was to be good at.
    pub strategy: Strategy,
    /// Whether the model fits the memory. A plan that does not is the smallest that could be made.
    pub fits: bool,
    /// Whether it is the careful one for a machine that could not be looked at.
    pub fallback: bool,
    /// Which layers where.
    pub placement: Placement,
    /// The same in a word.
    pub kind: PlacementKind,
    /// Threads, context, KV cache and rows.
    #[serde(flatten)]
    pub settings: RunSettings,
    /// The part of a GPU's memory that may be used.
    pub gpu_memory_fraction: f64,
    /// Sequences of that context that fit beside each other; absent where memory is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequences: Option<u64>,
    /// What each device's memory is for.
    pub memory: Vec<DeviceMemory>,
    /// How fast it will be; absent where a device was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// The same in a word.
    pub tier: Tier,
    /// Why it is this one, in sentences.
    pub reasons: Vec<String>,
    /// Other ways.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<Alternative>,
}

impl Placement {
    /// Sequences of the settings' context that its devices have memory for beside each other; `None` where nobody knows
    /// how much there is.
    pub fn sequences(
        &self,
        model: &Requirements,
        machine: &MachineProfile,
        settings: &RunSettings,
    ) -> Option<u64> {
        choose::sequences(model, machine, self, settings)
    }
}

impl Plan {
    /// The best one for a model on a machine. Where nothing fits, or the machine could not be looked at, it says so
    /// ([`fits`](Self::fits), [`fallback`](Self::fallback), [`reasons`](Self::reasons)).
    ///
    /// # Errors
    /// If a wish names what is not there, or can't be.
    pub fn new(
        model: &Requirements,
        machine: &MachineProfile,
        request: &PlanRequest,
    ) -> Result<Self, PlanError> {
        choose::choose(model, machine, request)
    }
}
