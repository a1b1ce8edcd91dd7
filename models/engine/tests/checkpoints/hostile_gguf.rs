//! GGUF files that lie: every one must be refused with an error that says what is wrong, without a panic,
//! without a hang, and without an allocation out of proportion to the file.
//!
//! Files are built byte by byte here, not by `GgufWriter`, which could not write them. The small ones are
//! kept in `testdata/hostile/` for other programs to try; after a change, `BITNET_BLESS=1 cargo test` writes
//! them anew.

use bitnet_burn::GatedActivation;
use bitnet_burn::Projection;
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions, Pooling, TokenizerSource};
use bitnet_burn_formats::gguf::GgufFile;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use crate::gguf::*;

/// Counts what each thread allocates.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is left to the system's allocator; counting touches a thread-local without a
// destructor, which allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.with(|a| a.set(a.get().saturating_add(layout.size())));
        // SAFETY: the caller's promises are those that System asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `f`; says how many bytes it asked for in all.
fn allocated<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATED.with(Cell::get);
    let result = f();
    (result, ALLOCATED.with(Cell::get) - before)
}

/// The smallest file that can be opened.
fn tiny() -> Raw {
    Raw::new()
        .key("general.architecture", STRING, string("bitnet"))
        .tensor("a", &[4, 2], 0, f32s(&[0.0; 8]))
        .tensor("b", &[8], 1, vec![0; 16])
}

#[test]
fn the_models_that_the_others_are_derived_from_are_good() {
    let dir = Dir::new();
    let checkpoint = dir.open_and_check(&model()).unwrap();
    assert_eq!(checkpoint.warnings(), &[] as &[String]);
    let config = checkpoint.config();
    assert_eq!(
        (config.activation, config.sub_norms, config.tied_embeddings),
        (GatedActivation::Relu2, true, true)
    );
    assert_eq!(config.eos_tokens, [2, 3]); // the second by its text
    let report = checkpoint.check().unwrap();
    assert_eq!((report.tensors, report.ternary_weights), (13, 128 * (128 * 5 + 64 * 2)));
    assert_eq!(report.dense_values, 128 * 9);
    let TokenizerSource::Gguf(tokenizer) = checkpoint.tokenizer_source() else { panic!("a GGUF tokenizer") };
    assert_eq!(tokenizer.tokens, ["a", "ß", "c", "<|eot_id|>"]);
    assert_eq!((tokenizer.merges, tokenizer.token_types), (vec!["a ß".to_owned()], vec![1, 1, 3, 3]));
    assert_eq!((tokenizer.bos, tokenizer.eos, tokenizer.add_bos), (Some(1), Some(2), Some(true)));
    parse(&tiny().bytes()).unwrap();
    dir.open_and_check(&older_model()).unwrap();
}

