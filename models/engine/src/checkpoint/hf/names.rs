//! Names of tensors that differ from those of transformers' BitNet.

/// 1bitLLM's names of the sub-norms, and transformers' for the same.
const OLDER: [(&str, &str); 2] = [
    (".self_attn.inner_attn_ln.weight", ".self_attn.attn_sub_norm.weight"),
    (".mlp.ffn_layernorm.weight", ".mlp.ffn_sub_norm.weight"),
];

/// The name under which 1bitLLM's files have this tensor, where it is another.
pub(super) fn older_name(name: &str) -> Option<String> {
    OLDER.iter().find_map(|(older, newer)| Some(name.strip_suffix(newer)?.to_owned() + older))
}

/// Whether this is a norm in front of an output projection, under either name.
pub(super) fn is_sub_norm(name: &str) -> bool {
    OLDER.iter().any(|(older, newer)| name.ends_with(older) || name.ends_with(newer))
}
