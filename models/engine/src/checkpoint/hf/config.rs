//! A model's configuration, from `config.json` and `generation_config.json`.

use super::super::choices::{choose_activation, drop_foreign_tokens};
use super::super::error::LoadError;
use super::super::source::OpenOptions;
use super::delta_net::delta_net;
use super::experts::{MAPLE_CLAMP, experts, windows};
use super::fields::{Fields, MAPLE, QWEN2_MOE, QWEN3_5, QWEN3_MOE};
use super::names::is_sub_norm;
use super::style::has_norms;
use bitnet_burn::names::HEAD;
use bitnet_burn::{DecoderOptions, ModelConfig, RopeScaling};
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
    asked: &OpenOptions,
    warnings: &mut Vec<String>,
) -> Result<ModelConfig, LoadError> {
    let architecture = fields.architecture()?;
    let hidden_size = fields.required_size("hidden_size")?;
    let n_layers = fields.required_size("num_hidden_layers")?;
    let mut options = options_of(fields, architecture, (n_layers, hidden_size))?;
    options.projection_norms = has_norms(tensors);
    options.experts = experts(fields, architecture, n_layers)?;
    options.windows = windows(fields, architecture, n_layers)?;
    options.delta_net = delta_net(fields, architecture, n_layers)?;
    // transformers' model has the gate always.
    options.attention_gate = architecture == QWEN3_5 && fields.bool("attn_output_gate")?.unwrap_or(true);
    if let Some(windows) = options.windows.as_ref().filter(|_| architecture == MAPLE) {
        options.swiglu_clamp = vec![MAPLE_CLAMP; windows.layers.len()];
    }
    let n_heads = fields.required_size("num_attention_heads")?;
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            let expected = format!("a divisor of the hidden size {hidden_size}");
            return Err(fields.wrong("num_attention_heads", &Value::from(n_heads), &expected));
        }
    };
    let context_length = fields.required_size("max_position_embeddings")?;
    let turned = partial_rotary_factor(fields)?.unwrap_or(if architecture == QWEN3_5 { 0.25 } else { 1.0 });
    if turned != 1.0 {
        if architecture != QWEN3_5 {
            return Err(fields.unsupported("partial_rotary_factor", &Value::from(turned), "1.0"));
        }
        options.rope_dim = Some((head_dim as f64 * turned) as usize);
    }
    let rope_theta;
    (rope_theta, options.rope_scaling) = rope(fields, architecture, context_length, warnings)?;
    let stated = fields.str("hidden_act")?.map(|name| ("hidden_act", name));
    let activation = choose_activation(fields.path, asked, stated, warnings, || {
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
        intermediate_size: intermediate_size(fields, &options)?,
        n_layers,
        n_heads,
        n_kv_heads: fields.size("num_key_value_heads")?.unwrap_or(n_heads),
        head_dim,
        vocab_size: fields.required_size("vocab_size")?,
        context_length,
        rope_theta,
        rms_norm_eps: fields.float("rms_norm_eps")?.ok_or_else(|| fields.missing("rms_norm_eps"))? as f32,
        activation,
        sub_norms: tensors.keys().any(|name| is_sub_norm(name)),
        // transformers' default; the configurations of tied models say so. MiniCPM's own code has the other one.
        tied_embeddings: fields
            .bool("tie_word_embeddings")?
            .unwrap_or(architecture == "minicpm" && !tensors.contains_key(HEAD)),
        bos_token: tokens("bos_token_id")?.first().copied(),
        eos_tokens: tokens("eos_token_id")?,
        options,
    };
    drop_foreign_tokens(&mut config, warnings);
    Ok(config)
}

/// Of the feed-forward networks; a model that has experts in every layer may leave it out.
fn intermediate_size(fields: Fields<'_>, options: &DecoderOptions) -> Result<usize, LoadError> {
    match &options.experts {
        Some(experts) if experts.dense_layers.is_empty() => {
            Ok(fields.size("intermediate_size")?.unwrap_or(experts.intermediate_size))
        }
        _ => fields.required_size("intermediate_size"),
    }
}

