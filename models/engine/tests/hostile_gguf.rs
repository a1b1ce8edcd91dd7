//! GGUF files that lie: every one must be refused with an error that says what is wrong, without a panic,
//! without a hang, and without an allocation out of proportion to the file.
//!
//! Files are built byte by byte here, not by `GgufWriter`, which could not write them. The small ones are
//! kept in `testdata/hostile/` for other programs to try; after a change, `BITNET_BLESS=1 cargo test` writes
//! them anew.

use bitnet_burn::GatedActivation;
use bitnet_burn::{Norm, Projection};
use bitnet_burn_engine::checkpoint::{Checkpoint, LoadError, OpenOptions, TokenizerSource};
use bitnet_burn_formats::FileError;
use bitnet_burn_formats::gguf::GgufFile;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

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

const U32: u32 = 4;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

fn array(element: u32, len: u64, items: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &len.to_le_bytes(), items].concat()
}

#[derive(Clone)]
struct RawTensor {
    name: Vec<u8>,
    dims: Vec<u64>,
    kind: u32,
    /// Instead of the one that follows from the order.
    offset: Option<u64>,
    data: Vec<u8>,
}

/// A file, every part of which can be made wrong.
#[derive(Clone)]
struct Raw {
    magic: [u8; 4],
    version: u32,
    n_tensors: Option<u64>,
    n_keys: Option<u64>,
    keys: Vec<(Vec<u8>, u32, Vec<u8>)>,
    tensors: Vec<RawTensor>,
    alignment: usize,
}

impl Raw {
    fn new() -> Self {
        let (n_tensors, n_keys, keys, tensors) = (None, None, Vec::new(), Vec::new());
        Self { magic: *b"GGUF", version: 3, n_tensors, n_keys, keys, tensors, alignment: 32 }
    }

    fn key(mut self, key: &str, kind: u32, value: impl AsRef<[u8]>) -> Self {
        self.keys.push((key.into(), kind, value.as_ref().to_vec()));
        self
    }

    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) -> Self {
        let name = name.into();
        self.tensors.push(RawTensor { name, dims: dims.to_vec(), kind, offset: None, data });
        self
    }

    fn value(&mut self, key: &str) -> &mut Vec<u8> {
        let found = self.keys.iter_mut().find(|(k, ..)| k == key.as_bytes());
        &mut found.unwrap_or_else(|| panic!("no key {key}")).2
    }

    fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(k, ..)| k != key.as_bytes());
        self
    }

    fn tensor_mut(&mut self, name: &str) -> &mut RawTensor {
        let found = self.tensors.iter_mut().find(|t| t.name == name.as_bytes());
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    fn bytes(&self) -> Vec<u8> {
        self.header_and_bytes().1
    }

    /// The length of the header without padding, and the whole file.
    fn header_and_bytes(&self) -> (usize, Vec<u8>) {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut offset = 0;
        for t in &self.tensors {
            out.extend(string(&t.name));
            out.extend((t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend(t.offset.unwrap_or(offset as u64).to_le_bytes());
            offset += t.data.len().next_multiple_of(self.alignment);
        }
        let header = out.len();
        // No padding behind the last tensor, so that cutting off a single byte hurts.
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&t.data);
        }
        (header, out)
    }
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `n` weights as I2_S: the codes 0, 1, 2, 0, 1, ... and a scale of 0.5.
fn i2_s(n: u64) -> Vec<u8> {
    let mut data: Vec<u8> = (0..n as usize / 4).map(|i| [0b00_01_10_00u8, 0b01_10_00_01][i % 2]).collect();
    data.extend(0.5f32.to_le_bytes());
    data.resize(data.len() + 28, 0);
    data
}

/// The smallest file that can be opened.
fn tiny() -> Raw {
    Raw::new()
        .key("general.architecture", STRING, string("bitnet"))
        .tensor("a", &[4, 2], 0, f32s(&[0.0; 8]))
        .tensor("b", &[8], 1, vec![0; 16])
}

/// A whole model: hidden 128, FFN 128, one layer, two heads, one KV head, vocabulary 4.
fn model() -> Raw {
    let arch = "bitnet-b1.58";
    let mut raw = Raw::new().key("general.architecture", STRING, string(arch));
    for (key, value) in [
        ("context_length", 64u32),
        ("embedding_length", 128),
        ("block_count", 1),
        ("feed_forward_length", 128),
        ("rope.dimension_count", 64),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("vocab_size", 4),
    ] {
        raw = raw.key(&format!("{arch}.{key}"), U32, value.to_le_bytes());
    }
    raw = raw
        .key(&format!("{arch}.attention.layer_norm_rms_epsilon"), F32, 1e-5f32.to_le_bytes())
        .key(&format!("{arch}.rope.freq_base"), F32, 500_000f32.to_le_bytes())
        .key("tokenizer.ggml.model", STRING, string("gpt2"))
        .key("tokenizer.ggml.pre", STRING, string("llama-bpe"))
        .key(
            "tokenizer.ggml.tokens",
            ARRAY,
            array(STRING, 4, &["a", "ß", "c", "<|eot_id|>"].map(string).concat()),
        )
        .key("tokenizer.ggml.token_type", ARRAY, array(5, 4, &[1i32, 1, 3, 3].map(i32::to_le_bytes).concat()))
        .key("tokenizer.ggml.scores", ARRAY, array(F32, 4, &f32s(&[0.0; 4])))
        .key("tokenizer.ggml.merges", ARRAY, array(STRING, 1, &string("a ß")))
        .key("tokenizer.ggml.bos_token_id", U32, 1u32.to_le_bytes())
        .key("tokenizer.ggml.eos_token_id", U32, 2u32.to_le_bytes())
        .key("tokenizer.ggml.add_bos_token", BOOL, [1])
        .tensor("token_embd.weight", &[128, 4], 1, vec![0x11; 1024])
        .tensor("output_norm.weight", &[128], 0, f32s(&[1.0; 128]));
    for norm in ["attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"] {
        raw = raw.tensor(&format!("blk.0.{norm}.weight"), &[128], 0, f32s(&[1.0; 128]));
    }
    for (part, n) in [
        ("attn_q", 128),
        ("attn_k", 64),
        ("attn_v", 64),
        ("attn_output", 128),
        ("ffn_gate", 128),
        ("ffn_up", 128),
        ("ffn_down", 128),
    ] {
        raw = raw.tensor(&format!("blk.0.{part}.weight"), &[128, n], 36, i2_s(128 * n));
    }
    raw
}

/// The same under architecture `bitnet`, with two keys of our own choice left out.
fn older_model() -> Raw {
    let mut raw = model();
    for (key, ..) in &mut raw.keys {
        let text = String::from_utf8(key.clone()).unwrap();
        *key = text.replace("bitnet-b1.58.", "bitnet.").into_bytes();
    }
    *raw.value("general.architecture") = string("bitnet");
    raw
}

/// A directory for files, each under a new name: those before may still be mapped.
struct Dir(tempfile::TempDir, Cell<usize>);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap(), Cell::new(0))
    }

    fn write(&self, bytes: &[u8]) -> PathBuf {
        self.1.set(self.1.get() + 1);
        let path = self.0.path().join(format!("{}.gguf", self.1.get()));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn open(&self, raw: &Raw) -> Result<Checkpoint, LoadError> {
        Checkpoint::open(&self.write(&raw.bytes()), &OpenOptions::default())
    }

    /// Opens it and, if that works, reads everything.
    fn open_and_check(&self, raw: &Raw) -> Result<Checkpoint, LoadError> {
        let checkpoint = self.open(raw)?;
        checkpoint.check()?;
        Ok(checkpoint)
    }
}