/// Small files that are refused when their header is read: (name, file, what the error says).
fn corpus() -> Vec<(&'static str, Vec<u8>, Vec<&'static str>)> {
    let mut all = Vec::new();
    let mut add = |name, bytes: Vec<u8>, parts: &[&'static str]| all.push((name, bytes, parts.to_vec()));
    let change = |f: &dyn Fn(&mut Raw)| {
        let mut raw = tiny();
        f(&mut raw);
        raw.bytes()
    };
    add("empty", vec![], &["empty"]);
    add("magic_only", b"GGUF".to_vec(), &["the version", "4 bytes at offset 4", "the file has 4"]);
    add("wrong_magic", change(&|r| r.magic = *b"GGXX"), &["GGXX", "GGUF"]);
    add("zip", b"PK\x03\x04 and so on".to_vec(), &["zip", "safetensors"]);
    add("web_page", b"<!DOCTYPE html><html>".to_vec(), &["web page"]);
    add("lfs_pointer", b"version https://git-lfs.github.com/spec/v1\n".to_vec(), &["Git LFS"]);
    add("big_endian", change(&|r| r.version = 3u32.swap_bytes()), &["big-endian", "version 3"]);
    add("byte_swapped_magic", change(&|r| r.magic = *b"FUGG"), &["big-endian"]);
    add("version_1", change(&|r| r.version = 1), &["version 1", "2 and 3"]);
    add("version_4", change(&|r| r.version = 4), &["version 4", "2 and 3"]);
    add("keys_2_60", change(&|r| r.n_keys = Some(1 << 60)), &["number of keys", "1152921504606846976"]);
    add(
        "tensors_2_60",
        change(&|r| r.n_tensors = Some(1 << 60)),
        &["number of tensors", "1152921504606846976"],
    );
    add("keys_60000", change(&|r| r.n_keys = Some(60_000)), &["60000", "truncated"]);
    add("tensors_200000", change(&|r| r.n_tensors = Some(200_000)), &["200000", "truncated"]);
    let mut long = tiny().bytes();
    long[24..32].copy_from_slice(&(1u64 << 60).to_le_bytes());
    add("key_length_2_60", long.clone(), &["name of key 1 of 1", "1152921504606846976"]);
    long[24..32].copy_from_slice(&60_000u64.to_le_bytes());
    add("key_length_beyond_the_end", long, &["name of key 1 of 1", "60000 bytes", "truncated"]);
    add("key_empty", change(&|r| r.keys[0].0.clear()), &["name of key 1 of 1"]);
    add("key_not_utf8", change(&|r| r.keys[0].0[3] = 0xff), &["name of key 1", "offset 35", "UTF-8"]);
    add(
        "key_twice",
        change(&|r| r.keys.push(r.keys[0].clone())),
        &["key `general.architecture` occurs twice"],
    );
    add("value_type_13", change(&|r| r.keys[0].1 = 13), &["general.architecture", "13"]);
    let value = |kind, value: Vec<u8>| tiny().key("k", kind, value).bytes();
    add(
        "string_2_60",
        value(STRING, (1u64 << 60).to_le_bytes().to_vec()),
        &["`k`", "1152921504606846976 bytes"],
    );
    add("string_not_utf8", value(STRING, string(b"ab\xc3\x28")), &["`k`", "UTF-8"]);
    add("bool_2", value(BOOL, vec![2]), &["`k`", "bool of 2"]);
    add("array_2_60", value(ARRAY, array(U32, 1 << 60, &[])), &["`k`", "1152921504606846976 u32"]);
    add("array_overflow", value(ARRAY, array(10, 1 << 61, &[])), &["`k`", "2305843009213693952 u64"]);
    add("array_of_strings_2_60", value(ARRAY, array(STRING, 1 << 60, &[])), &["`k`", "string"]);
    add("array_of_type_99", value(ARRAY, array(99, 1, &[0; 8])), &["`k`", "99"]);
    add("array_of_bool_3", value(ARRAY, array(BOOL, 3, &[0, 1, 3])), &["`k`", "bool of 3"]);
    add("array_string_not_utf8", value(ARRAY, array(STRING, 1, &string([0xff]))), &["`k`", "UTF-8"]);
    let mut bomb = array(U32, 0, &[]);
    for _ in 0..100 {
        bomb = array(ARRAY, 1, &bomb);
    }
    add("array_nested_100_deep", value(ARRAY, bomb), &["`k`", "4 arrays deep"]);
    let alignment = |v: u32| tiny().key("general.alignment", U32, v.to_le_bytes()).bytes();
    add("alignment_0", alignment(0), &["general.alignment", "power of two"]);
    add("alignment_33", alignment(33), &["general.alignment", "33", "power of two"]);
    add("alignment_2_31", alignment(1 << 31), &["`a`", "data section of 0"]);
    add(
        "alignment_text",
        tiny().key("general.alignment", STRING, string("32")).bytes(),
        &["general.alignment"],
    );
    add(
        "tensor_name_not_utf8",
        change(&|r| r.tensors[1].name = vec![0xfe]),
        &["name of tensor 2 of 2", "UTF-8"],
    );
    add("tensor_name_empty", change(&|r| r.tensors[1].name.clear()), &["name of tensor 2 of 2"]);
    add("tensor_twice", change(&|r| r.tensors[1].name = b"a".to_vec()), &["tensor `a` occurs twice"]);
    add("no_dimensions", change(&|r| r.tensors[0].dims.clear()), &["dimensions of tensor `a`"]);
    add(
        "five_dimensions",
        change(&|r| r.tensors[0].dims = vec![1; 5]),
        &["dimensions of tensor `a`", "5", "4"],
    );
    add("zero_dimension", change(&|r| r.tensors[0].dims[1] = 0), &["`a`", "[4, 0]", "zero"]);
    add("elements_overflow", change(&|r| r.tensors[0].dims = vec![1 << 32, 1 << 32]), &["`a`", "overflows"]);
    add("bytes_overflow", change(&|r| r.tensors[0].dims = vec![1 << 62]), &["`a`", "overflows"]);
    add("type_q2_k", change(&|r| r.tensors[0].kind = 10), &["`a`", "Q2_K (10)", "I2_S (36)", "Q6_K (14)"]);
    let ik = ["`a`", "IQ2_BN_R4 of ik_llama.cpp (335)", "as iq2_bn, without --repack"];
    let tl1 = [
        "`a`",
        "TL1 of bitnet.cpp (38)",
        "setup_env.py -md MODEL -q i2_s",
        "bitnet convert DIRECTORY --to gguf",
    ];
    add("type_iq2_bn_r4", change(&|r| r.tensors[0].kind = 335), &ik);
    add("type_tl1", change(&|r| r.tensors[0].kind = 38), &tl1);
    add(
        "iq2_bn_k_32",
        change(&|r| (r.tensors[0].kind, r.tensors[0].dims[0]) = (135, 32)),
        &["`a`", "IQ2_BN", "64"],
    );
    add(
        "iq1_bn_short",
        change(&|r| (r.tensors[0].kind, r.tensors[0].dims) = (134, vec![64, 1 << 20])),
        &["`a`"],
    );
    add("type_4711", change(&|r| r.tensors[0].kind = 4711), &["`a`", "4711 (unknown)"]);
    add(
        "i2_s_k_64",
        change(&|r| (r.tensors[0].kind, r.tensors[0].dims[0]) = (36, 64)),
        &["`a`", "128", "64"],
    );
    add(
        "tq2_0_k_128",
        change(&|r| (r.tensors[0].kind, r.tensors[0].dims[0]) = (35, 128)),
        &["`a`", "TQ2_0", "256"],
    );
    add(
        "q8_0_k_33",
        change(&|r| (r.tensors[0].kind, r.tensors[0].dims[0]) = (8, 33)),
        &["`a`", "Q8_0", "32", "33"],
    );
    add("offset_unaligned", change(&|r| r.tensors[1].offset = Some(33)), &["`b`", "33", "32 bytes"]);
    add("offset_beyond_the_end", change(&|r| r.tensors[1].offset = Some(1 << 40)), &["`b`", "1099511627776"]);
    add(
        "offset_overflows",
        change(&|r| r.tensors[1].offset = Some(u64::MAX - 31)),
        &["`b`", "18446744073709551584"],
    );
    add("tensor_beyond_the_end", change(&|r| r.tensors[1].dims = vec![9]), &["`b`", "18 bytes", "truncated"]);
    add(
        "tensors_overlap",
        change(&|r| r.tensors[1].offset = Some(0)),
        &["`a`", "ends at 32", "`b`", "begins at 0"],
    );
    let (header, bytes) = tiny().header_and_bytes();
    add("cut_in_the_header", bytes[..header - 9].to_vec(), &["tensor `b`", "truncated"]);
    add("cut_before_the_data", bytes[..header].to_vec(), &["`a`", "data section of 0"]);
    all
}

#[test]
fn each_lie_is_named() {
    for (name, bytes, parts) in corpus() {
        let (result, allocated) = allocated(|| parse(&bytes));
        assert_refused(name, result, &parts);
        assert!(allocated < 64 << 10, "{name}: {allocated} bytes allocated for a file of {}", bytes.len());
    }
}

#[test]
fn the_files_kept_are_refused() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/hostile");
    for (name, bytes, parts) in corpus() {
        let path = folder.join(format!("{name}.gguf"));
        if std::env::var_os("BITNET_BLESS").is_some() {
            std::fs::write(&path, &bytes).unwrap();
        }
        assert!(
            std::fs::read(&path).is_ok_and(|kept| kept == bytes),
            "{} is not what is tested here",
            path.display()
        );
        assert_refused(name, Checkpoint::open(&path, &OpenOptions::default()), &parts);
    }
}

