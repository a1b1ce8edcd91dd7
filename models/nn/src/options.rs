//! What layers may have that BitNet's have not: experts, sliding windows and gated DeltaNets.

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
    /// Width of the feed-forward network that every row passes beside its experts, weighted by the sigmoid of a gate, where
    /// there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<usize>,
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

/// Gated DeltaNets in place of the attention of some layers (arXiv 2412.06464; Qwen3.5).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaNet {
    /// By layer: whether it has one. The others have attention.
    pub layers: Vec<bool>,
    /// Heads of queries and of keys.
    pub key_heads: usize,
    /// Heads of values: a multiple of `key_heads`.
    pub value_heads: usize,
    /// Values of a query or key head.
    pub key_dim: usize,
    /// Values of a value head.
    pub value_dim: usize,
    /// Rows that the convolution before it sees: its own, and those before it.
    pub taps: usize,
    /// Whether value head j reads key head j % key_heads, as in GGUF files. Otherwise it reads
    /// j / (value_heads / key_heads), as in Hugging Face's.
    pub tiled: bool,
    /// Of a tiled one: whether the output projection takes the value heads in Hugging Face's order.
    pub grouped_output: bool,
}

impl Experts {
    /// What no model can have.
    pub(crate) fn problem(&self, n_layers: usize) -> Option<String> {
        let Self { count, used, intermediate_size, shared, dense_layers, .. } = self;
        for (name, value, max) in [
            ("experts", *count, limit::EXPERTS),
            ("experts for a row", *used, *count),
            ("values between the projections of an expert", *intermediate_size, limit::INTERMEDIATE),
            ("values between the projections of the shared expert", shared.unwrap_or(1), limit::INTERMEDIATE),
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

impl DeltaNet {
    /// Inputs of the convolution: queries, keys and values side by side.
    pub fn channels(&self) -> usize {
        self.key_heads.saturating_mul(self.key_dim).saturating_mul(2).saturating_add(self.values())
    }

    /// Values of all value heads.
    pub fn values(&self) -> usize {
        self.value_heads.saturating_mul(self.value_dim)
    }

    /// What no model can have.
    pub(crate) fn problem(&self, n_layers: usize) -> Option<String> {
        let Self { layers, key_heads, value_heads, key_dim, value_dim, taps, tiled, grouped_output } = self;
        if layers.len() != n_layers {
            let found = layers.len();
            return Some(format!("says for {found} layers whether they have one; the model has {n_layers}"));
        }
        for (name, value, min, max) in [
            ("key heads", *key_heads, 1, limit::HEADS),
            ("value heads", *value_heads, 1, limit::HEADS),
            ("values of a key head", *key_dim, 1, limit::HEAD_DIM),
            ("values of a value head", *value_dim, 1, limit::HEAD_DIM),
            ("taps of the convolution", *taps, 2, limit::TAPS),
            ("channels", self.channels(), 1, limit::INTERMEDIATE),
        ] {
            if !(min..=max).contains(&value) {
                return Some(format!("has {value} {name}; there must be between {min} and {max}"));
            }
        }
        if !value_heads.is_multiple_of(*key_heads) {
            return Some(format!("has {value_heads} value heads, which {key_heads} key heads do not divide"));
        }
        (*grouped_output && !tiled).then(|| "has grouped outputs of heads that are not tiled".into())
    }
}
