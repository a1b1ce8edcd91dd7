//! Trains BitNet models with Burn, and writes models in the formats that others read.
//!
//! - [`Trainer`]: from text to checkpoints, with the recipe of the BitNet b1.58 reports.
//! - [`export`]: checkpoints from one format to another.

mod config;
mod data;
pub mod export;
mod metrics;
mod store;
mod trainer;

pub use config::{
    DataOptions, Documents, ModelOptions, OptimizerOptions, RunOptions, TokenizerOptions, TrainConfig,
};
pub use data::{Corpus, Dataset, END_OF_TEXT, Epoch, Window};
pub use metrics::{Curve, Metrics, Row as MetricsRow, plot};
pub(crate) use store::has_checkpoints;
pub use store::{checkpoints, config_of, is_run, newest};
pub use trainer::*;

// The example of the README runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