#[test]
fn models_that_contradict_themselves_are_refused() {
    let dir = Dir::new();
    let arch = "bitnet-b1.58";
    let change = |f: &dyn Fn(&mut Raw)| {
        let mut raw = model();
        f(&mut raw);
        raw
    };
    let key = |key: &str, value: u32| {
        change(&|r| *r.value(&format!("{arch}.{key}")) = value.to_le_bytes().to_vec())
    };
    let drop = |name: &str| change(&|r| r.tensors.retain(|t| t.name != name.as_bytes()));
    let extra = |name: &str, values: &[f32]| model().tensor(name, &[values.len() as u64], 0, f32s(values));
    let rename = |from: &str, to: &str| change(&|r| r.tensor_mut(from).name = to.into());
    let retype = |name: &str, kind: u32, data: Vec<u8>| {
        change(&|r| {
            let tensor = r.tensor_mut(name);
            tensor.kind = kind;
            tensor.data.clone_from(&data);
        })
    };
    let mut not_ternary = vec![0.25f32; 128 * 64];
    not_ternary[129] = 0.5;
    let mut with_nan = vec![1.0f32; 128];
    with_nan[7] = f32::NAN;
    let mut two_scales: Vec<u8> = [[0x55u8; 36]; 64].concat();
    for (row, data) in two_scales.chunks_mut(36).enumerate() {
        data[..4].copy_from_slice(&(if row == 9 { 0.25f32 } else { 0.5 }).to_le_bytes());
        data[4] = 0b01_01_01_10;
    }
    let cases: Vec<(&str, Raw, &[&str])> = vec![
        (
            "rows with two scales",
            retype("blk.0.attn_k.weight", 135, two_scales),
            &["blk.0.attn_k.weight", "IQ2_BN", "block 9 has the scale 0.25", "0.5"],
        ),
        (
            "no activations beside I2_S",
            model().key("bitnet-b1.58.int8_activations", BOOL, [0]),
            &["bitnet-b1.58.int8_activations", "false"],
        ),
        (
            "activations that are a number",
            model().key("bitnet-b1.58.int8_activations", U32, 1u32.to_le_bytes()),
            &["bitnet-b1.58.int8_activations", "a bool"],
        ),
        ("no architecture", model().without("general.architecture"), &["general.architecture", "bitnet-25"]),
        (
            "other architecture",
            change(&|r| *r.value("general.architecture") = string("mamba")),
            &["`mamba`", "bitnet-b1.58, bitnet-25, bitnet"],
        ),
        (
            "a shard",
            model().key("split.count", U32, 2u32.to_le_bytes()),
            &["first part", "-00001-of-00002.gguf"],
        ),
        (
            "a shard of another architecture",
            change(&|r| *r.value("general.architecture") = string("mamba")).key(
                "split.count",
                U32,
                2u32.to_le_bytes(),
            ),
            &["first part", "-00001-of-00002.gguf"],
        ),
        (
            "a shard behind the first",
            tiny().without("general.architecture").key("split.count", U32, 2u32.to_le_bytes()),
            &["first part", "-00001-of-00002.gguf"],
        ),
        ("no width", model().without("bitnet-b1.58.embedding_length"), &["bitnet-b1.58.embedding_length"]),
        (
            "no eps",
            model().without("bitnet-b1.58.attention.layer_norm_rms_epsilon"),
            &["layer_norm_rms_epsilon"],
        ),
        ("no context", model().without("bitnet-b1.58.context_length"), &["context_length"]),
        ("zero layers", key("block_count", 0), &["n_layers", "0"]),
        ("absurd layers", key("block_count", u32::MAX), &["n_layers", "4294967295"]),
        ("too many layers", key("block_count", 2), &["blk.1.attn_norm.weight", "missing"]),
        (
            "no heads",
            key("attention.head_count", 0),
            &["attention.head_count", "divisor of the embedding length 128"],
        ),
        ("three heads", key("attention.head_count", 3), &["attention.head_count", "divisor"]),
        ("odd kv heads", key("attention.head_count_kv", 3), &["n_kv_heads", "3"]),
        ("other rope", key("rope.dimension_count", 32), &["rope.dimension_count", "32", "64"]),
        (
            "yarn without a factor",
            rope(&[("rope.scaling.type", "yarn")]),
            &["rope.scaling.factor", "missing"],
        ),
        (
            "yarn with a negative factor",
            rope(&[("rope.scaling.type", "yarn"), ("rope.scaling.factor", "-4")]),
            &["rope_scaling", "factor of -4"],
        ),
        (
            "yarn without amplitude",
            rope(&[
                ("rope.scaling.type", "yarn"),
                ("rope.scaling.factor", "2"),
                ("rope.scaling.yarn_attn_factor", "0"),
            ]),
            &["rope_scaling", "attention_factor of 0"],
        ),
        (
            "two factors",
            rope(&[("rope.scaling.factor", "2"), ("rope.scale_linear", "8")]),
            &["rope.scale_linear", "8", "2", "one factor"],
        ),
        (
            "linear by nothing",
            rope(&[("rope.scaling.type", "linear"), ("rope.scaling.factor", "nan")]),
            &["rope_scaling", "factor of NaN"],
        ),
        (
            "a kind of scaling",
            rope(&[("rope.scaling.type", "magic")]),
            &["rope.scaling.type", "magic", "yarn"],
        ),
        (
            "an amplitude alone",
            rope(&[("rope.scaling.type", "none"), ("rope.scaling.attn_factor", "0.5")]),
            &["rope.scaling.attn_factor", "0.5"],
        ),
        (
            "longrope without factors",
            rope(&[("rope.scaling.type", "longrope")]),
            &["rope_factors_short.weight", "missing", "longrope"],
        ),
        (
            "experts",
            model().key("bitnet-b1.58.expert_count", U32, 8u32.to_le_bytes()),
            &["expert_count", "8"],
        ),
        (
            "not causal",
            model().key("bitnet-b1.58.attention.causal", BOOL, [0]),
            &["bitnet-b1.58.attention.causal is false", "sees those before it"],
        ),
        ("wide FFN", key("feed_forward_length", 256), &["blk.0.ffn_sub_norm.weight", "[128]", "[256]"]),
        ("vocabulary", key("vocab_size", 5), &["token_embd.weight", "[4, 128]", "[5, 128]"]),
        (
            "a float for an integer",
            change(&|r| {
                let found = r.keys.iter_mut().find(|(k, ..)| k == b"bitnet-b1.58.block_count");
                found.expect("the key").1 = F32;
            }),
            &["block_count", "f32", "integer"],
        ),
        (
            "layers of different widths",
            model().without("bitnet-b1.58.feed_forward_length").key(
                "bitnet-b1.58.feed_forward_length",
                ARRAY,
                array(U32, 2, &[1, 0, 0, 0, 2, 0, 0, 0]),
            ),
            &["feed_forward_length", "one number for all layers"],
        ),
        (
            "unknown activation",
            model().key("bitnet-b1.58.hidden_act", STRING, string("gelu_fast")),
            &["hidden_act", "gelu_fast", "relu2, silu"],
        ),
        ("no embedding", drop("token_embd.weight"), &["token_embd.weight", "missing"]),
        ("no projection", drop("blk.0.ffn_up.weight"), &["blk.0.ffn_up.weight", "missing"]),
        (
            "a fused projection",
            rename("blk.0.attn_q.weight", "blk.0.attn_qkv.weight"),
            &["`blk.0.attn_q.weight` is missing", "`blk.0.attn_qkv.weight` is there", "split its rows"],
        ),
        ("half the sub-norms", drop("blk.0.ffn_sub_norm.weight"), &["blk.0.ffn_sub_norm.weight", "missing"]),
        ("a bias", extra("blk.0.attn_q.bias", &[0.0; 128]), &["blk.0.attn_q.bias", "no bias"]),
        ("an unknown norm", extra("blk.0.attn_q_norm.weight", &[1.0; 64]), &["blk.0.attn_q_norm.weight"]),
        ("a layer too many", extra("blk.1.attn_norm.weight", &[1.0; 128]), &["blk.1.attn_norm.weight"]),
        (
            "two frequencies",
            extra("rope_freqs.weight", &[1.0, 2.0]),
            &["rope_scaling", "2 divisors", "have 32"],
        ),
        (
            "frequencies of 0",
            extra("rope_freqs.weight", &[0.0; 32]),
            &["rope_scaling", "0 among", "positive"],
        ),
        (
            "two scales for one",
            extra("blk.0.attn_q.scale", &[1.0, 1.0]),
            &["blk.0.attn_q.scale", "[2]", "[1]"],
        ),
        ("an infinite scale", extra("blk.0.attn_q.scale", &[f32::INFINITY]), &["blk.0.attn_q.scale", "inf"]),
        ("a negative scale", extra("blk.0.attn_q.scale", &[-1.0]), &["blk.0.attn_q.scale", "-1"]),
        (
            "two scale tensors",
            extra("blk.0.attn_q.scale", &[1.0]).tensor("blk.0.attn_q_scale", &[1], 0, f32s(&[1.0])),
            &["blk.0.attn_q.scale", "blk.0.attn_q_scale"],
        ),
        (
            "a ternary embedding",
            retype("token_embd.weight", 36, i2_s(512)),
            &["token_embd.weight", "I2_S (36)", "F16"],
        ),
        (
            "a projection that is not ternary",
            retype("blk.0.attn_k.weight", 0, f32s(&not_ternary)),
            &["blk.0.attn_k.weight", "F32", "row 1, column 1", "0.5", "0.25"],
        ),
        (
            "Q8_0 that is not ternary",
            retype("blk.0.attn_k.weight", 8, (0..128 / 32 * 64 * 34).map(|i| (i % 34) as u8).collect()),
            &["blk.0.attn_k.weight", "Q8_0"],
        ),
        (
            "code 3",
            change(&|r| r.tensor_mut("blk.0.ffn_up.weight").data[32 * 5 + 3] |= 0b00_00_11_00),
            &["blk.0.ffn_up.weight", "row 5", "column 67", "code 3"],
        ),
        (
            "a scale that is no number",
            change(&|r| r.tensor_mut("blk.0.attn_v.weight").data[2048..2052].fill(0xff)),
            &["blk.0.attn_v.weight", "scale", "NaN"],
        ),
        (
            "a norm that is no number",
            retype("output_norm.weight", 0, f32s(&with_nan)),
            &["output_norm.weight", "NaN"],
        ),
        (
            "an embedding that is no number",
            change(&|r| r.tensor_mut("token_embd.weight").data[513] = 0x7c),
            &["token_embd.weight", "row 2, column 0"],
        ),
        (
            "as many scores as not tokens",
            change(&|r| *r.value("tokenizer.ggml.scores") = array(F32, 3, &f32s(&[0.0; 3]))),
            &["tokenizer.ggml.scores", "one for each token"],
        ),
        (
            "tokens that are numbers",
            change(&|r| *r.value("tokenizer.ggml.tokens") = array(U32, 4, &[0; 16])),
            &["tokenizer.ggml.tokens", "array of strings"],
        ),
        (
            "a flag that is a number",
            model().without("tokenizer.ggml.add_bos_token").key(
                "tokenizer.ggml.add_bos_token",
                U32,
                [1, 0, 0, 0],
            ),
            &["tokenizer.ggml.add_bos_token", "bool"],
        ),
    ];
    for (name, raw, parts) in cases {
        assert_refused(name, dir.open_and_check(&raw), parts);
    }
}

