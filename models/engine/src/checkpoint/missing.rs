//! What an error about a missing tensor says: what the files have in its place.

use std::collections::BTreeSet;

/// Prefixes that PyTorch puts in front of all names, with what saves them without.
const PREFIXES: [(&str, &str); 3] = [
    ("module.", "save `model.module`, not the DataParallel around it"),
    ("_orig_mod.", "save `model._orig_mod`, not what torch.compile made of it"),
    ("base_model.model.", "merge the adapters first: `merge_and_unload` of peft"),
];

/// Parts of a layer, and the names under which other programs store several of them in one tensor.
const FUSED: [(&[&str], &[&str], &str); 5] = [
    (&["q_proj", "k_proj", "v_proj"], &["qkv_proj", "query_key_value", "W_pack"], "q, k and v"),
    (&["gate_proj", "up_proj"], &["gate_up_proj"], "gate and up"),
    (&["attn_q", "attn_k", "attn_v"], &["attn_qkv"], "q, k and v"),
    (&["ffn_gate"], &["ffn_gate_up", "ffn_up_gate"], "gate and up"),
    (
        &["experts.0.gate_proj.weight", "experts.0.up_proj.weight", "experts.0.down_proj.weight"],
        &[
            "experts.gate_up_proj",
            "experts.gate_up_proj.weight",
            "experts.down_proj",
            "experts.down_proj.weight",
        ],
        "all experts",
    ),
];

/// The end of "tensor `wanted` is missing": what there is instead, and what to do.
pub(super) fn instead<'a>(wanted: &str, names: impl Iterator<Item = &'a str> + Clone) -> String {
    let ends_with = |end: &str| {
        names.clone().find(|name| name.strip_suffix(end).is_some_and(|p| p.is_empty() || p.ends_with('.')))
    };
    if let Some(found) = ends_with(wanted) {
        let prefix = &found[..found.len() - wanted.len()];
        let known = PREFIXES.iter().find(|(known, _)| prefix.starts_with(known));
        let advice = known.map_or("rename the tensors", |(_, advice)| advice);
        return format!("; `{found}` is there: names with the prefix `{prefix}` are not read ({advice})");
    }
    if let Some(found) = wanted.strip_prefix("model.").and_then(ends_with) {
        return format!("; `{found}` is there: names must begin with `model.` (rename the tensors)");
    }
    for (parts, fused, what) in FUSED {
        let Some(part) = parts.iter().find(|part| wanted.contains(*part)) else { continue };
        if let Some(found) = fused.iter().find_map(|name| ends_with(&wanted.replace(part, name))) {
            return format!("; `{found}` is there: {what} in one tensor are not read (split its rows)");
        }
    }
    let stem = wanted.strip_suffix("weight").unwrap_or(wanted);
    if let Some(found) = names.clone().find(|name| name.starts_with(stem)) {
        return format!("; `{found}` is there, which is not read in its place");
    }
    match names.clone().next() {
        Some(first) => format!("; the files have {} tensors, such as `{first}`", names.count()),
        None => "; the files have no tensors".into(),
    }
}

/// What an unknown architecture has and no known one has, as the end of a sentence: names of tensors, and keys.
pub(super) fn listed(tensors: &BTreeSet<String>, keys: &BTreeSet<String>) -> String {
    const SHOWN: usize = 8;
    let list = |what: &str, names: &BTreeSet<String>| {
        let shown: Vec<_> =
            names.iter().take(SHOWN).map(|name| format!("`{}`", name.escape_debug())).collect();
        let more = names.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!names.is_empty()).then(|| format!("{what} {}{more}", shown.join(", ")))
    };
    let lists: Vec<_> = [list("tensors", tensors), list("keys", keys)].into_iter().flatten().collect();
    match lists[..] {
        [] => {
            "; all of its tensors and keys are known: it may be a supported architecture under another name"
                .into()
        }
        _ => format!("; no supported architecture has its {}", lists.join(", and its ")),
    }
}

#[cfg(test)]
mod tests {
    use super::instead;

    #[test]
    fn what_is_there_instead_is_said() {
        const Q: &str = "model.layers.0.self_attn.q_proj.weight";
        for (wanted, there, said) in [
            (Q, "module.model.layers.0.self_attn.q_proj.weight", "the prefix `module.` are not read (save"),
            (Q, "_orig_mod.model.layers.0.self_attn.q_proj.weight", "`_orig_mod.` are not read (save"),
            (Q, "module._orig_mod.model.layers.0.self_attn.q_proj.weight", "`module._orig_mod.`"),
            (Q, "language_model.model.layers.0.self_attn.q_proj.weight", "(rename the tensors)"),
            (Q, "layers.0.self_attn.q_proj.weight", "must begin with `model.`"),
            (Q, "model.layers.0.self_attn.qkv_proj.weight", "q, k and v in one tensor"),
            ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight", "gate and up"),
            ("blk.3.attn_k.weight", "blk.3.attn_qkv.weight", "q, k and v in one tensor"),
            (
                "model.layers.1.mlp.experts.0.gate_proj.weight",
                "model.layers.1.mlp.experts.gate_up_proj",
                "all experts in one tensor",
            ),
            (
                Q,
                "model.layers.0.self_attn.q_proj.qweight",
                "`model.layers.0.self_attn.q_proj.qweight` is there",
            ),
            (
                Q,
                "transformer.h.0.attn.c_attn.weight",
                "1 tensors, such as `transformer.h.0.attn.c_attn.weight`",
            ),
        ] {
            let help = instead(wanted, ["other", there].into_iter().skip(usize::from(said.starts_with('1'))));
            assert!(help.starts_with("; ") && help.contains(said), "{there}: {help}");
        }
        assert_eq!(instead(Q, std::iter::empty()), "; the files have no tensors");
    }
}
