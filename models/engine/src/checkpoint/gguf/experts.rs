//! Experts and sliding windows, from keys.
//!
//! The keys are llama.cpp's. It renormalises the weights of a row's experts in every file of these architectures but `qwen2moe`,
//! in none of whose files it does.

use super::super::error::LoadError;
use super::config::Keys;
use super::names::{MAPLE, QWEN2MOE, QWEN3MOE};
use bitnet_burn::{Experts, SlidingWindows};
use bitnet_burn_formats::gguf::Value;

/// Keys of other mixtures that would change the result, and the numbers that change nothing. 1 is softmax.
const NEUTRAL: [(&str, &[f64]); 8] = [
    ("expert_shared_count", &[0.0]),
    (SHARED_SIZE, &[0.0]),
    ("expert_weights_scale", &[0.0, 1.0]),
    ("expert_gating_func", &[0.0, 1.0]),
    ("expert_group_count", &[0.0, 1.0]),
    ("expert_group_used_count", &[0.0, 1.0]),
    ("leading_dense_block_count", &[0.0]),
    ("moe_every_n_layers", &[0.0, 1.0]),
];

/// The width of the shared expert.
const SHARED_SIZE: &str = "expert_shared_feed_forward_length";

/// Whether a model of the architecture has experts.
pub(super) fn has_experts(architecture: &str) -> bool {
    matches!(architecture, QWEN2MOE | QWEN3MOE | MAPLE)
}

/// The experts of the architectures that have some.
pub(super) fn experts(
    keys: &Keys<'_>,
    architecture: &str,
    intermediate_size: Option<usize>,
) -> Result<Option<Experts>, LoadError> {
    if !has_experts(architecture) {
        return Ok(None);
    }
    let has_shared = architecture == QWEN2MOE;
    for (suffix, neutral) in NEUTRAL.into_iter().filter(|(suffix, _)| !(has_shared && *suffix == SHARED_SIZE))
    {
        let Some((key, value)) = keys.find(suffix) else { continue };
        let found = value.as_f64().or(value.as_u64().map(|v| v as f64));
        if !found.is_some_and(|found| neutral.contains(&found)) {
            return Err(keys.unsupported(
                key,
                value,
                &format!("{}, or no such key", neutral[neutral.len() - 1]),
            ));
        }
    }
    if let Some((key, value)) = keys.find("expert_weights_norm")
        && value.as_bool() != Some(!has_shared)
    {
        return Err(keys.unsupported(key, value, &format!("{}, or no such key", !has_shared)));
    }
    // As llama.cpp does, where the key is missing.
    let shared = match has_shared {
        true => Some(keys.size(SHARED_SIZE)?.or(intermediate_size).ok_or_else(|| keys.missing(SHARED_SIZE))?),
        false => None,
    };
    let used = keys.required_size("expert_used_count")?;
    let intermediate_size = match (keys.size("expert_feed_forward_length")?, intermediate_size) {
        (Some(size), _) => size,
        // As llama.cpp does.
        (None, Some(size)) if architecture != MAPLE && used > 0 => size / used,
        _ => return Err(keys.missing("expert_feed_forward_length")),
    };
    let count = keys.required_size("expert_count")?;
    let (renormalise, dense_layers) = (!has_shared, Vec::new());
    Ok(Some(Experts { count, used, intermediate_size, renormalise, shared, dense_layers }))
}

/// The sliding windows of Maple.
pub(super) fn windows(
    keys: &Keys<'_>,
    architecture: &str,
    n_layers: usize,
) -> Result<Option<SlidingWindows>, LoadError> {
    if architecture != MAPLE {
        return Ok(None);
    }
    const PATTERN: &str = "attention.sliding_window_pattern";
    let (key, value) = keys.find(PATTERN).ok_or_else(|| keys.missing(PATTERN))?;
    let array = value.as_array().filter(|array| array.len() == n_layers);
    let layers: Option<Vec<bool>> = array.and_then(|array| array.iter().map(|flag| flag.as_bool()).collect());
    let layers = layers
        .ok_or_else(|| keys.wrong(key, value, "an array of bool, one for each layer: true is sliding"))?;
    let positions = match layers.contains(&true) {
        true => keys.required_size("attention.sliding_window")?,
        false => 1, // of no layer
    };
    Ok(Some(SlidingWindows { positions, layers, global_rope: false }))
}

/// By layer: what Maple limits gates and their factors to. llama.cpp takes up to a millionth for no limit.
pub(super) fn swiglu_clamp(
    keys: &Keys<'_>,
    architecture: &str,
    n_layers: usize,
) -> Result<Vec<f32>, LoadError> {
    const KEY: &str = "swiglu_clamp_exp";
    let Some((key, value)) = keys.find(KEY) else {
        return if architecture == MAPLE { Err(keys.missing(KEY)) } else { Ok(Vec::new()) };
    };
    if architecture != MAPLE {
        return Err(keys.unsupported(key, value, "no such key"));
    }
    let clamps = match value {
        Value::Array(array) => array.to_f32(),
        // The pattern of windows, which was read before, has as many layers.
        value => value.as_f64().map(|clamp| vec![clamp as f32; n_layers]),
    };
    let clamps = clamps.filter(|clamps| clamps.len() == n_layers);
    let clamps = clamps.ok_or_else(|| keys.wrong(key, value, "a number, or one for each layer"))?;
    Ok(clamps.into_iter().map(|clamp| if (0.0..=1e-6).contains(&clamp) { 0.0 } else { clamp }).collect())
}
