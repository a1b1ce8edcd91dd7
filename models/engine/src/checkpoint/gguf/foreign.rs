//! What a file of an unknown architecture has and no known architecture has: the work that reading it takes.

use super::super::missing::listed;
use super::names::{bias_name, float_part_name, norm_name, projection_name};
use super::rope;
use bitnet_burn::{FloatPart, Norm, Projection};
use bitnet_burn_formats::gguf::GgufFile;
use std::collections::BTreeSet;

/// Keys that a part of the reader takes, without the architecture's name.
const KEYS: [&str; 38] = [
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "embedding_scale",
    "expert_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_used_count",
    "expert_weights_norm",
    "feed_forward.activation",
    "feed_forward_length",
    "full_attention_interval",
    "hidden_act",
    "hidden_activation",
    "int8_activations",
    "logit_scale",
    "nextn_predict_layers",
    "pooling_type",
    "residual_scale",
    "rope.dimension_count",
    "rope.dimension_sections",
    "rope.freq_base",
    "rope.freq_base_swa",
    "ssm.conv_kernel",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
    "swiglu_clamp_exp",
    "vocab_size",
];

/// The end of an error about an unknown architecture.
pub(super) fn foreign_parts(file: &GgufFile, architecture: &str) -> String {
    let known: BTreeSet<String> = known_tensors().collect();
    let tensors = file.tensors().iter().map(|tensor| of_layer_0(&tensor.name));
    let tensors = tensors.filter(|name| !known.contains(name) && !rope::TENSORS.contains(&&name[..]));
    let prefix = format!("{architecture}.");
    let keys = file.metadata().iter().filter_map(|(key, _)| key.strip_prefix(&prefix));
    let keys = keys.filter(|key| !KEYS.contains(key) && !key.starts_with("rope.scaling."));
    listed(&tensors.collect(), &keys.map(str::to_owned).collect())
}

/// The name that a tensor of a layer has in the first one.
fn of_layer_0(name: &str) -> String {
    match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((_, part)) => format!("blk.0.{part}"),
        None => name.to_owned(),
    }
}

/// Those of all architectures, in the first layer.
fn known_tensors() -> impl Iterator<Item = String> {
    let projections = Projection::every().flat_map(|which| [projection_name(0, which), bias_name(0, which)]);
    let others = ["token_embd.weight", "output.weight", "blk.0.post_attention_norm.weight"];
    projections
        .chain(Norm::ALL.map(norm_name))
        .chain(Projection::ALL.map(|which| norm_name(Norm::Input(0, which))))
        .chain(FloatPart::every().map(|which| float_part_name(0, which)))
        .chain(others.map(str::to_owned))
}
