//! GGUF files as other programs write them: what is read although keys or types differ, and which error comes
//! first where it is not.

use bitnet_burn::{GatedActivation, Norm, Projection};
use bitnet_burn_engine::checkpoint::{Checkpoint, LoadError, OpenOptions, Rotated, Weights};
use bitnet_burn_formats::FileError;

use crate::gguf::*;

/// Converters write `linear` with the factor 1 into every file of some models.
#[test]
fn keys_that_change_nothing_are_accepted() {
    let dir = Dir::new();
    let plain = dir.open_and_check(&model()).unwrap();
    for keys in [
        &[("rope.scaling.type", "none")][..],
        &[("rope.scaling.type", "linear"), ("rope.scaling.factor", "1")],
        &[("rope.scaling.type", "linear"), ("rope.scaling.factor", "0")],
        &[("rope.scaling.type", "linear")],
        &[("rope.scaling.factor", "1"), ("rope.scaling.attn_factor", "1")],
        &[("rope.scale_linear", "1")],
        &[("rope.scaling.type", "yarn"), ("rope.scaling.factor", "1"), ("rope.scaling.yarn_beta_fast", "16")],
        // llama.cpp ignores the factor then.
        &[("rope.scaling.type", "none"), ("rope.scaling.factor", "4")],
    ] {
        let checkpoint = dir.open_and_check(&rope(keys)).unwrap();
        assert_eq!(checkpoint.config(), plain.config(), "{keys:?}");
        assert_eq!(checkpoint.warnings(), &[] as &[String], "{keys:?}");
    }
}

/// As `llama-gguf-split` writes them: keys and some tensors in the first part, the other tensors in the second.
#[test]
fn a_model_in_parts_is_the_model_in_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, number) = (model(), |key: &str, value: u32| (key.to_owned(), value.to_le_bytes()));
    let split = |mut raw: Raw, part: u32| {
        for (key, value) in [number("split.no", part), number("split.count", 2)] {
            raw = raw.key(&key, U32, value);
        }
        let (key, count) = number("split.tensors.count", whole.tensors.len() as u32);
        raw.key(&key, U32, count)
    };
    let (mut first, mut second) = (split(whole.clone(), 0), split(Raw::new(), 1));
    second.tensors = first.tensors.split_off(whole.tensors.len() / 2);
    let path = |part: u32| dir.path().join(format!("m-{part:05}-of-00002.gguf"));
    std::fs::write(path(1), first.bytes()).unwrap();
    std::fs::write(path(2), second.bytes()).unwrap();
    let one = Dir::new().open_and_check(&whole).unwrap();
    for opened in [path(1), dir.path().to_owned()] {
        let parts = Checkpoint::open(&opened, &OpenOptions::default()).unwrap();
        assert_eq!((parts.config(), parts.check().unwrap()), (one.config(), one.check().unwrap()));
        for which in Projection::ALL {
            let [a, b] = [&one, &parts].map(|c| c.projection(0, which).unwrap());
            assert_eq!((a.codes, a.scale), (b.codes, b.scale));
        }
        assert_eq!(parts.contents().len(), 2);
    }
}

/// Of several faults the one is named that no other program's file would mend.
#[test]
fn the_error_that_matters_comes_first() {
    let dir = Dir::new();
    let with = |architecture: &str, types: &[(&str, u32)]| {
        let mut raw = model();
        *raw.value("general.architecture") = string(architecture);
        for (name, kind) in types {
            raw.tensor_mut(name).kind = *kind;
        }
        raw
    };
    // A model of an architecture that is not read, in a type that is not read.
    let other = with("mamba", &[("blk.0.attn_q.weight", 41)]);
    assert_refused("another", dir.open(&other), &["architecture `mamba` is not supported", "bitnet-b1.58"]);
    let bytes = other.bytes().into();
    let from_memory = Checkpoint::from_gguf("other.gguf".as_ref(), bytes, &OpenOptions::default());
    assert_refused("another in memory", from_memory, &["architecture `mamba`"]);
    assert_refused("another, parsed", parse(&other.bytes()), &["blk.0.attn_q.weight", "Q1_0 (41)"]);
    // What `llama-quantize` makes of a ternary file, and of any other.
    let embedding = ("token_embd.weight", 10);
    let ternary = with("bitnet-b1.58", &[embedding]);
    let parts = ["token_embd.weight", "Q2_K (10)", "--token-embedding-type q6_k"];
    assert_refused("a ternary file", dir.open(&ternary), &parts);
    let others = with("bitnet-b1.58", &[embedding, ("blk.0.ffn_up.weight", 14), ("blk.0.attn_q.weight", 10)]);
    let parts = ["blk.0.attn_q.weight", "Q2_K (10)", "only models with ternary projections"];
    assert_refused("no ternary file", dir.open(&others), &parts);
}

