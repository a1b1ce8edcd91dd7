//! A model's configuration, from `config.json` and `generation_config.json`.

use super::super::choices::{choose_activation, drop_foreign_tokens};
use super::super::error::LoadError;
use super::super::source::OpenOptions;
use super::fields::Fields;
use super::names::is_sub_norm;
use bitnet_burn::ModelConfig;
use bitnet_burn_formats::read_json;
use bitnet_burn_formats::safetensors::SafeTensor;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// The configuration that the files state.
pub(super) fn config(
    dir: &Path,
    fields: Fields<'_>,
    tensors: &BTreeMap<String, SafeTensor>,
    options: &OpenOptions,
    warnings: &mut Vec<String>,
) -> Result<ModelConfig, LoadError> {
    let architecture = fields.architecture()?;
    for key in ["attention_bias", "mlp_bias"] {
        if let Some(value) = fields.get(key).filter(|_| fields.bool(key).is_ok_and(|b| b == Some(true))) {
            return Err(fields.unsupported(key, value, "false"));
        }
    }
    let hidden_size = fields.required_size("hidden_size")?;
    let n_heads = fields.required_size("num_attention_heads")?;
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            let expected = format!("a divisor of the hidden size {hidden_size}");
            return Err(fields.wrong("num_attention_heads", &Value::from(n_heads), &expected));
        }
    };
    let rope_theta = rope_theta(fields, architecture, warnings)?;
    let stated = fields.str("hidden_act")?.map(|name| ("hidden_act", name));
    let activation = choose_activation(fields.path, options, stated, warnings, || {
        Err(LoadError::UnknownActivation {
            path: fields.path.to_owned(),
            problem: "key `hidden_act` is missing: pass --hidden-act relu2 (BitNet b1.58 2B-4T) or \
                      --hidden-act silu (Llama and the older BitNet models)"
                .into(),
        })
    })?;

    let generation_path = dir.join("generation_config.json");
    let generation: Value = if generation_path.exists() { read_json(&generation_path)? } else { Value::Null };
    let generation = Fields { path: &generation_path, json: &generation };
    let tokens =
        |key| Ok::<_, LoadError>(generation.tokens(key)?.or(fields.tokens(key)?).unwrap_or_default());

    let mut config = ModelConfig {
        architecture: architecture.to_owned(),
        name: fields.str("_name_or_path")?.filter(|name| !name.is_empty()).map(str::to_owned),
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size")?,
        n_layers: fields.required_size("num_hidden_layers")?,
        n_heads,
        n_kv_heads: fields.size("num_key_value_heads")?.unwrap_or(n_heads),
        head_dim,
        vocab_size: fields.required_size("vocab_size")?,
        context_length: fields.required_size("max_position_embeddings")?,
        rope_theta,
        rms_norm_eps: fields.float("rms_norm_eps")?.ok_or_else(|| fields.missing("rms_norm_eps"))? as f32,
        activation,
        sub_norms: tensors.keys().any(|name| is_sub_norm(name)),
        // transformers' default; the configurations of tied models say so.
        tied_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
        bos_token: tokens("bos_token_id")?.first().copied(),
        eos_tokens: tokens("eos_token_id")?,
    };
    drop_foreign_tokens(&mut config, warnings);
    Ok(config)
}

/// The base of RoPE: `rope_theta`, since version 5 in `rope_parameters`.
fn rope_theta(fields: Fields<'_>, architecture: &str, warnings: &mut Vec<String>) -> Result<f64, LoadError> {
    let mut theta = fields.float("rope_theta")?;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = fields.within(key) else { continue };
        if !rope.json.is_object() {
            return Err(fields.wrong(key, rope.json, "an object"));
        }
        check_scaling(key, rope)?;
        if let Some(value) = rope.get("partial_rotary_factor").filter(|v| v.as_f64() != Some(1.0)) {
            return Err(fields.unsupported(&format!("{key}.partial_rotary_factor"), value, "1.0"));
        }
        if let Some(newer) = rope.float("rope_theta")? {
            if let Some(older) = theta.filter(|&t| t != newer) {
                warnings.push(format!(
                    "`{key}.rope_theta` is {newer}, `rope_theta` is {older}; the former is used"
                ));
            }
            theta = Some(newer);
        }
    }
    if let Some(value) = fields.get("partial_rotary_factor").filter(|v| v.as_f64() != Some(1.0)) {
        return Err(fields.unsupported("partial_rotary_factor", value, "1.0"));
    }
    Ok(theta.unwrap_or_else(|| {
        // transformers' defaults.
        let default = if architecture == "bitnet" { 500_000.0 } else { 10_000.0 };
        warnings.push(format!("`rope_theta` is missing; {default} is used, as transformers does"));
        default
    }))
}

/// Refuses RoPE that is scaled. Types that leave every angle as it is with a factor of 1 are accepted with it.
fn check_scaling(key: &str, rope: Fields<'_>) -> Result<(), LoadError> {
    let Some(stated) = ["rope_type", "type"].into_iter().find(|kind| rope.get(kind).is_some()) else {
        return Ok(());
    };
    let kind = rope.str(stated)?.unwrap_or_default();
    let refuse = |field: &str, found: &Value, supported: &str| {
        Err(rope.unsupported(&format!("{key}.{field}"), found, supported))
    };
    match kind {
        "default" => return Ok(()),
        "linear" | "yarn" | "llama3" => {}
        other => {
            return refuse(
                stated,
                &Value::from(other),
                "default, and linear, yarn or llama3 with a factor of 1",
            );
        }
    }
    if rope.get("factor").is_none() {
        return Err(rope.missing(&format!("{key}.factor")));
    }
    // What yarn multiplies cosine and sine by follows from the factor, unless the others say otherwise.
    let yarn = &["factor", "attention_factor", "mscale", "mscale_all_dim"][..];
    for field in if kind == "yarn" { yarn } else { &yarn[..1] } {
        if let Some(value) = rope.get(field).filter(|v| v.as_f64() != Some(1.0)) {
            return refuse(field, value, "1, which leaves RoPE as it is");
        }
    }
    Ok(())
}
