//! `config.json`, with the keys that transformers knows, as the reader of these directories reads it.

use super::HfWriteError;
use crate::checkpoint::hf::experts::MAPLE_CLAMP;
use crate::checkpoint::{EXTENSION, Style};
use bitnet_burn::{ActivationRule, DecoderOptions, Experts, ModelConfig, RopeScaling, SlidingWindows};
use bitnet_burn_formats::safetensors::Dtype;
use serde_json::{Map, Value, json};

/// What transformers reads. The keys are those that all of its versions with the model know, and one of this project that it
/// ignores.
///
/// # Errors
/// [`HfWriteError::Inexpressible`]
pub(super) fn config_json(
    config: &ModelConfig,
    (style, activations): (Style, Option<ActivationRule>),
    dtype: Dtype,
) -> Result<Value, HfWriteError> {
    let (class, model_type) = model_type(config)?;
    let options = &config.options;
    let quantisation = |linear_class: &str, mode: &str| json!({"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode});
    let quantisation = match style {
        Style::Online => Some(quantisation("autobitlinear", "online")),
        Style::PackedAuto => Some(quantisation("autobitlinear", "offline")),
        Style::PackedInverse => Some(quantisation("bitlinear", "offline")),
        Style::Values => None,
    };
    let dtype = match (style, dtype) {
        // Masters are f32, and would be rounded before they are made ternary.
        (Style::Online, _) => "float32",
        (_, Dtype::F16) => "float16",
        (_, Dtype::BF16) => "bfloat16",
        _ => "float32",
    };
    let mut json = json!({
        "architectures": [class],
        "attention_bias": options.qkv_bias && model_type != "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": config.activation.name(),
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context_length,
        "model_type": model_type,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": shortest(config.rms_norm_eps),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    if let Some(object) = json.as_object_mut() {
        end_tokens(config, object);
        if let Some(quantisation) = quantisation {
            object.insert("quantization_config".into(), quantisation);
        }
        if let Some(rule) = activations.filter(|_| style == Style::Values) {
            object.insert(EXTENSION.into(), json!({ "activations": rule }));
        }
        if model_type == "llama" {
            object.insert("mlp_bias".into(), false.into());
        }
        // transformers' Qwen3 has heads of 128 where nothing else is stated.
        if config.q_size() != config.hidden_size || options.qk_norms {
            object.insert("head_dim".into(), config.head_dim.into());
        }
        if let Some(name) = &config.name {
            object.insert("_name_or_path".into(), name.as_str().into());
        }
        options_of(config, model_type, object);
    }
    Ok(json)
}

/// transformers' class and name of a model.
fn model_type(config: &ModelConfig) -> Result<(&'static str, &'static str), HfWriteError> {
    let DecoderOptions { qk_norms, qkv_bias, output_bias, experts, windows, swiglu_clamp, .. } =
        &config.options;
    let DecoderOptions { delta_net, attention_gate, rope_dim, projection_norms, .. } = &config.options;
    let factors = config.options.has_factors();
    let maple = windows.is_some();
    let problem = if delta_net.is_some() || *attention_gate || rope_dim.is_some() {
        "it has gated DeltaNets, gates at the output of attention, or RoPE on a part of each head; write GGUF"
    } else if *projection_norms && !qk_norms {
        "it has norms before each projection, and no norms of queries and keys"
    } else if config.sub_norms && !config.options.is_default() {
        "it has sub-norms, and what BitNet has not"
    } else if maple && experts.is_none() {
        "it has sliding windows, and no experts"
    } else if experts.as_ref().is_some_and(|experts| experts.shared.is_some()) {
        "it has a shared expert, and no export writes one yet"
    } else if experts.is_some() && !qk_norms {
        "it has experts, and no norms of queries and keys"
    } else if factors && *qk_norms {
        "it has factors as MiniCPM, and norms of queries and keys"
    } else if swiglu_clamp.iter().any(|&clamp| clamp != MAPLE_CLAMP) || swiglu_clamp.is_empty() == maple {
        "its gates are limited by layer, or to another number than Maple's 7"
    } else if *output_bias && !*qkv_bias {
        "its output projections of attention have biases, and q, k and v have none"
    } else if qkv_bias != output_bias && (*qk_norms || factors) {
        "q, k and v have biases, and the output projections of attention have none"
    } else {
        return Ok(match experts {
            // Whoever has sub-norms is BitNet to transformers, whatever the activation.
            _ if config.sub_norms => ("BitNetForCausalLM", "bitnet"),
            _ if maple => ("MapleForCausalLM", "maple"),
            Some(_) => ("Qwen3MoeForCausalLM", "qwen3_moe"),
            _ if factors => ("MiniCPMForCausalLM", "minicpm"),
            _ if *qk_norms => ("Qwen3ForCausalLM", "qwen3"),
            _ if qkv_bias != output_bias => ("Qwen2ForCausalLM", "qwen2"),
            _ => ("LlamaForCausalLM", "llama"),
        });
    };
    Err(HfWriteError::Inexpressible { problem: problem.into() })
}

/// The keys of what the model has that BitNet has not.
fn options_of(config: &ModelConfig, model_type: &str, json: &mut Map<String, Value>) {
    let options = &config.options;
    let mut set = |key: &str, value: Value| drop(json.insert(key.to_owned(), value));
    if let Some(scaling) = &options.rope_scaling {
        set("rope_scaling", rope_scaling(scaling, config.context_length));
        if let RopeScaling::LongRope { original, .. } = scaling {
            set(ORIGINAL, (*original).into()); // where older versions look
        }
    }
    if model_type == "minicpm" {
        let layers = (config.n_layers as f64).sqrt();
        let depth = f64::from(options.residual_scale) * layers;
        // The number that the model was given, if it comes to the same.
        let short = shortest(depth as f32);
        let same = (short / layers) as f32 == options.residual_scale;
        set("scale_depth", if same { short } else { depth }.into());
        set("scale_emb", shortest(options.embedding_scale).into());
        set("dim_model_base", (config.hidden_size as f64 / f64::from(options.logit_divisor)).into());
    }
    if let Some(Experts { count, used, intermediate_size, renormalise, dense_layers, .. }) = &options.experts
    {
        set("num_experts", (*count).into());
        set("num_experts_per_tok", (*used).into());
        set("moe_intermediate_size", (*intermediate_size).into());
        set("norm_topk_prob", (*renormalise).into());
        set("mlp_only_layers", dense_layers.clone().into());
        set("decoder_sparse_step", 1.into());
    }
    if let Some(SlidingWindows { positions, layers, global_rope }) = &options.windows {
        let kind = |&sliding: &bool| if sliding { "sliding_attention" } else { "full_attention" };
        set("layer_types", layers.iter().map(kind).collect());
        set("sliding_window", (*positions).into());
        set("nope_on_global_attention", (!global_rope).into());
    }
}

/// Positions before RoPE's scaling.
const ORIGINAL: &str = "original_max_position_embeddings";

/// `rope_scaling`. Divisors of all frequencies are a LongRoPE whose two sets are the same.
fn rope_scaling(scaling: &RopeScaling, context_length: usize) -> Value {
    let numbers = |values: &[f32]| values.iter().map(|&v| shortest(v)).collect::<Vec<_>>();
    match scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            ORIGINAL: original,
        }),
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, attention_factor } => json!({
            "rope_type": "yarn",
            "factor": factor,
            ORIGINAL: original,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "truncate": truncate,
            "attention_factor": attention_factor,
        }),
        RopeScaling::Divisors { divisors } => json!({
            "rope_type": "longrope",
            "short_factor": numbers(divisors),
            "long_factor": numbers(divisors),
            ORIGINAL: context_length,
            "attention_factor": 1.0,
        }),
        RopeScaling::LongRope { short, long, original, attention_factor } => json!({
            "rope_type": "longrope",
            "short_factor": numbers(short),
            "long_factor": numbers(long),
            ORIGINAL: original,
            "attention_factor": attention_factor,
        }),
    }
}

pub(super) fn end_tokens(config: &ModelConfig, json: &mut Map<String, Value>) {
    json.insert("bos_token_id".into(), config.bos_token.into());
    let eos = match config.eos_tokens[..] {
        [] => Value::Null,
        [one] => one.into(),
        ref several => several.into(),
    };
    json.insert("eos_token_id".into(), eos);
}

/// The shortest decimal number that is this f32: 1e-5 and not 0.000009999999747378752.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
