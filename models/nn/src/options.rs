//! What layers may have that BitNet's have not: experts and sliding windows.

use serde::{Deserialize, Serialize};

use crate::config::limit;

/// A mixture of experts in place of each feed-forward network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Experts of a layer.
    pub count: usize,
    /// Experts that compute a row.
    pub used: usize,
    /// Width of an expert's feed-forward network.
    pub intermediate_size: usize,
    /// Whether the weights of a row's experts are divided by their sum.
    pub renormalise: bool,
    /// Layers that have a feed-forward network of their own, of the model's `intermediate_size`, and no experts; ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dense_layers: Vec<usize>,
}

/// Sliding windows in the attention of some layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlidingWindows {
    /// Positions that a row sees: its own and those right before it.
    pub positions: usize,
    /// By layer: whether it has the window. The others, which are called global, see all earlier positions.
    pub layers: Vec<bool>,
    /// Whether the global layers turn queries and keys by RoPE. Without, they know no positions.
    pub global_rope: bool,
}

impl Experts {
    /// What no model can have.
    pub(crate) fn problem(&self, n_layers: usize) -> Option<String> {
        let Self { count, used, intermediate_size, dense_layers, .. } = self;
        for (name, value, max) in [
            ("experts", *count, limit::EXPERTS),
            ("experts for a row", *used, *count),
            ("values between the projections of an expert", *intermediate_size, limit::INTERMEDIATE),
        ] {
            if value == 0 || value > max {
                return Some(format!("has {value} {name}; there must be between 1 and {max}"));
            }
        }
        if !dense_layers.is_sorted_by(|a, b| a < b) {
            return Some("has layers without experts that are not in ascending order".into());
        }
        let layer = dense_layers.iter().find(|&&layer| layer >= n_layers)?;
        Some(format!("has layer {layer} without experts; the model has {n_layers} layers"))
    }
}

impl SlidingWindows {
    /// What no model can have.
    pub(crate) fn problem(&self, n_layers: usize) -> Option<String> {
        let Self { positions, layers, .. } = self;
        if *positions == 0 || *positions > limit::CONTEXT {
            let max = limit::CONTEXT;
            return Some(format!("has a window of {positions} positions; there must be between 1 and {max}"));
        }
        let (found, differ) = (layers.len(), layers.len() != n_layers);
        differ.then(|| {
            format!("says for {found} layers whether they have the window; the model has {n_layers}")
        })
    }
}
