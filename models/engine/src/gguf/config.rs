//! The keys and small tensors of a configuration, as the readers beside them read them.

use super::readers::Architecture;
use super::{GgufWriteError, TernaryType};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::gguf::{hadamard, names, rope};
use bitnet_burn::{
    DeltaNet, Experts, ModelConfig, Projection, RopeScaling, RotaryEncodingConfig, SlidingWindows,
};
use bitnet_burn_formats::WriteError;
use bitnet_burn_formats::gguf::{Array, GgufWriter, Value};

/// Adds the keys of everything but rotations and activations.
pub(super) fn write(
    writer: &mut GgufWriter<'_>,
    architecture: Architecture,
    config: &ModelConfig,
) -> Result<(), GgufWriteError> {
    expressible(config)?;
    let name = architecture.name();
    writer.set("general.architecture", name)?;
    if let Some(name) = &config.name {
        writer.set("general.name", name.as_str())?;
    }
    let mut sizes = vec![
        ("vocab_size", config.vocab_size),
        ("context_length", config.context_length),
        ("embedding_length", config.hidden_size),
        ("block_count", config.n_layers),
        ("feed_forward_length", config.intermediate_size),
        ("rope.dimension_count", config.rope_dim()),
        ("attention.head_count", config.n_heads),
        ("attention.head_count_kv", config.n_kv_heads),
    ];
    if config.q_size() != config.hidden_size || config.options.qk_norms {
        sizes
            .extend([("attention.key_length", config.head_dim), ("attention.value_length", config.head_dim)]);
    }
    if let Some(Experts { count, used, intermediate_size, .. }) = &config.options.experts {
        sizes.extend([
            ("expert_count", *count),
            ("expert_used_count", *used),
            ("expert_feed_forward_length", *intermediate_size),
        ]);
    }
    if let Some(delta) = &config.options.delta_net {
        sizes.extend([
            ("ssm.group_count", delta.key_heads),
            ("ssm.time_step_rank", delta.value_heads),
            ("ssm.state_size", delta.key_dim),
            ("ssm.inner_size", delta.values()),
            ("ssm.conv_kernel", delta.taps),
            ("full_attention_interval", interval(delta).unwrap_or(0)),
        ]);
    }
    if let Some(SlidingWindows { positions, .. }) = &config.options.windows {
        sizes.push(("attention.sliding_window", *positions));
    }
    for (suffix, size) in sizes {
        // As u32, which readers expect; what ModelConfig::validate lets through fits.
        writer.set(format!("{name}.{suffix}"), u32::try_from(size).unwrap_or(u32::MAX))?;
    }
    writer.set(format!("{name}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps)?;
    writer.set(format!("{name}.rope.freq_base"), config.rope_theta as f32)?;
    writer.set(format!("{name}.hidden_act"), config.activation.name())?;
    write_options(writer, architecture, config)?;
    let tokens = [
        ("bos_token_id", config.bos_token),
        ("eos_token_id", config.eos_tokens.first().copied()),
        ("eot_token_id", config.eos_tokens.get(1).copied()),
    ];
    for (key, token) in tokens {
        if let Some(token) = token {
            writer.set(format!("tokenizer.ggml.{key}"), token)?;
        }
    }
    Ok(())
}

/// The layers from one with attention to the next, if they are the same everywhere.
fn interval(delta: &DeltaNet) -> Option<usize> {
    let first = delta.layers.iter().position(|&has| !has).map_or(delta.layers.len() + 1, |first| first + 1);
    let regular = (1..).zip(&delta.layers).all(|(layer, &has)| has == (layer % first != 0));
    regular.then_some(first)
}

/// Refuses what no key says. llama.cpp has one behaviour there, whatever a key said.
fn expressible(config: &ModelConfig) -> Result<(), GgufWriteError> {
    let options = &config.options;
    if let Some(delta) = &options.delta_net {
        let problem = if interval(delta).is_none() {
            "its layers with attention do not stand at a fixed interval (`full_attention_interval`)"
        } else if !delta.tiled && delta.key_heads != delta.value_heads {
            "the value heads of its gated DeltaNets are in Hugging Face's order, and no export changes that yet"
        } else {
            ""
        };
        if !problem.is_empty() {
            return Err(GgufWriteError::Inexpressible { problem: problem.into() });
        }
    }
    let problem = match (&options.experts, &options.windows, &options.rope_scaling) {
        (Some(experts), ..) if !experts.renormalise => {
            "the weights of a row's experts are not divided by their sum (`norm_topk_prob`)"
        }
        (Some(experts), ..) if !experts.dense_layers.is_empty() => {
            "some layers have no experts (`mlp_only_layers`, `decoder_sparse_step`)"
        }
        (_, Some(windows), _) if windows.global_rope => {
            "its layers without a window have RoPE (`nope_on_global_attention`)"
        }
        (_, Some(_), _) if config.tied_embeddings => "a model `maple` has an output head of its own",
        (_, Some(_), _) if options.swiglu_clamp.is_empty() => "a model `maple` limits its gates",
        (_, None, _) if !options.swiglu_clamp.is_empty() => "only a model `maple` limits its gates",
        (.., Some(RopeScaling::Yarn { truncate: false, .. })) => {
            "YaRN's range is not rounded to whole pairs (`truncate`)"
        }
        _ => return Ok(()),
    };
    Err(GgufWriteError::Inexpressible { problem: problem.into() })
}

fn write_options(
    writer: &mut GgufWriter<'_>,
    architecture: Architecture,
    config: &ModelConfig,
) -> Result<(), WriteError> {
    let options = &config.options;
    let mut keys: Vec<(&str, Value)> = Vec::new();
    if architecture == Architecture::MiniCpm {
        keys.extend([
            ("embedding_scale", options.embedding_scale.into()),
            ("residual_scale", options.residual_scale.into()),
            ("logit_scale", options.logit_divisor.into()),
        ]);
    }
    let of_original = |original: usize| {
        (rope::ORIGINAL, u32::try_from(original).unwrap_or(u32::MAX).into()) // as other sizes
    };
    match &options.rope_scaling {
        None | Some(RopeScaling::Divisors { .. } | RopeScaling::Llama3 { .. }) => {}
        Some(RopeScaling::Linear { factor }) => {
            keys.extend([(rope::TYPE, "linear".into()), (rope::FACTORS[0], (*factor as f32).into())]);
        }
        Some(RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, .. }) => {
            keys.extend([(rope::TYPE, "yarn".into()), of_original(*original)]);
            keys.push((rope::FACTORS[0], (*factor as f32).into()));
            let numbers = [
                ("rope.scaling.yarn_beta_fast", *beta_fast, rope::BETAS.0),
                ("rope.scaling.yarn_beta_slow", *beta_slow, rope::BETAS.1),
                (
                    "rope.scaling.yarn_attn_factor",
                    *attention_factor,
                    RopeScaling::yarn_attention_factor(*factor),
                ),
            ];
            let stated = numbers.into_iter().filter(|(_, value, default)| value != default);
            keys.extend(stated.map(|(key, value, _)| (key, (value as f32).into())));
        }
        Some(RopeScaling::LongRope { original, attention_factor, .. }) => {
            keys.extend([(rope::TYPE, "longrope".into()), of_original(*original)]);
            let default = RopeScaling::long_rope_attention_factor(config.context_length, *original);
            if *attention_factor != default {
                keys.push((rope::ATTENTION_FACTOR, (*attention_factor as f32).into()));
            }
        }
    }
    if options.delta_net.is_some() {
        // llama.cpp wants pairs by axis of a picture; a text has the same position on each.
        let pairs = config.rope_dim() as i32 / 2;
        let sections = [(pairs + 2) / 3, (pairs + 1) / 3, pairs / 3, 0];
        keys.push(("rope.dimension_sections", Array::from_i32(sections).into()));
    }
    if let Some(windows) = &options.windows {
        let pattern = Array::from_bools(windows.layers.iter().copied());
        let clamps = Array::from_f32(options.swiglu_clamp.iter().copied());
        keys.extend([
            ("attention.sliding_window_pattern", pattern.into()),
            ("swiglu_clamp_exp", clamps.into()),
        ]);
    }
    let name = architecture.name();
    keys.into_iter().try_for_each(|(key, value)| writer.set(format!("{name}.{key}"), value).map(drop))
}

/// Adds the divisors of RoPE's frequencies. Llama 3's scaling is stated by them alone.
pub(super) fn write_rope_tensors(
    writer: &mut GgufWriter<'_>,
    config: &ModelConfig,
) -> Result<(), WriteError> {
    let [plain, short, long] = rope::TENSORS;
    match &config.options.rope_scaling {
        Some(RopeScaling::Divisors { divisors }) => writer.vector(plain, divisors.clone()).map(drop),
        Some(RopeScaling::LongRope { short: for_short, long: for_long, .. }) => {
            writer.vector(short, for_short.clone())?;
            writer.vector(long, for_long.clone()).map(drop)
        }
        Some(scaling @ RopeScaling::Llama3 { .. }) => {
            let encoding = RotaryEncodingConfig::new(config.rope_dim()).with_theta(config.rope_theta);
            let (unscaled, scaled) =
                (encoding.clone().init(), encoding.with_scaling(Some(scaling.clone())).init());
            let (unscaled, scaled) = (unscaled.frequencies(1).0, scaled.frequencies(1).0);
            writer.vector(plain, unscaled.iter().zip(scaled).map(|(a, b)| (a / b) as f32).collect()).map(drop)
        }
        None | Some(RopeScaling::Linear { .. } | RopeScaling::Yarn { .. }) => Ok(()),
    }
}

/// Adds the keys of matrices that are rotated.
pub(super) fn write_rotations(
    writer: &mut GgufWriter<'_>,
    checkpoint: &Checkpoint,
) -> Result<(), GgufWriteError> {
    let keys = hadamard::keys(checkpoint).map_err(|problem| GgufWriteError::Inexpressible { problem })?;
    keys.into_iter().try_for_each(|(key, value)| writer.set(key, value).map(drop))?;
    Ok(())
}

/// Says how embeddings are pooled, where the source does.
pub(super) fn write_pooling(
    writer: &mut GgufWriter<'_>,
    architecture: Architecture,
    checkpoint: &Checkpoint,
) -> Result<(), WriteError> {
    let pooling = checkpoint.embed_defaults(None).ok().and_then(|defaults| defaults.pooling);
    let Some(pooling) = pooling else { return Ok(()) };
    writer.set(format!("{}.pooling_type", architecture.name()), pooling.gguf()).map(drop)
}

/// Says how the source declares that activations are quantised, if it does, and whether ternary weights with one scale have int8
/// activations by row, where architecture and type say otherwise.
pub(super) fn write_activations(
    writer: &mut GgufWriter<'_>,
    architecture: Architecture,
    checkpoint: &Checkpoint,
    ternary: TernaryType,
) -> Result<(), WriteError> {
    if let Some(rule) = checkpoint.declared_activations() {
        writer.set(names::ACTIVATIONS, rule.to_string())?;
    }
    let int8 = checkpoint.dense_bytes(0, Projection::first(checkpoint.config())).is_none();
    if names::int8_rows(architecture.name(), ternary.into()) != int8 && ternary.blocks().is_some() {
        writer.set(format!("{}.{}", architecture.name(), names::INT8_ACTIVATIONS), int8)?;
    }
    Ok(())
}
