//! The report of a measurement, as `bitnet bench --json` prints it and as it reads back.

use bitnet_burn::ModelConfig;
use serde::{Deserialize, Serialize};

use super::BenchResult;
use crate::device_bench::DeviceBench;
use crate::report::{Execution, ModelSummary};

/// What was measured, of which model, and what computed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BenchReport {
    /// [`SCHEMA`](crate::report::SCHEMA).
    pub schema: u32,
    /// The model.
    pub model: ModelSummary,
    /// Its configuration.
    pub config: ModelConfig,
    /// Seconds from opening the files until the model was ready.
    pub load_seconds: f64,
    /// The measurements.
    #[serde(flatten)]
    pub result: BenchResult,
    /// The measurements of a GPU by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_suite: Option<DeviceBench>,
    /// Devices and kernels.
    #[serde(flatten)]
    pub execution: Execution,
}
