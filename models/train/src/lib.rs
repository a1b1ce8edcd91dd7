//! Trains BitNet models with Burn, and writes models in the formats that others read.
//!
//! - [`Trainer`]: from text to checkpoints, with the recipe of the BitNet b1.58 reports.
//! - [`export`]: checkpoints from one format to another.

mod calibrate;
mod config;
mod corpus;
mod data;
mod distill;
mod error;
pub mod export;
mod lora;
mod memory;
mod metrics;
mod optimizer;
mod origin;
mod recompute;
mod sft;
mod store;
mod trainer;
mod watch;

pub use calibrate::LayerFit;
pub use config::{
    DataOptions, DistillOptions, Documents, Initial, LoraOptions, ModelOptions, OptimizerOptions, RunOptions,
    Task, TokenizerOptions, TrainConfig,
};
pub use corpus::{BadRow, Corpus};
pub(crate) use data::Vocabulary;
pub use data::{Batch, Dataset, END_OF_TEXT, Epoch, Window};
pub use error::TrainError;
pub use memory::MemoryPlan;
pub use metrics::{Curve, Metrics, Row as MetricsRow, plot};
pub(crate) use store::has_checkpoints;
pub use store::{checkpoints, config_of, is_run, newest};
pub use trainer::*;
pub use watch::Sample;

// The example of the README runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
