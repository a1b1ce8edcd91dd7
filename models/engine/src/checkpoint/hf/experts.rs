//! Experts and sliding windows, from `config.json`.
//!
//! The keys are those of transformers' Qwen2 MoE, which has a shared expert, and Qwen3 MoE. Maple has them, too, and `layer_types`, `sliding_window` and
//! `nope_on_global_attention`; no configuration of a published Maple was at hand, so that these follow llama.cpp's
//! converter.

use super::super::error::LoadError;
use super::fields::{Fields, MAPLE, QWEN2_MOE, QWEN3_MOE};
use bitnet_burn::{Experts, SlidingWindows};
use serde_json::Value;
use std::collections::BTreeSet;

/// What Maple limits gates and their factors to. Its configuration does not state it.
pub(crate) const MAPLE_CLAMP: f32 = 7.0;

/// More layers than any model has.
const MANY: usize = 1 << 16;

/// Keys of other mixtures that would change the result, and the number that changes nothing.
const NEUTRAL: [(&str, f64); 9] = [
    ("num_shared_experts", 0.0),
    ("n_shared_experts", 0.0),
    (SHARED_SIZE, 0.0),
    ("first_k_dense_replace", 0.0),
    ("moe_layer_freq", 1.0),
    ("n_group", 1.0),
    ("topk_group", 1.0),
    ("routed_scaling_factor", 1.0),
    ("swiglu_limit", MAPLE_CLAMP as f64),
];

/// The width of the shared expert.
const SHARED_SIZE: &str = "shared_expert_intermediate_size";

/// The experts of the model types that have some.
pub(super) fn experts(
    fields: Fields<'_>,
    architecture: &str,
    n_layers: usize,
) -> Result<Option<Experts>, LoadError> {
    if !matches!(architecture, QWEN2_MOE | QWEN3_MOE | MAPLE) {
        return Ok(None);
    }
    let has_shared = architecture == QWEN2_MOE;
    for (key, neutral) in NEUTRAL.into_iter().filter(|(key, _)| !(has_shared && *key == SHARED_SIZE)) {
        let other = key == "swiglu_limit" && architecture != MAPLE;
        if let Some(found) = fields.float(key)?.filter(|&found| found != neutral || other) {
            let supported = if other { "a model without it".into() } else { neutral.to_string() };
            return Err(fields.unsupported(key, &Value::from(found), &supported));
        }
    }
    for key in ["scoring_func", "score_function"] {
        if let Some(found) = fields.str(key)?.filter(|&found| found != "softmax") {
            return Err(fields.unsupported(key, &Value::from(found), "softmax"));
        }
    }
    let count = match fields.size("num_experts")? {
        Some(count) => count,
        None => fields.size("num_local_experts")?.ok_or_else(|| fields.missing("num_experts"))?,
    };
    // transformers' default; every Maple renormalises.
    let renormalise = fields.bool("norm_topk_prob")?.unwrap_or(architecture == MAPLE);
    Ok(Some(Experts {
        count,
        used: fields.required_size("num_experts_per_tok")?,
        intermediate_size: fields.required_size("moe_intermediate_size")?,
        renormalise,
        shared: if has_shared { Some(fields.required_size(SHARED_SIZE)?) } else { None },
        dense_layers: dense_layers(fields, n_layers)?,
    }))
}

/// Layers without experts: those of `mlp_only_layers`, and all but every `decoder_sparse_step`th.
fn dense_layers(fields: Fields<'_>, n_layers: usize) -> Result<Vec<usize>, LoadError> {
    let index = |v: &Value| usize::try_from(v.as_u64()?).ok();
    let stated = fields.read("mlp_only_layers", "a list of layers", |value| {
        value.as_array()?.iter().map(index).collect::<Option<BTreeSet<usize>>>()
    })?;
    let mut dense = stated.unwrap_or_default();
    let step = fields.size("decoder_sparse_step")?.unwrap_or(1);
    if step == 0 {
        return Err(fields.wrong("decoder_sparse_step", &Value::from(step), "a positive integer"));
    }
    if step > 1 {
        // More layers than any model has are an error that is found later.
        dense.extend((0..n_layers.min(MANY)).filter(|layer| !(layer + 1).is_multiple_of(step)));
    }
    Ok(dense.into_iter().collect())
}

/// The sliding windows of Maple.
pub(super) fn windows(
    fields: Fields<'_>,
    architecture: &str,
    n_layers: usize,
) -> Result<Option<SlidingWindows>, LoadError> {
    if architecture != MAPLE {
        return Ok(None);
    }
    const KEY: &str = "layer_types";
    let types = fields.get(KEY).ok_or_else(|| fields.missing(KEY))?;
    let expected = "a list of \"sliding_attention\" and \"full_attention\", one for each layer";
    let sliding = |value: &Value| match value.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let layers = types.as_array().and_then(|types| types.iter().map(sliding).collect::<Option<Vec<bool>>>());
    let layers = layers.filter(|layers| layers.len() == n_layers);
    let layers = layers.ok_or_else(|| fields.wrong(KEY, types, expected))?;
    let any = layers.contains(&true);
    if let Some(false) = fields.bool("use_sliding_window")?.filter(|_| any) {
        let supported = "true, where `layer_types` has \"sliding_attention\"";
        return Err(fields.unsupported("use_sliding_window", &Value::from(false), supported));
    }
    Ok(Some(SlidingWindows {
        positions: match any {
            true => fields.required_size("sliding_window")?,
            false => 1, // of no layer
        },
        layers,
        global_rope: !fields.bool("nope_on_global_attention")?.unwrap_or(true),
    }))
}
