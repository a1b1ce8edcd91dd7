//! What tuning measured of a kernel, as the cache keeps it.

use serde::{Deserialize, Serialize};

/// How fast one kernel was for one signature.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measurement {
    /// `plugin@version/kernel`, with the file's hash where there is a file.
    pub kernel: String,
    /// Median time of one matmul in nanoseconds; `None` if it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub median_ns: Option<u64>,
    /// Its fastest run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_ns: Option<u64>,
    /// Counted runs.
    #[serde(default)]
    pub runs: u32,
    /// Why it was not measured, or stopped early.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Its results were wrong.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rejected: bool,
}

impl Measurement {
    /// Nothing measured yet, of the kernel of this name.
    pub(super) fn none(kernel: String) -> Self {
        Self { kernel, median_ns: None, min_ns: None, runs: 0, note: None, rejected: false }
    }
}

/// Where a ranking comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Measured in this process.
    Measured,
    /// Measured earlier, on this machine, with the same candidates.
    Cached,
    /// There is nothing to compare: one candidate, or none.
    OnlyCandidate,
    /// The tuning budget was spent; taken from the measurement for this many rows, or, for 0, the
    /// order of registration.
    Nearest(usize),
}