#[test]
fn the_activation_is_never_guessed_where_guessing_goes_wrong() {
    let dir = Dir::new();
    let act = |raw: &Raw, hidden_act| {
        let options = OpenOptions { hidden_act, ..Default::default() };
        Checkpoint::open(&dir.write(&raw.bytes()), &options)
            .map(|c| (c.config().activation, c.warnings().len()))
    };
    let (relu2, silu) = (GatedActivation::Relu2, GatedActivation::Silu);
    assert_eq!(act(&model(), None).unwrap(), (relu2, 0));
    let mut named_25 = model();
    *named_25.value("general.architecture") = string("bitnet-25"); // its keys stay those of bitnet-b1.58
    assert_eq!(act(&named_25, None).unwrap(), (relu2, 0));
    assert_eq!(act(&older_model(), None).unwrap(), (silu, 0));
    assert_eq!(act(&older_model(), Some(relu2)).unwrap(), (relu2, 1));
    assert_eq!(act(&older_model(), Some(silu)).unwrap(), (silu, 0));
    for key in ["bitnet.hidden_act", "bitnet.feed_forward.activation", "bitnet-b1.58.hidden_act"] {
        let stated = older_model().key(key, STRING, string("relu2"));
        assert_eq!(act(&stated, None).unwrap(), (relu2, 0), "{key}");
        assert_eq!(act(&stated, Some(silu)).unwrap(), (silu, 1), "{key}");
    }

    // The shape of 2B-4T decides by its keys, before any tensor is looked at.
    let mut shape = older_model();
    for (key, value) in [
        ("embedding_length", 2560u32),
        ("feed_forward_length", 6912),
        ("block_count", 30),
        ("vocab_size", 128_256),
        ("attention.head_count", 20),
        ("attention.head_count_kv", 5),
        ("rope.dimension_count", 128),
    ] {
        *shape.value(&format!("bitnet.{key}")) = value.to_le_bytes().to_vec();
    }
    assert_refused(
        "2B-4T as bitnet",
        act(&shape, None),
        &["2B-4T", "--hidden-act relu2", "--hidden-act silu"],
    );
    for chosen in
        [act(&shape, Some(relu2)), act(&shape.clone().key("bitnet.hidden_act", STRING, string("silu")), None)]
    {
        assert_refused("2B-4T, chosen", chosen, &["blk.0.attn_norm.weight"]);
    }
}