fn parse(bytes: &[u8]) -> Result<GgufFile, FileError> {
    GgufFile::parse("hostile.gguf".into(), bytes.to_vec().into())
}

#[track_caller]
fn assert_refused<T, E: std::fmt::Display>(name: &str, result: Result<T, E>, parts: &[&str]) {
    let Err(error) = result else { panic!("{name}: accepted") };
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{name}: {text:?} does not say {part:?}");
    }
    assert!(text.contains(".gguf"), "{name}: {text:?} does not name the file");
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
    add("type_q4_k", change(&|r| r.tensors[0].kind = 12), &["`a`", "Q4_K (12)", "I2_S (36)", "Q6_K (14)"]);
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
    let cases: Vec<(&str, Raw, &[&str])> = vec![
        ("no architecture", model().without("general.architecture"), &["general.architecture", "bitnet-25"]),
        (
            "other architecture",
            change(&|r| *r.value("general.architecture") = string("mamba")),
            &["`mamba`", "bitnet-b1.58, bitnet-25, bitnet"],
        ),
        ("a shard", model().key("split.count", U32, 2u32.to_le_bytes()), &["split.count", "merge"]),
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
            "scaled rope",
            model().key("bitnet-b1.58.rope.scaling.type", STRING, string("yarn")),
            &["rope.scaling.type", "yarn", "none"],
        ),
        (
            "experts",
            model().key("bitnet-b1.58.expert_count", U32, 8u32.to_le_bytes()),
            &["expert_count", "8"],
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
            model().key("bitnet-b1.58.hidden_act", STRING, string("gelu")),
            &["hidden_act", "gelu", "relu2, silu"],
        ),
        ("no embedding", drop("token_embd.weight"), &["token_embd.weight", "missing"]),
        ("no projection", drop("blk.0.ffn_up.weight"), &["blk.0.ffn_up.weight", "missing"]),
        ("half the sub-norms", drop("blk.0.ffn_sub_norm.weight"), &["blk.0.ffn_sub_norm.weight", "missing"]),
        ("a bias", extra("blk.0.attn_q.bias", &[0.0; 128]), &["blk.0.attn_q.bias", "no bias"]),
        ("an unknown norm", extra("blk.0.attn_q_norm.weight", &[1.0; 64]), &["blk.0.attn_q_norm.weight"]),
        ("a layer too many", extra("blk.1.attn_norm.weight", &[1.0; 128]), &["blk.1.attn_norm.weight"]),
        ("scaled frequencies", extra("rope_freqs.weight", &[1.0, 2.0]), &["rope_freqs.weight", "not 1"]),
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