/// The share of a head that RoPE turns, where it is stated: all statements agree.
fn partial_rotary_factor(fields: Fields<'_>) -> Result<Option<f64>, LoadError> {
    const KEY: &str = "partial_rotary_factor";
    let mut stated = fields.float(KEY)?;
    for within in ["rope_scaling", "rope_parameters"] {
        let Some(found) = fields.within(within).and_then(|rope| rope.float(KEY).transpose()).transpose()?
        else {
            continue;
        };
        if let Some(other) = stated.filter(|&other| other != found) {
            let supported = format!("{other}, as stated before");
            return Err(fields.unsupported(&format!("{within}.{KEY}"), &Value::from(found), &supported));
        }
        stated = Some(found);
    }
    Ok(stated)
}

/// The base of RoPE: `rope_theta`, since version 5 in `rope_parameters`; and how its frequencies are scaled.
fn rope(
    fields: Fields<'_>,
    architecture: &str,
    context_length: usize,
    warnings: &mut Vec<String>,
) -> Result<(f64, Option<RopeScaling>), LoadError> {
    let mut theta = fields.float("rope_theta")?;
    let mut scaling = None;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = fields.within(key) else { continue };
        if !rope.json.is_object() {
            return Err(fields.wrong(key, rope.json, "an object"));
        }
        let found = Rope { key, rope, fields, context_length }.scaling()?;
        if let (Some(older), Some(newer)) = (&scaling, &found)
            && older != newer
        {
            return Err(fields.unsupported(key, rope.json, "what `rope_scaling` says"));
        }
        scaling = found.or(scaling);
        if let Some(newer) = rope.float("rope_theta")? {
            if let Some(older) = theta.filter(|&t| t != newer) {
                warnings.push(format!(
                    "`{key}.rope_theta` is {newer}, `rope_theta` is {older}; the former is used"
                ));
            }
            theta = Some(newer);
        }
    }
    let theta = theta.unwrap_or_else(|| {
        // transformers' defaults.
        let default = if architecture == "bitnet" { 500_000.0 } else { 10_000.0 };
        warnings.push(format!("`rope_theta` is missing; {default} is used, as transformers does"));
        default
    });
    Ok((theta, scaling))
}

/// An object that describes RoPE.
struct Rope<'a> {
    /// Its key.
    key: &'a str,
    rope: Fields<'a>,
    fields: Fields<'a>,
    context_length: usize,
}