#[test]
fn what_community_files_leave_out_or_add_is_accepted() {
    let dir = Dir::new();
    // No vocab_size: the embedding's rows. No freq_base: llama.cpp's default, with a warning.
    let raw = model().without("bitnet-b1.58.vocab_size").without("bitnet-b1.58.rope.freq_base");
    let checkpoint = dir.open_and_check(&raw).unwrap();
    assert_eq!((checkpoint.config().vocab_size, checkpoint.config().rope_theta), (4, 10_000.0));
    assert!(checkpoint.warnings()[0].contains("rope.freq_base"), "{:?}", checkpoint.warnings());
    // Keys of `bitnet` in a file of `bitnet-b1.58`.
    let mut raw = older_model();
    *raw.value("general.architecture") = string("bitnet-b1.58");
    assert_eq!(dir.open(&raw).unwrap().config().activation, GatedActivation::Relu2);
    // No dimension count, no KV heads, sizes as arrays, a token -1, RoPE factors of 1, an unknown tensor.
    let raw = model()
        .without("bitnet-b1.58.rope.dimension_count")
        .without("bitnet-b1.58.feed_forward_length")
        .without("tokenizer.ggml.bos_token_id")
        .key("bitnet-b1.58.feed_forward_length", ARRAY, array(U32, 1, &128u32.to_le_bytes()))
        .key("tokenizer.ggml.bos_token_id", 5, (-1i32).to_le_bytes())
        .tensor("rope_freqs.weight", &[2], 0, f32s(&[1.0, 1.0]))
        .tensor("something.else", &[1], 0, f32s(&[1.0]));
    let checkpoint = dir.open_and_check(&raw).unwrap();
    assert_eq!((checkpoint.config().intermediate_size, checkpoint.config().bos_token), (128, None));
    assert!(
        checkpoint.warnings().iter().any(|w| w.contains("something.else")),
        "{:?}",
        checkpoint.warnings()
    );
    // Special tokens beyond the vocabulary.
    let mut raw = model();
    *raw.value("tokenizer.ggml.eos_token_id") = 4u32.to_le_bytes().to_vec();
    let checkpoint = dir.open(&raw).unwrap();
    assert_eq!(checkpoint.config().eos_tokens, [3]);
    assert!(checkpoint.warnings()[0].contains("token 4"), "{:?}", checkpoint.warnings());
    // Without types, or with wrong ones, the end of a turn is known by its text.
    let mut normal = model();
    *normal.value("tokenizer.ggml.token_type") = array(5, 4, &[1i32; 4].map(i32::to_le_bytes).concat());
    for raw in [normal, model().without("tokenizer.ggml.token_type")] {
        assert_eq!(dir.open(&raw).unwrap().config().eos_tokens, [2, 3]);
    }
    // A separate scale multiplies.
    for name in ["blk.0.attn_q.scale", "blk.0.attn_q.weight_scale", "blk.0.attn_q_scale"] {
        let checkpoint = dir.open_and_check(&model().tensor(name, &[1], 0, f32s(&[3.0]))).unwrap();
        assert_eq!(checkpoint.projection(0, Projection::Q).unwrap().scale, 1.5, "{name}");
        assert_eq!(checkpoint.projection(0, Projection::K).unwrap().scale, 0.5, "{name}");
    }
    // A separate head.
    let checkpoint =
        dir.open_and_check(&model().tensor("output.weight", &[128, 4], 1, vec![0; 1024])).unwrap();
    assert!(!checkpoint.config().tied_embeddings && checkpoint.output().unwrap().is_some());
    // Without sub-norms.
    let mut raw = model();
    raw.tensors.retain(|t| !t.name.ends_with(b"sub_norm.weight"));
    let checkpoint = dir.open_and_check(&raw).unwrap();
    assert!(!checkpoint.config().sub_norms);
    assert!(matches!(
        checkpoint.norm(Norm::AttentionSub(0)),
        Err(LoadError::File(FileError::MissingTensor { .. }))
    ));
    assert!(matches!(
        checkpoint.norm(Norm::Attention(1)),
        Err(LoadError::NoSuchLayer { layer: 1, n_layers: 1, .. })
    ));
    assert!(matches!(checkpoint.projection(9, Projection::Q), Err(LoadError::NoSuchLayer { .. })));
}