#[test]
fn codes_are_views_where_the_file_aligns_them() {
    let dir = Dir::new();
    for (alignment, view) in [(32usize, true), (64, true), (8, false)] {
        // One odd tensor in front, so that an alignment of 8 shows.
        let mut raw = model().key("general.alignment", U32, (alignment as u32).to_le_bytes());
        raw.alignment = alignment;
        raw.tensors.insert(
            0,
            RawTensor { name: b"x".into(), dims: vec![2], kind: 0, offset: None, data: vec![0; 8] },
        );
        let bytes = raw.bytes();
        let checkpoint = Checkpoint::open(&dir.write(&bytes), &OpenOptions::default()).unwrap();
        checkpoint.check().unwrap();
        let (tensors, size) =
            allocated(|| Projection::ALL.map(|which| checkpoint.projection(0, which).unwrap()));
        assert!(tensors.iter().all(|t| t.codes.as_ptr().addr().is_multiple_of(32)));
        assert_eq!(size < 8 << 10, view, "alignment {alignment}: {size} bytes allocated");
    }
}

#[test]
fn cutting_a_file_anywhere_is_noticed() {
    let raw = model();
    let (header, bytes) = raw.header_and_bytes();
    for length in 0..bytes.len() {
        let (result, allocated) =
            allocated(|| GgufFile::parse("cut.gguf".into(), bytes::Bytes::copy_from_slice(&bytes[..length])));
        assert!(result.is_err(), "{length} of {} bytes accepted", bytes.len());
        assert!(allocated < length + (64 << 10), "{allocated} bytes allocated for {length}");
    }
    // The same through the memory map, where the header ends.
    let dir = Dir::new();
    let path = dir.write(&bytes);
    for length in (0..header + 100).rev() {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(length as u64).unwrap();
        assert_refused("cut", Checkpoint::open(&path, &OpenOptions::default()), &[]);
    }
}