impl Rope<'_> {
    fn missing(&self, field: &str) -> LoadError {
        self.rope.missing(&format!("{}.{field}", self.key))
    }

    fn required(&self, field: &str) -> Result<f64, LoadError> {
        self.rope.float(field)?.ok_or_else(|| self.missing(field))
    }

    /// Positions before scaling, where they are stated.
    fn original(&self) -> Result<Option<usize>, LoadError> {
        const KEY: &str = "original_max_position_embeddings";
        let stated = self.rope.size(KEY)?.or(self.fields.size(KEY)?);
        Ok(stated.filter(|&original| original > 0))
    }

    /// How frequencies are scaled, as in transformers (`modeling_rope_utils.py`). A factor of 1 is no scaling.
    fn scaling(&self) -> Result<Option<RopeScaling>, LoadError> {
        let rope = self.rope;
        let Some(stated) = ["rope_type", "type"].into_iter().find(|kind| rope.get(kind).is_some()) else {
            return Ok(None);
        };
        let kind = rope.str(stated)?.unwrap_or_default();
        let original = self.original()?.unwrap_or(self.context_length);
        let scaling = match kind {
            "default" => return Ok(None),
            "linear" => RopeScaling::Linear { factor: self.required("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: self.required("factor")?,
                low_freq_factor: self.required("low_freq_factor")?,
                high_freq_factor: self.required("high_freq_factor")?,
                original,
            },
            "yarn" => {
                for field in ["mscale", "mscale_all_dim"] {
                    if let Some(value) = rope.get(field).filter(|v| v.as_f64() != Some(1.0)) {
                        let what = format!("{}.{field}", self.key);
                        return Err(rope.unsupported(&what, value, "1"));
                    }
                }
                let factor = self.required("factor")?;
                let default = RopeScaling::yarn_attention_factor(factor);
                RopeScaling::Yarn {
                    factor,
                    original,
                    beta_fast: rope.float("beta_fast")?.unwrap_or(32.0),
                    beta_slow: rope.float("beta_slow")?.unwrap_or(1.0),
                    truncate: rope.bool("truncate")?.unwrap_or(true),
                    attention_factor: rope.float("attention_factor")?.unwrap_or(default),
                }
            }
            "longrope" | "su" => {
                let list = |field: &str| rope.floats(field)?.ok_or_else(|| self.missing(field));
                let attention = match (rope.float("attention_factor")?, self.original()?) {
                    (Some(stated), _) => stated,
                    (None, Some(_)) => RopeScaling::long_rope_attention_factor(self.context_length, original),
                    (None, None) => {
                        let context = rope.float("factor")?.unwrap_or(1.0) * original as f64;
                        RopeScaling::long_rope_attention_factor(context as usize, original)
                    }
                };
                RopeScaling::LongRope {
                    short: list("short_factor")?,
                    long: list("long_factor")?,
                    original,
                    attention_factor: attention,
                }
            }
            other => {
                let what = format!("{}.{stated}", self.key);
                let supported = "default, linear, llama3, yarn, longrope";
                return Err(rope.unsupported(&what, &Value::from(other), supported));
            }
        };
        let neutral = match &scaling {
            RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. } => *factor == 1.0,
            RopeScaling::Yarn { factor, attention_factor, .. } => *factor == 1.0 && *attention_factor == 1.0,
            RopeScaling::Divisors { .. } | RopeScaling::LongRope { .. } => false,
        };
        Ok(Some(scaling).filter(|_| !neutral))
    }
}

/// What the model has that BitNet has not.
fn options_of(
    fields: Fields<'_>,
    architecture: &str,
    (n_layers, hidden_size): (usize, usize),
) -> Result<DecoderOptions, LoadError> {
    if let Some(value) = fields.get("is_causal").filter(|value| value.as_bool() != Some(true)) {
        return Err(fields.unsupported("is_causal", value, "true: a token sees those before it"));
    }
    for key in ["mlp_bias", "use_sliding_window", "use_bidirectional_attention"] {
        if key == "use_sliding_window" && architecture == MAPLE {
            continue; // `layer_types` says where
        }
        if let Some(value) = fields.get(key).filter(|_| fields.bool(key).is_ok_and(|b| b == Some(true))) {
            return Err(fields.unsupported(key, value, "false"));
        }
    }
    let attention_bias = fields.bool("attention_bias")?.unwrap_or(false);
    if attention_bias && architecture == "bitnet" {
        return Err(fields.unsupported("attention_bias", &Value::from(true), "false"));
    }
    let mut options = DecoderOptions {
        qk_norms: matches!(architecture, "qwen3" | QWEN3_5 | QWEN3_MOE | MAPLE),
        qkv_bias: match architecture {
            "qwen2" => true,
            QWEN2_MOE => fields.bool("qkv_bias")?.unwrap_or(true),
            _ => attention_bias,
        },
        output_bias: attention_bias && !matches!(architecture, "qwen2" | QWEN2_MOE),
        ..DecoderOptions::default()
    };
    if architecture == "minicpm" {
        // The defaults are those of MiniCPM's own code.
        let depth = fields.float("scale_depth")?.unwrap_or(1.0);
        let base = fields.float("dim_model_base")?.unwrap_or(1.0);
        options.embedding_scale = fields.float("scale_emb")?.unwrap_or(1.0) as f32;
        options.residual_scale = (depth / (n_layers as f64).sqrt()) as f32;
        options.logit_divisor = (hidden_size as f64 / base) as f32;
    }
    Ok(options)
}
