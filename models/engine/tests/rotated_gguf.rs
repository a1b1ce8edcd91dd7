//! GGUF files whose weights were rotated by a Hadamard transform: what the keys say is done, and what is not known is refused.

use bitnet_burn::Projection;
use bitnet_burn_engine::checkpoint::Rotated;

#[path = "support/gguf.rs"]
mod gguf;
use gguf::*;

const INT32: u32 = 5;

fn names(names: &[&str]) -> Vec<u8> {
    let items: Vec<u8> = names.iter().flat_map(string).collect();
    array(STRING, names.len() as u64, &items)
}

fn numbers(numbers: &[i32]) -> Vec<u8> {
    let items: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    array(INT32, numbers.len() as u64, &items)
}

fn signs() -> Vec<i32> {
    (0..128).map(|i| if i % 3 == 0 { -1 } else { 1 }).collect()
}

/// A model of which q, down and the embedding are rotated in runs of 32.
fn rotated() -> Raw {
    let key = |name: &str| format!("prism.hadamard.{name}");
    model()
        .key(&key("version"), U32, 1u32.to_le_bytes())
        .key(&key("block_size"), U32, 32u32.to_le_bytes())
        .key(&key("transform"), STRING, string("normalized-sylvester-walsh-hadamard"))
        .key(&key("axis"), STRING, string("input-last-dimension"))
        .key(&key("sign_mode"), STRING, string("explicit"))
        .key(&key("sign_widths"), ARRAY, numbers(&[128]))
        .key(&key("sign_values"), ARRAY, numbers(&signs()))
        .key(&key("weight_names"), ARRAY, names(&["blk.0.attn_q.weight", "blk.0.ffn_down.weight"]))
        .key(&key("inverse_weight_names"), ARRAY, names(&["token_embd.weight"]))
        .key(&key("gdn_v_grouped"), BOOL, [1])
}

#[test]
fn rotations_are_those_that_the_keys_name() {
    let dir = Dir::new();
    let checkpoint = dir.open_and_check(&rotated()).unwrap();
    let of = |of: Rotated| checkpoint.rotation(of).map(|r| (r.block, r.signs.to_vec()));
    let expected = Some((32, signs().iter().map(|&s| s as f32).collect::<Vec<_>>()));
    for (part, rotated) in [
        (Rotated::Projection(0, Projection::Q), true),
        (Rotated::Projection(0, Projection::Down), true),
        (Rotated::Projection(0, Projection::K), false),
        (Rotated::Embedding, true),
    ] {
        assert_eq!(of(part), expected.clone().filter(|_| rotated), "{part:?}");
    }
    // The head of a tied model is the rotated embedding.
    assert_eq!(of(Rotated::Output), expected.filter(|_| checkpoint.config().tied_embeddings));
    let mut identity = rotated().without("prism.hadamard.sign_widths").without("prism.hadamard.sign_values");
    *identity.value("prism.hadamard.sign_mode") = string("identity");
    let identity = dir.open_and_check(&identity).unwrap();
    assert_eq!(identity.rotation(Rotated::Embedding).unwrap().signs[..], [1.0; 128]);
    assert!(checkpoint.is_rotated() && !dir.open_and_check(&model()).unwrap().is_rotated());
    assert!(dir.open_and_check(&model()).unwrap().rotation(Rotated::Embedding).is_none());
}

#[test]
fn what_is_not_known_or_does_not_fit_is_refused() {
    let dir = Dir::new();
    let changed = |key: &str, value: Vec<u8>| {
        let mut raw = rotated();
        *raw.value(&format!("prism.hadamard.{key}")) = value;
        raw
    };
    let cases = [
        (changed("version", 2u32.to_le_bytes().to_vec()), "prism.hadamard.version is 2"),
        (changed("block_size", 24u32.to_le_bytes().to_vec()), "a power of two"),
        (changed("block_size", 0u32.to_le_bytes().to_vec()), "a power of two"),
        (changed("block_size", 256u32.to_le_bytes().to_vec()), "in runs of 256"),
        (changed("transform", string("dct")), "prism.hadamard.transform is"),
        (changed("axis", string("output")), "input-last-dimension"),
        (changed("sign_mode", string("random")), "identity, explicit"),
        (changed("sign_widths", numbers(&[64])), "sum is the number of signs"),
        (changed("sign_widths", numbers(&[128, -1])), "sum is the number of signs"),
        (changed("sign_widths", numbers(&[64, 64])), "sign_widths` lacks them"),
        (changed("sign_values", numbers(&[2; 128])), "-1 or 1"),
        (changed("weight_names", names(&["blk.7.attn_q.weight"])), "blk.7.attn_q.weight"),
        (changed("weight_names", names(&["output_norm.weight"])), "output_norm.weight"),
        (changed("weight_names", numbers(&[1])), "names of tensors"),
        (rotated().key("prism.hadamard.strength", U32, 1u32.to_le_bytes()), "prism.hadamard.strength"),
        (rotated().without("prism.hadamard.version"), "prism.hadamard.version"),
        (rotated().without("prism.hadamard.sign_values"), "prism.hadamard.sign_values"),
    ];
    for (raw, words) in cases {
        assert_refused(words, dir.open(&raw), &[words]);
    }
}
