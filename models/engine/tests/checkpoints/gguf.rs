//! Small GGUF files, built byte by byte, every part of which can be made wrong.

use bitnet_burn_engine::checkpoint::{Checkpoint, LoadError, OpenOptions};
use bitnet_burn_formats::FileError;
use bitnet_burn_formats::gguf::GgufFile;
use std::cell::Cell;
use std::path::PathBuf;

pub const U32: u32 = 4;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;

pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

pub fn array(element: u32, len: u64, items: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &len.to_le_bytes(), items].concat()
}

#[derive(Clone)]
pub struct RawTensor {
    pub name: Vec<u8>,
    pub dims: Vec<u64>,
    pub kind: u32,
    /// Instead of the one that follows from the order.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

/// A file, every part of which can be made wrong.
#[derive(Clone)]
pub struct Raw {
    pub magic: [u8; 4],
    pub version: u32,
    pub n_tensors: Option<u64>,
    pub n_keys: Option<u64>,
    pub keys: Vec<(Vec<u8>, u32, Vec<u8>)>,
    pub tensors: Vec<RawTensor>,
    pub alignment: usize,
}

impl Raw {
    pub fn new() -> Self {
        let (n_tensors, n_keys, keys, tensors) = (None, None, Vec::new(), Vec::new());
        Self { magic: *b"GGUF", version: 3, n_tensors, n_keys, keys, tensors, alignment: 32 }
    }

    pub fn key(mut self, key: &str, kind: u32, value: impl AsRef<[u8]>) -> Self {
        self.keys.push((key.into(), kind, value.as_ref().to_vec()));
        self
    }

    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) -> Self {
        let name = name.into();
        self.tensors.push(RawTensor { name, dims: dims.to_vec(), kind, offset: None, data });
        self
    }

    pub fn value(&mut self, key: &str) -> &mut Vec<u8> {
        let found = self.keys.iter_mut().find(|(k, ..)| k == key.as_bytes());
        &mut found.unwrap_or_else(|| panic!("no key {key}")).2
    }

    pub fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(k, ..)| k != key.as_bytes());
        self
    }

    pub fn tensor_mut(&mut self, name: &str) -> &mut RawTensor {
        let found = self.tensors.iter_mut().find(|t| t.name == name.as_bytes());
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.header_and_bytes().1
    }

    /// The length of the header without padding, and the whole file.
    pub fn header_and_bytes(&self) -> (usize, Vec<u8>) {
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

pub fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `n` weights as I2_S: the codes 0, 1, 2, 0, 1, ... and a scale of 0.5.
pub fn i2_s(n: u64) -> Vec<u8> {
    let mut data: Vec<u8> = (0..n as usize / 4).map(|i| [0b00_01_10_00u8, 0b01_10_00_01][i % 2]).collect();
    data.extend(0.5f32.to_le_bytes());
    data.resize(data.len() + 28, 0);
    data
}

/// A whole model: hidden 128, FFN 128, one layer, two heads, one KV head, vocabulary 4.
pub fn model() -> Raw {
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
pub fn older_model() -> Raw {
    let mut raw = model();
    for (key, ..) in &mut raw.keys {
        let text = String::from_utf8(key.clone()).unwrap();
        *key = text.replace("bitnet-b1.58.", "bitnet.").into_bytes();
    }
    *raw.value("general.architecture") = string("bitnet");
    raw
}

/// A directory for files, each under a new name: those before may still be mapped.
pub struct Dir(tempfile::TempDir, Cell<usize>);

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap(), Cell::new(0))
    }

    pub fn write(&self, bytes: &[u8]) -> PathBuf {
        self.1.set(self.1.get() + 1);
        let path = self.0.path().join(format!("{}.gguf", self.1.get()));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub fn open(&self, raw: &Raw) -> Result<Checkpoint, LoadError> {
        Checkpoint::open(&self.write(&raw.bytes()), &OpenOptions::default())
    }

    /// Opens it and, if that works, reads everything.
    pub fn open_and_check(&self, raw: &Raw) -> Result<Checkpoint, LoadError> {
        let checkpoint = self.open(raw)?;
        checkpoint.check()?;
        Ok(checkpoint)
    }
}

pub fn parse(bytes: &[u8]) -> Result<GgufFile, FileError> {
    GgufFile::parse("hostile.gguf".into(), bytes.to_vec().into())
}

#[track_caller]
pub fn assert_refused<T, E: std::fmt::Display>(name: &str, result: Result<T, E>, parts: &[&str]) {
    let Err(error) = result else { panic!("{name}: accepted") };
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{name}: {text:?} does not say {part:?}");
    }
    assert!(text.contains(".gguf"), "{name}: {text:?} does not name the file");
}

/// A model with keys of RoPE; values that are numbers are floats.
pub fn rope(keys: &[(&str, &str)]) -> Raw {
    keys.iter().fold(model(), |raw, (key, value)| {
        let key = format!("bitnet-b1.58.{key}");
        match value.parse::<f32>() {
            Ok(number) => raw.key(&key, F32, number.to_le_bytes()),
            Err(_) => raw.key(&key, STRING, string(value)),
        }
    })
}
