//! Gated DeltaNets, from `config.json`. The keys are those of transformers' Qwen3.5.

use super::super::error::LoadError;
use super::fields::{Fields, QWEN3_5};
use bitnet_burn::DeltaNet;
use serde_json::Value;

/// The DeltaNets of the model type that has some.
pub(super) fn delta_net(
    fields: Fields<'_>,
    architecture: &str,
    n_layers: usize,
) -> Result<Option<DeltaNet>, LoadError> {
    if architecture != QWEN3_5 {
        return Ok(None);
    }
    const KEY: &str = "layer_types";
    let types = fields.get(KEY).ok_or_else(|| fields.missing(KEY))?;
    let is_linear = |value: &Value| match value.as_str() {
        Some("linear_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let layers =
        types.as_array().and_then(|types| types.iter().map(is_linear).collect::<Option<Vec<bool>>>());
    let layers = layers.filter(|layers| layers.len() == n_layers);
    let expected = "a list of \"linear_attention\" and \"full_attention\", one for each layer";
    Ok(Some(DeltaNet {
        layers: layers.ok_or_else(|| fields.wrong(KEY, types, expected))?,
        key_heads: fields.required_size("linear_num_key_heads")?,
        value_heads: fields.required_size("linear_num_value_heads")?,
        key_dim: fields.required_size("linear_key_head_dim")?,
        value_dim: fields.required_size("linear_value_head_dim")?,
        taps: fields.required_size("linear_conv_kernel_dim")?,
        tiled: false,
        grouped_output: false,
    }))
}