/// Opens a file and, if that works, asks it for everything. No result is wrong; a panic is.
fn exercise(path: &Path) -> bool {
    let Ok(checkpoint) = Checkpoint::open(path, &OpenOptions::default()) else { return false };
    let _ = checkpoint.check();
    let _ = (checkpoint.tensors(), checkpoint.metadata(), checkpoint.tokenizer_source());
    true
}

fn write_at(path: &Path, at: usize, byte: u8) {
    let mut file = std::fs::File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(at as u64)).unwrap();
    file.write_all(&[byte]).unwrap();
}

#[test]
fn no_changed_byte_of_the_header_does_harm() {
    let dir = Dir::new();
    let (header, bytes) = model().header_and_bytes();
    let path = dir.write(&bytes);
    let mut accepted = 0;
    for (at, &old) in bytes.iter().enumerate().take(header) {
        let changed =
            (0..8).map(|bit| old ^ 1 << bit).chain([0, 0xff, old.wrapping_add(1), old.wrapping_sub(1)]);
        for byte in changed.filter(|&b| b != old) {
            write_at(&path, at, byte);
            let (opened, allocated) = allocated(|| exercise(&path));
            accepted += usize::from(opened);
            assert!(allocated < 4 << 20, "byte {at} = {byte}: {allocated} bytes allocated");
        }
        write_at(&path, at, old);
    }
    assert!(exercise(&path));
    assert!(accepted > 0, "no change at all was harmless, which is hard to believe");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]

    #[test]
    fn several_changes_do_no_harm(changes in proptest::collection::vec((0usize..100_000, 0u8..=255), 1..12)) {
        let dir = Dir::new();
        let (header, mut bytes) = model().header_and_bytes();
        for (at, byte) in changes {
            bytes[at % header] = byte;
        }
        let path = dir.write(&bytes);
        let (_, allocated) = allocated(|| exercise(&path));
        proptest::prop_assert!(allocated < 4 << 20);
    }

    #[test]
    fn noise_behind_a_good_start_does_no_harm(
        noise in proptest::collection::vec(0u8..=255, 0..600), keep in 0usize..400,
    ) {
        let mut bytes = model().bytes();
        bytes.truncate(keep);
        bytes.extend(noise);
        let (_, allocated) = allocated(|| parse(&bytes).is_ok());
        proptest::prop_assert!(allocated < 256 << 10);
    }
}

