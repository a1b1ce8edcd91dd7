//! The names of a model's tensors in GGUF, and the order of their rows.
//!
//! Files of the architectures `llama` and `minicpm` rotate neighbouring rows of a head (GPT-J's RoPE), all others and
//! Hugging Face's rotate a row with the one half a head further (GPT-NeoX's): converters reorder
//! the rows of q and k, and so do [`neox_rows`] and [`gptj_rows`].

use bitnet_burn::{FloatPart, Norm, Projection};
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::gguf::TensorType;

/// Llama's shape: no sub-norms, SiLU, and q and k in another order of rows.
pub(crate) const LLAMA: &str = "llama";
/// Llama's shape with biases of q, k and v, and q and k in their own order.
pub(crate) const QWEN2: &str = "qwen2";
/// Llama's shape with norms of query and key heads, and q and k in their own order.
pub(crate) const QWEN3: &str = "qwen3";
/// Llama's shape with factors of embedding, residuals and logits; q and k in Llama's order.
pub(crate) const MINICPM: &str = "minicpm";

/// Qwen2's shape with experts, and a shared one.
pub(crate) const QWEN2MOE: &str = "qwen2moe";
/// Qwen3's shape with experts.
pub(crate) const QWEN3MOE: &str = "qwen3moe";
/// Qwen3's shape with experts, and with sliding windows and RoPE in some layers.
pub(crate) const MAPLE: &str = "maple";

/// The key that says whether ternary weights with one scale have int8 activations by row. Only this program has it.
pub(crate) const INT8_ACTIVATIONS: &str = "int8_activations";

/// The key that says how activations of all other ternary weights are quantised, with the text of an
/// [`ActivationRule`](bitnet_burn::ActivationRule). Only this program has it.
pub(crate) const ACTIVATIONS: &str = "bitnet_burn.activations";

/// Whether ternary weights with one scale have int8 activations by row in files without [`INT8_ACTIVATIONS`]. I2_S weights
/// always have. Q2_0 and Prism ML's formats are those of models that were trained with float activations.
pub(crate) fn int8_rows(architecture: &str, tensor_type: TensorType) -> bool {
    let is_bitnet = architecture.starts_with("bitnet");
    match tensor_type {
        TensorType::I2_S => true,
        TensorType::Dense(DenseFormat::Q2_0 | DenseFormat::PQ2_0 | DenseFormat::PTQ1_0) => is_bitnet,
        TensorType::Dense(_) | TensorType::IqBn(_) => is_bitnet || architecture == LLAMA,
    }
}

/// Qwen3's shape with gated DeltaNets in place of the attention of most layers.
pub(crate) const QWEN35: &str = "qwen35";

/// Whether files of an architecture rotate neighbouring rows of a head.
pub(crate) fn is_gptj(architecture: &str) -> bool {
    matches!(architecture, LLAMA | MINICPM)
}

/// The name of a projection's tensor in GGUF. One tensor has the matrices of all experts, one behind the other.
pub fn projection_name(layer: usize, which: Projection) -> String {
    projection_stem(layer, which) + ".weight"
}

/// The name in GGUF of a part that is floats in every model.
pub(crate) fn float_part_name(layer: usize, which: FloatPart) -> String {
    let part = match which {
        FloatPart::Router => "ffn_gate_inp.weight",
        FloatPart::SharedRouter => "ffn_gate_inp_shexp.weight",
        FloatPart::DeltaDecay => "ssm_alpha.weight",
        FloatPart::DeltaStrength => "ssm_beta.weight",
        FloatPart::DeltaConvolution => "ssm_conv1d.weight",
        FloatPart::DeltaRate => "ssm_a",
        FloatPart::DeltaBias => "ssm_dt.bias",
    };
    format!("blk.{layer}.{part}")
}

/// The name of a projection's bias in GGUF.
pub(crate) fn bias_name(layer: usize, which: Projection) -> String {
    projection_stem(layer, which) + ".bias"
}

/// The name of a norm's tensor in GGUF.
pub fn norm_name(which: Norm) -> String {
    let (layer, part) = match which {
        Norm::Attention(l) => (l, "attn_norm"),
        Norm::Query(l) => (l, "attn_q_norm"),
        Norm::Key(l) => (l, "attn_k_norm"),
        Norm::Delta(l) => (l, "ssm_norm"),
        Norm::AttentionSub(l) => (l, "attn_sub_norm"),
        Norm::FeedForward(l) => (l, "ffn_norm"),
        Norm::FeedForwardSub(l) => (l, "ffn_sub_norm"),
        Norm::Input(l, which) => return projection_stem(l, which) + "_norm_in.weight",
        Norm::Output => return "output_norm.weight".to_owned(),
    };
    format!("blk.{layer}.{part}.weight")
}

/// The name of a norm's tensor in a file of an architecture.
pub(crate) fn norm_name_of(architecture: &str, which: Norm) -> String {
    match which {
        Norm::FeedForward(layer) if architecture == QWEN35 => {
            format!("blk.{layer}.post_attention_norm.weight")
        }
        _ => norm_name(which),
    }
}

pub(super) fn projection_stem(layer: usize, which: Projection) -> String {
    let part = match which {
        Projection::DeltaQkv => "attn_qkv",
        Projection::DeltaGate => "attn_gate",
        Projection::DeltaOut => "ssm_out",
        Projection::Q => "attn_q",
        Projection::K => "attn_k",
        Projection::V => "attn_v",
        Projection::O => "attn_output",
        Projection::Gate => "ffn_gate",
        Projection::Up => "ffn_up",
        Projection::Down => "ffn_down",
        Projection::ExpertGate(_) => "ffn_gate_exps",
        Projection::ExpertUp(_) => "ffn_up_exps",
        Projection::ExpertDown(_) => "ffn_down_exps",
        Projection::SharedGate => "ffn_gate_shexp",
        Projection::SharedUp => "ffn_up_shexp",
        Projection::SharedDown => "ffn_down_shexp",
    };
    format!("blk.{layer}.{part}")
}

/// `n` rows of heads of `head` rows, from GPT-J's order (row 2i rotates with 2i + 1) to GPT-NeoX's (row i
/// with i + head / 2).
pub(super) fn neox_rows(rows: &[u8], n: usize, head: usize) -> Vec<u8> {
    reordered(rows, n, head, |i| if i < head / 2 { 2 * i } else { 2 * (i - head / 2) + 1 })
}

/// The inverse of [`neox_rows`].
pub(crate) fn gptj_rows(rows: &[u8], n: usize, head: usize) -> Vec<u8> {
    reordered(rows, n, head, |i| i / 2 + i % 2 * (head / 2))
}

/// Row i of each head taken from its row `from(i)`.
fn reordered(rows: &[u8], n: usize, head: usize, from: impl Fn(usize) -> usize) -> Vec<u8> {
    let bytes = rows.len() / n;
    let mut out = Vec::with_capacity(rows.len());
    for rows in rows.chunks(head * bytes) {
        (0..head).for_each(|i| out.extend_from_slice(&rows[from(i) * bytes..][..bytes]));
    }
    out
}
