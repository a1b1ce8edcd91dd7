//! Models of any bytes: GGUF files, configurations, and the table of packed weights.

use std::path::Path;
use std::sync::OnceLock;

use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::load::HeadMode;
use bitnet_burn_engine::prepack::{self, Prepacked};
use bitnet_burn_engine::synth::{self, SynthOptions, SynthScales};
use bitnet_burn_engine::tokenizer::Tokenizer;
use bitnet_burn_formats::{DenseFormat, safetensors};

use xxhash_rust::xxh3::xxh3_64;

use super::texts::speak;

/// A checkpoint that was opened computes nothing that was not checked.
fn look_at(checkpoint: &Checkpoint) -> bool {
    checkpoint.config().validate().expect("only valid configurations are opened");
    assert!(!checkpoint.tensors().is_empty());
    checkpoint.metadata();
    if let Ok(tokenizer) =
        Tokenizer::from_source(&checkpoint.tokenizer_source(), checkpoint.config().vocab_size)
    {
        speak(&tokenizer);
    }
    checkpoint.check().is_ok()
}

/// Whether the GGUF file is a model, and its tokenizer speaks.
pub fn gguf(data: &[u8]) -> bool {
    let options = OpenOptions::default();
    let opened = Checkpoint::from_gguf(Path::new("fuzzed.gguf"), data.to_vec().into(), &options);
    opened.is_ok_and(|checkpoint| look_at(&checkpoint))
}

/// Whether the bytes are the `config.json` of the model in `seeds/safetensors`.
pub fn config(data: &[u8]) -> bool {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let model = include_bytes!("../../seeds/safetensors/model.safetensors");
    std::fs::write(dir.path().join(safetensors::SINGLE), model).expect("the weights are written");
    std::fs::write(dir.path().join("config.json"), data).expect("the file is written");
    Checkpoint::open(dir.path(), &OpenOptions::default()).is_ok_and(|checkpoint| look_at(&checkpoint))
}

/// A model with packed weights beside it.
struct Packed {
    dir: tempfile::TempDir,
    checkpoint: Checkpoint,
    /// The file up to the table.
    tensors: Vec<u8>,
    table: Vec<u8>,
}

fn packed() -> &'static Packed {
    static PACKED: OnceLock<Packed> = OnceLock::new();
    PACKED.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("model.gguf");
        let config = synth::shape("tiny").expect("there is a shape of this name");
        let options =
            SynthOptions { config, scales: SynthScales::Tensor, embedding: DenseFormat::Q6_K, seed: 3 };
        synth::write(&path, &options, &|_, _| {}).expect("a model");
        let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).expect("the model");
        let file = prepack::write(&checkpoint, HeadMode::Int8, &mut |_, _| {}).expect("packed weights").path;
        let mut tensors = std::fs::read(file).expect("the packed weights");
        let end = tensors.len() - 24;
        let length = u64::from_le_bytes(tensors[end + 8..end + 16].try_into().expect("8 bytes")) as usize;
        let table = tensors[end - length..end].to_vec();
        tensors.truncate(end - length);
        Packed { dir, checkpoint, tensors, table }
    })
}

/// Whether the bytes are a table of packed weights, with the right checksum.
pub fn prepacked(data: &[u8]) -> bool {
    let Packed { dir, checkpoint, tensors, .. } = packed();
    let (sum, length) = (xxh3_64(data).to_le_bytes(), (data.len() as u64).to_le_bytes());
    let path = prepack::path_of(&dir.path().join("model.gguf"));
    std::fs::write(path, [tensors, data, &sum, &length, b"BNPACK01"].concat()).expect("the file is written");
    Prepacked::beside(checkpoint).is_ok_and(|found| found.is_some())
}

/// The table that the program writes.
pub fn prepacked_seed() -> Vec<u8> {
    packed().table.clone()
}
