//! Names of a model's parameters, as Hugging Face checkpoints of BitNet have them.

use crate::{FloatPart, Norm, Projection};

/// The embedding's name.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output head's name, where it is not the embedding.
pub const HEAD: &str = "lm_head.weight";

/// The name of a projection's module.
pub fn projection_module(layer: usize, which: Projection) -> String {
    let part = match which {
        Projection::ExpertGate(_) | Projection::ExpertUp(_) | Projection::ExpertDown(_) => {
            let (number, name) = (which.expert().unwrap_or_default(), which.name());
            return format!("model.layers.{layer}.mlp.experts.{number}.{name}_proj");
        }
        Projection::SharedGate => "mlp.shared_expert.gate_proj",
        Projection::SharedUp => "mlp.shared_expert.up_proj",
        Projection::SharedDown => "mlp.shared_expert.down_proj",
        Projection::DeltaQkv => "linear_attn.in_proj_qkv",
        Projection::DeltaGate => "linear_attn.in_proj_z",
        Projection::DeltaOut => "linear_attn.out_proj",
        Projection::Q => "self_attn.q_proj",
        Projection::K => "self_attn.k_proj",
        Projection::V => "self_attn.v_proj",
        Projection::O => "self_attn.o_proj",
        Projection::Gate => "mlp.gate_proj",
        Projection::Up => "mlp.up_proj",
        Projection::Down => "mlp.down_proj",
    };
    format!("model.layers.{layer}.{part}")
}

/// The name of a projection's weights.
pub fn projection_name(layer: usize, which: Projection) -> String {
    projection_module(layer, which) + ".weight"
}

/// The name of a projection's bias.
pub fn bias_name(layer: usize, which: Projection) -> String {
    projection_module(layer, which) + ".bias"
}

/// The name of a packed projection's scale.
pub fn scale_name(layer: usize, which: Projection) -> String {
    projection_module(layer, which) + ".weight_scale"
}

/// The name of a part that is floats in every model. (Checkpoints have the logarithm of minus the
/// [rates](FloatPart::DeltaRate).)
pub fn float_part_name(layer: usize, which: FloatPart) -> String {
    let part = match which {
        FloatPart::Router => "mlp.gate.weight",
        FloatPart::SharedRouter => "mlp.shared_expert_gate.weight",
        FloatPart::DeltaDecay => "linear_attn.in_proj_a.weight",
        FloatPart::DeltaStrength => "linear_attn.in_proj_b.weight",
        FloatPart::DeltaConvolution => "linear_attn.conv1d.weight",
        FloatPart::DeltaRate => "linear_attn.A_log",
        FloatPart::DeltaBias => "linear_attn.dt_bias",
    };
    format!("model.layers.{layer}.{part}")
}

/// The name of a norm's weights.
pub fn norm_name(which: Norm) -> String {
    let (layer, part) = match which {
        Norm::Attention(l) => (l, "input_layernorm"),
        Norm::Query(l) => (l, "self_attn.q_norm"),
        Norm::Key(l) => (l, "self_attn.k_norm"),
        Norm::Delta(l) => (l, "linear_attn.norm"),
        Norm::AttentionSub(l) => (l, "self_attn.attn_sub_norm"),
        Norm::FeedForward(l) => (l, "post_attention_layernorm"),
        Norm::FeedForwardSub(l) => (l, "mlp.ffn_sub_norm"),
        Norm::Input(l, which) => return projection_module(l, which) + ".norm.weight",
        Norm::Output => return "model.norm.weight".to_owned(),
    };
    format!("model.layers.{layer}.{part}.weight")
}
