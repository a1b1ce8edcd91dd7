//! Gated DeltaNets, from llama.cpp's keys.

use super::super::error::LoadError;
use super::config::Keys;
use super::names::QWEN35;
use bitnet_burn::DeltaNet;

/// One layer of this many has attention, if the file does not say. llama.cpp's default.
const INTERVAL: usize = 4;

/// The DeltaNets of the architecture that has some.
pub(super) fn delta_net(
    keys: &Keys<'_>,
    architecture: &str,
    n_layers: usize,
) -> Result<Option<DeltaNet>, LoadError> {
    if architecture != QWEN35 {
        return Ok(None);
    }
    if let Some((key, value)) =
        keys.find("nextn_predict_layers").filter(|(_, value)| value.as_u64() != Some(0))
    {
        return Err(keys.unsupported(key, value, "0, or no such key"));
    }
    let interval = keys.size("full_attention_interval")?.unwrap_or(INTERVAL);
    let (inner, value_heads) =
        (keys.required_size("ssm.inner_size")?, keys.required_size("ssm.time_step_rank")?);
    if interval == 0 || value_heads == 0 || !inner.is_multiple_of(value_heads) {
        let suffix = if interval == 0 { "full_attention_interval" } else { "ssm.time_step_rank" };
        let (key, value) = keys.find(suffix).ok_or_else(|| keys.missing(suffix))?;
        return Err(keys.wrong(
            key,
            value,
            "a positive number, and of heads one that divides `ssm.inner_size`",
        ));
    }
    Ok(Some(DeltaNet {
        // More layers than any model has are an error that is found later.
        layers: (0..n_layers.min(1 << 16)).map(|layer| !(layer + 1).is_multiple_of(interval)).collect(),
        key_heads: keys.required_size("ssm.group_count")?,
        value_heads,
        key_dim: keys.required_size("ssm.state_size")?,
        value_dim: inner / value_heads,
        taps: keys.required_size("ssm.conv_kernel")?,
        tiled: true,
        grouped_output: false, // the keys `prism.hadamard.*` may say otherwise
    }))
}