/// One matrix in every type that can hold it: the same codes, and scales that the type can hold.
#[test]
fn types_can_be_mixed() {
    let dir = Dir::new();
    let mut raw = model();
    // Widths of 256, for the sake of TQ1_0 and TQ2_0.
    for (key, value) in
        [("embedding_length", 256u32), ("rope.dimension_count", 128), ("feed_forward_length", 256)]
    {
        *raw.value(&format!("bitnet-b1.58.{key}")) = value.to_le_bytes().to_vec();
    }
    for t in &mut raw.tensors {
        let name = String::from_utf8(t.name.clone()).unwrap();
        (t.dims, t.data) = match (&name[..], t.kind) {
            ("token_embd.weight", _) => (vec![256, 4], vec![0x11; 2048]),
            (_, 0) => (vec![256], f32s(&[1.0; 256])),
            (name, _) if name.contains("attn_k") || name.contains("attn_v") => {
                (vec![256, 128], i2_s(256 * 128))
            }
            _ => (vec![256, 256], i2_s(256 * 256)),
        };
    }
    let reference = dir.open_and_check(&raw).unwrap();
    let parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    let values: Vec<(Projection, Vec<f32>)> = Projection::ALL
        .iter()
        .map(|&which| {
            use bitnet_burn_formats::canonical::{Row, row_bytes};
            let t = reference.projection(0, which).unwrap();
            let weight =
                |i: usize| f32::from(Row(&t.codes[i / t.k * row_bytes(t.k)..]).weight(i % t.k)) * t.scale;
            (which, (0..t.n * t.k).map(weight).collect())
        })
        .collect();
    let f16 = |v: f32| [0, if v == 0.0 { 0 } else { 0x38 | if v < 0.0 { 0x80 } else { 0 } }]; // 0.5 is 0x3800
    let blocks =
        |v: &[f32], of: usize, f: &dyn Fn(&[f32]) -> Vec<u8>| v.chunks(of).flat_map(f).collect::<Vec<u8>>();
    let encoded: [(u32, Vec<u8>); 6] = [
        (0, f32s(&values[0].1)),
        (1, values[1].1.iter().flat_map(|&v| f16(v)).collect()),
        (30, values[2].1.iter().flat_map(|v| v.to_le_bytes()[2..].to_vec()).collect()),
        // Q4_0: d = 0.5 / 8 = 0x2c00 with the sign of -max; +s is code 15 where d > 0, -s code 0.
        (
            2,
            blocks(&values[3].1, 32, &|v| {
                let q = |x: f32| {
                    if x > 0.0 {
                        15u8
                    } else if x < 0.0 {
                        0
                    } else {
                        8
                    }
                };
                [0, 0x2c].into_iter().chain((0..16).map(|i| q(v[i]) | q(v[16 + i]) << 4)).collect()
            }),
        ),
        // TQ2_0.
        (
            35,
            blocks(&values[4].1, 256, &|v| {
                let code = |i: usize| (v[i] * 2.0 + 1.0) as u8;
                let byte =
                    |b: usize| (0..4).map(|g| code(b / 32 * 128 + 32 * g + b % 32) << (2 * g)).sum::<u8>();
                (0..64).map(byte).chain([0, 0x38]).collect()
            }),
        ),
        // Q8_0: codes -1, 0, 1 with d = 0.5; any d would do that all blocks share.
        (
            8,
            blocks(&values[5].1, 32, &|v| {
                [0, 0x38].into_iter().chain(v.iter().map(|x| (x * 2.0) as i8 as u8)).collect()
            }),
        ),
    ];
    for ((kind, data), part) in encoded.into_iter().zip(parts) {
        let tensor = raw.tensor_mut(&format!("blk.0.{part}.weight"));
        (tensor.kind, tensor.data) = (kind, data);
    }
    let mixed = dir.open_and_check(&raw).unwrap();
    for which in Projection::ALL {
        let (a, b) = (reference.projection(0, which).unwrap(), mixed.projection(0, which).unwrap());
        assert_eq!(a.scale, b.scale, "{which:?} {}", b.stored_as);
        assert!(a.codes == b.codes, "{which:?} {}", b.stored_as);
        assert!(b.codes.as_ptr().addr().is_multiple_of(32), "{which:?}");
    }
    assert_eq!(mixed.check().unwrap().zero_weights, reference.check().unwrap().zero_weights);
    let stored: Vec<_> = Projection::ALL.map(|which| mixed.projection(0, which).unwrap().stored_as).into();
    assert_eq!(stored, ["F32", "F16", "BF16", "Q4_0", "TQ2_0", "Q8_0", "I2_S"]);
}

