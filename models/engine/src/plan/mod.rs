//! Where a model should run on a machine, and how fast it will be, before anything is loaded.
//!
//! A [`MachineProfile`] and the [`Requirements`] of a model's headers, both plain data, give a [`Plan`]: which layers on
//! which device, threads, context, type of the KV cache, rows at once, with the memory that each device needs, a
//! predicted speed and the reasons as sentences. Nothing is tried out, so a plan for another machine is made the same way.
//!
//! Every sensible combination of devices, KV cache, context and rows is a candidate. Candidates that don't fit into memory
//! are dropped. Of the others, the [`Strategy`] takes the fastest by [`Prediction`]; among about equally fast ones it takes
//! the longest context, then the most exact KV cache. So when memory is short, the KV cache becomes less exact first, and
//! the context becomes shorter second.
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

/// What a plan optimises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The highest speed, with all cores and almost all memory.
    #[default]
    Performance,
    /// The least memory: the smallest KV cache and few rows at once.
    Memory,
    /// A single device, and no more threads than needed for 90 % of the speed.
    PowerEfficiency,
    /// High speed, but one core and a quarter of the memory stay free for other programs.
    Balanced,
}

impl Strategy {
    /// All strategies.
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

/// What the caller fixes. The plan chooses every value that is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PlanRequest {
    /// What the plan optimises.
    pub strategy: Strategy,
    /// The device: `cpu`, a GPU (`wgpu:0`), or the best GPU of a runtime (`wgpu`).
    pub device: Option<String>,
    /// Number of layers on the GPU. With all layers, the embedding and the output projection are on the GPU, too.
    pub gpu_layers: Option<usize>,
    /// Number of threads that run the kernels.
    pub threads: Option<usize>,
    /// Bytes of main memory that the model may use.
    pub memory: Option<u64>,
    /// Fraction of a GPU's memory that the model may use, above 0 and at most 1.
    pub gpu_memory_fraction: Option<f64>,
    /// Positions of the KV cache.
    pub context: Option<usize>,
    /// Type of the KV cache.
    pub kv_cache: Option<CacheType>,
    /// Rows of a prompt that are computed at once.
    pub rows: Option<usize>,
}

/// Why no plan can satisfy a [`PlanRequest`] on a machine.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The machine lacks the requested device.
    #[error("there is no device {device}; this machine has {there}")]
    NoDevice {
        /// The requested device.
        device: String,
        /// The devices that the machine has.
        there: String,
    },
    /// The requested number of layers can't be on a GPU.
    #[error("cannot place {layers} layers on a GPU: {problem}")]
    GpuLayers {
        /// The requested number of layers.
        layers: usize,
        /// The reason.
        problem: String,
    },
    /// A value is out of its range.
    #[error("{what} is {found}; it must be {expected}")]
    Range {
        /// The name of the value.
        what: &'static str,
        /// The requested value.
        found: String,
        /// The possible values.
        expected: String,
    },
}

/// The settings that a model runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RunSettings {
    /// Number of threads that run the kernels.
    pub threads: usize,
    /// Positions of the KV cache.
    pub context: usize,
    /// Type of the KV cache.
    pub kv_cache: CacheType,
    /// Rows of a prompt that are computed at once.
    pub rows: usize,
}

/// Memory that a device needs, by purpose, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMemory {
    /// `cpu`, or a GPU.
    pub device: String,
    /// Ternary weights, norms, embedding and output projection. On the CPU, weights that kernels read directly from the
    /// mapped file are in the page cache.
    pub weights: u64,
    /// The KV cache of one sequence that fills the context.
    pub kv_cache: u64,
    /// Activations of all rows of a forward pass.
    pub activations: u64,
    /// Temporary memory of the operations.
    pub workspace: u64,
    /// The limit; absent if it is unknown, or if the model runs already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<u64>,
}

impl DeviceMemory {
    /// The sum of all purposes.
    pub fn total(&self) -> u64 {
        [self.weights, self.kv_cache, self.activations, self.workspace]
            .into_iter()
            .fold(0, u64::saturating_add)
    }

    /// Whether the sum is within the budget. True without a budget.
    pub fn fits(&self) -> bool {
        self.budget.is_none_or(|budget| self.total() <= budget)
    }
}

/// Speed class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// At least 20 tokens a second: much faster than people read.
    Fast,
    /// At least 5 tokens a second: as fast as people read.
    Interactive,
    /// At least 1 token a second.
    Slow,
    /// Less than 1 token a second. For work that runs overnight.
    Offline,
    /// Unknown, because a device was not measured.
    Unknown,
}

impl Tier {
    /// The class of a predicted decode speed in tokens a second.
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

/// Another placement, and why the plan did not choose it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alternative {
    /// The placement.
    pub placement: Placement,
    /// Type of the KV cache.
    pub kv_cache: CacheType,
    /// Positions of the KV cache.
    pub context: usize,
    /// Predicted decode speed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<f64>,
    /// Why the plan did not choose it.
    pub why_not: String,
}

/// Where and how to run a model on a machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// What the plan optimises.
    pub strategy: Strategy,
    /// Whether the model fits into memory. If not, this is the plan that needs the least memory.
    pub fits: bool,
    /// Whether this is the careful plan for a machine whose memory or cores are unknown.
    pub fallback: bool,
    /// Which layers are on which device.
    pub placement: Placement,
    /// What kinds of devices the placement uses.
    pub kind: PlacementKind,
    /// Threads, context, KV cache and rows.
    #[serde(flatten)]
    pub settings: RunSettings,
    /// Fraction of a GPU's memory that the model may use.
    pub gpu_memory_fraction: f64,
    /// Number of sequences with this context that fit at the same time; absent if the memory is unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequences: Option<u64>,
    /// Memory that each device needs.
    pub memory: Vec<DeviceMemory>,
    /// Predicted speed; absent if a device was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// Speed class of the prediction.
    pub tier: Tier,
    /// The reasons for this plan, as sentences.
    pub reasons: Vec<String>,
    /// Placements that the plan did not choose.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<Alternative>,
}

impl Placement {
    /// Number of sequences of the settings' context for which its devices have memory at the same time; `None` if the
    /// memory is unknown.
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
    /// Plans a model on a machine. If nothing fits, or the machine's memory or cores are unknown, the plan says so
    /// ([`fits`](Self::fits), [`fallback`](Self::fallback), [`reasons`](Self::reasons)).
    ///
    /// # Errors
    /// If the request names a device that the machine lacks, or a value that is out of its range.
    pub fn new(
        model: &Requirements,
        machine: &MachineProfile,
        request: &PlanRequest,
    ) -> Result<Self, PlanError> {
        choose::choose(model, machine, request)
    }
}