/// A vocabulary as large as that of 2B-4T is checked, not copied, when a file is opened.
#[test]
fn a_large_vocabulary_opens_without_copies() {
    let strings = |n: u64| {
        let items: Vec<u8> = (0..n).flat_map(|i| string(format!("token {i}"))).collect();
        array(STRING, n, &items)
    };
    let raw = Raw::new().key("tokenizer.ggml.tokens", ARRAY, strings(128_256)).key(
        "tokenizer.ggml.merges",
        ARRAY,
        strings(280_147),
    );
    let bytes = bytes::Bytes::from(raw.bytes());
    assert!(bytes.len() > 7_000_000);
    let start = std::time::Instant::now();
    let (file, allocated) = allocated(|| GgufFile::parse("large.gguf".into(), bytes.clone()).unwrap());
    println!("{:?} for {} bytes, {allocated} allocated", start.elapsed(), bytes.len());
    assert!(allocated < 16 << 10, "{allocated} bytes allocated");
    let merges = file.value("tokenizer.ggml.merges").unwrap().as_array().unwrap();
    assert_eq!(merges.strings().last(), Some("token 280146"));
    assert_eq!(merges.strings().count(), 280_147);
}

/// Arrays nested within the limit can still be many; their number is bounded by the file.
#[test]
fn many_nested_arrays_cost_nothing() {
    let empty = array(U32, 0, &[]);
    let many = array(ARRAY, 50_000, &empty.repeat(50_000));
    let bytes = Raw::new().key("k", ARRAY, &many).bytes();
    let (file, allocated) = allocated(|| parse(&bytes).unwrap());
    assert!(allocated < bytes.len() + (16 << 10), "{allocated} bytes allocated for {}", bytes.len());
    let value = file.value("k").unwrap();
    assert_eq!(value.as_array().unwrap().iter().count(), 50_000);
    assert!(value.to_string().len() < 200);
}

#[test]
fn pooling_is_what_the_file_says() {
    let dir = Dir::new();
    let of = |kind: Option<u32>, asked| {
        let model = match kind {
            Some(kind) => model().key("bitnet-b1.58.pooling_type", U32, kind.to_le_bytes()),
            None => model(),
        };
        let defaults = dir.open_and_check(&model).unwrap().embed_defaults(asked);
        defaults.map(|defaults| defaults.pooling).map_err(|error| error.to_string())
    };
    for (kind, pooling) in
        [(None, None), (Some(0), None), (Some(1), Some(Pooling::Mean)), (Some(3), Some(Pooling::Last))]
    {
        assert_eq!(of(kind, None), Ok(pooling), "{kind:?}");
    }
    for kind in [2, 4, u32::MAX] {
        let error = of(Some(kind), None).unwrap_err();
        assert!(error.contains(&format!("bitnet-b1.58.pooling_type is {kind}")), "{error}");
        assert_eq!(of(Some(kind), Some(Pooling::Last)), Ok(None));
    }
}