/// Rows of 128 values in {-s, 0, s} as ik_llama.cpp's quantisers store them, with s before each.
fn iq_bn(kind: u32, values: &[f32]) -> Vec<u8> {
    let row = |values: &[f32]| {
        let s = values.iter().fold(0.0f32, |s, v| s.max(v.abs()));
        let code = |v: f32| if v.abs() < 0.5 * s { 1u32 } else { (1.0 + v.signum()) as u32 };
        if kind == 135 {
            let byte =
                |v: &[f32], j: usize| (0..4).map(|i| code(v[16 * i + j]) << (2 * i)).sum::<u32>() as u8;
            let blocks = values.chunks(64).flat_map(|v| (0..16).map(move |j| byte(v, j)));
            return s.to_le_bytes().into_iter().chain(blocks).collect::<Vec<u8>>();
        }
        // The first weight is the last digit.
        let byte = |v: &mut dyn DoubleEndedIterator<Item = f32>| {
            let number = v.rev().fold(0, |number, v| 3 * number + code(v));
            (256 * number).div_ceil(243) as u8
        };
        let mut out = half(s).to_vec();
        for v in values.chunks(64) {
            for v in v.chunks(16) {
                out.extend(v[..15].chunks(5).map(|v| byte(&mut v.iter().copied())));
            }
            out.push(byte(&mut v.iter().skip(15).step_by(16).copied()));
        }
        out
    };
    values.chunks(128).flat_map(row).collect()
}

/// A number in 0.25, 0.5, 1 and 2 as f16.
fn half(v: f32) -> [u8; 2] {
    let exponent = (v.to_bits() >> 23) as u16 + 15 - 127;
    (exponent << 10).to_le_bytes()
}

/// `ik_llama.cpp`'s ternary types: the weights of the I2_S file that they are made of, or a scale for each row.
#[test]
fn rows_that_begin_with_their_scale_are_read() {
    let dir = Dir::new();
    let values = |checkpoint: &Checkpoint, which: Projection| {
        let weights = checkpoint.weights(0, which).unwrap();
        let (n, k) = weights.shape();
        let mut values = vec![0.0; n * k];
        values.chunks_mut(k).enumerate().for_each(|(row, values)| weights.decode_row(row, values).unwrap());
        values
    };
    let parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    let expected = dir.open_and_check(&model()).unwrap();
    for kind in [134, 135] {
        let mut raw = model();
        for (part, which) in parts.into_iter().zip(Projection::ALL) {
            let tensor = raw.tensor_mut(&format!("blk.0.{part}.weight"));
            (tensor.kind, tensor.data) = (kind, iq_bn(kind, &values(&expected, which)));
        }
        let read = dir.open_and_check(&raw).unwrap();
        for which in Projection::ALL {
            let [a, b] = [&expected, &read].map(|c| c.projection(0, which).unwrap());
            assert!(a.codes == b.codes && a.scale == b.scale, "{kind} {which:?}");
            assert_eq!(b.stored_as, if kind == 134 { "IQ1_BN" } else { "IQ2_BN" });
        }
        // A model that is not BitNet may have a scale for each row, which need be no f16.
        for key in &mut raw.keys {
            key.0 = String::from_utf8(key.0.clone()).unwrap().replace("bitnet-b1.58.", "llama.").into_bytes();
        }
        *raw.value("general.architecture") = string("llama");
        raw.tensors.retain(|t| !String::from_utf8_lossy(&t.name).contains("sub_norm"));
        for (factor, format) in [(1.0, "Q2_0"), (1.1, "F32")] {
            if kind == 134 && factor != 1.0 {
                continue;
            }
            let mut rows = values(&expected, Projection::Up);
            let scale = |row: usize| factor * [0.5, 1.0, 2.0, 4.0][row % 4];
            rows.iter_mut().enumerate().for_each(|(i, v)| *v *= scale(i / 128));
            let tensor = raw.tensor_mut("blk.0.ffn_up.weight");
            tensor.data = iq_bn(kind, &rows);
            let read = dir.open_and_check(&raw).unwrap();
            assert!(values(&read, Projection::Up) == rows, "{kind}");
            let Weights::Dense(up) = read.weights(0, Projection::Up).unwrap() else { panic!("one scale") };
            assert_eq!(up.format.name(), format);
            // Its other projections have one scale.
            assert!(read.projection(0, Projection::Gate).is_ok());
        }
    }
}

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
fn rotations_that_are_not_known_or_do_not_fit_are_refused() {
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
