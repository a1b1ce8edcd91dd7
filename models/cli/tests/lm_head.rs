//! The output projection with int8 activations, against the same weights with f32 activations.

use std::process::{Command, Output};

use bitnet_burn::CacheType;
use bitnet_burn::ModelConfig;
use bitnet_burn::{BitNet, DenseMatrixError, Row};
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions};
use bitnet_burn_engine::load::{HeadMode, LoadOptions, ModelError};
use bitnet_burn_engine::synth;
use bitnet_burn_engine::synth::{SynthOptions, SynthScales};
use bitnet_burn_formats::DenseFormat;
use burn::tensor::Device;
use tempfile::TempDir;

/// A tiny model whose embedding, or output projection, is of this format.
fn checkpoint(embedding: DenseFormat, tied: bool) -> (TempDir, Checkpoint) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let config = ModelConfig { tied_embeddings: tied, ..synth::shape("tiny").unwrap() };
    synth::write(
        &path,
        &SynthOptions { config, scales: SynthScales::Tensor, embedding, seed: 3 },
        &|_, _| {},
    )
    .unwrap();
    let checkpoint = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
    (directory, checkpoint)
}

fn load(checkpoint: &Checkpoint, head: HeadMode) -> Result<BitNet, ModelError> {
    let options = LoadOptions { head, ..LoadOptions::default() };
    bitnet_burn_engine::load::load(checkpoint, &Device::flex(), &options, &mut |_| {})
}

/// Logits behind each of the tokens, given in chunks.
fn logits(model: &BitNet, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut cache = model.cache(tokens.len(), CacheType::F32).unwrap();
    let sequence = cache.add_sequence(tokens.len());
    let mut logits = Vec::new();
    for (i, part) in tokens.chunks(chunk).enumerate() {
        let row = |(j, &token): (usize, &u32)| Row { token, sequence, position: i * chunk + j };
        let rows: Vec<Row> = part.iter().enumerate().map(row).collect();
        let wanted: Vec<usize> = (0..rows.len()).collect();
        let y = model.forward(&rows, &wanted, &mut cache).unwrap();
        logits.extend(y.into_data().try_to_vec::<f32>().unwrap());
    }
    logits
}

const TOKENS: [u32; 11] = [3, 9, 27, 81, 243, 17, 51, 153, 200, 5, 5];

#[test]
fn logits_move_by_a_small_part_of_their_spread() {
    for format in [DenseFormat::Q6_K, DenseFormat::Q8_0, DenseFormat::Q4_0] {
        for tied in [true, false] {
            let (_directory, checkpoint) = checkpoint(format, tied);
            let file = load(&checkpoint, HeadMode::File).unwrap();
            let int8 = load(&checkpoint, HeadMode::Int8).unwrap();
            assert_eq!(file.head_description(), format!("file ({}, f32 activations)", format.name()));
            assert_eq!(int8.head_description(), format!("int8 ({}, int8 activations)", format.name()));
            let (want, got) = (logits(&file, &TOKENS, 4), logits(&int8, &TOKENS, 4));
            // The layers are the same, so the difference is the head's alone. An activation x of about
            // normal distribution is off by at most a/254, with a, the largest of a row of 256, about
            // three standard deviations: a root mean square of 0.7 % of x's, and so of the logits'.
            let n = want.len() as f64;
            let spread = (want.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n).sqrt();
            let errors = || want.iter().zip(&got).map(|(a, b)| f64::from((a - b).abs()));
            let rms = (errors().map(|e| e * e).sum::<f64>() / n).sqrt();
            let max = errors().fold(0.0, f64::max);
            let what = format!("{} tied {tied}: rms {rms}, max {max}, spread {spread}", format.name());
            assert!(rms > 0.0 && rms <= 0.015 * spread && max <= 0.08 * spread, "{what}");
        }
    }
}

/// A requantised head is what a file with such a head would give, and costs what its bits cost.
#[test]
fn requantised_heads_lose_what_their_format_loses() {
    for (from, tied) in [(DenseFormat::F16, true), (DenseFormat::BF16, false), (DenseFormat::Q8_0, true)] {
        let (_directory, checkpoint) = checkpoint(from, tied);
        let file = load(&checkpoint, HeadMode::File).unwrap();
        let want = logits(&file, &TOKENS, 4);
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
        let mut last = 0.0;
        for (format, most) in
            [(DenseFormat::Q8_0, 0.015), (DenseFormat::Q6_K, 0.03), (DenseFormat::Q4_0, 0.15)]
        {
            let model = load(&checkpoint, HeadMode::Requantised(format)).unwrap();
            assert_eq!(model.embedding.args().format, from);
            assert_eq!(model.head().unwrap().args().format, format);
            let (name, from) = (format.name(), from.name());
            let expected = match name == from {
                true => format!("int8 ({name}, int8 activations)"),
                false => format!("requantised ({name} from {from}, int8 activations)"),
            };
            assert_eq!(model.head_description(), expected);
            let got = logits(&model, &TOKENS, 4);
            assert!(got == logits(&model, &TOKENS, 11), "chunks change the bits");
            let error = norm(&mut want.iter().zip(&got).map(|(a, b)| f64::from(a - b)));
            let relative = error / norm(&mut want.iter().map(|&v| f64::from(v)));
            assert!(relative > last && relative < most, "{from} as {name}: {relative}");
            last = relative;
        }
    }
}

/// A copy of floats is what a file with such a head would give.
#[test]
fn converted_heads_keep_as_many_bits_as_their_format_has() {
    for from in [DenseFormat::F32, DenseFormat::Q6_K] {
        let (_directory, checkpoint) = checkpoint(from, true);
        let want = logits(&load(&checkpoint, HeadMode::File).unwrap(), &TOKENS, 4);
        let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
        for (format, most) in [(DenseFormat::F32, 1e-6), (DenseFormat::F16, 1e-3), (DenseFormat::BF16, 8e-3)]
        {
            let model = load(&checkpoint, HeadMode::Requantised(format)).unwrap();
            assert_eq!((model.embedding.args().format, model.head().unwrap().args().format), (from, format));
            let expected = match format == from {
                true => format!("file ({}, f32 activations)", format.name()),
                false => format!("converted ({} from {}, f32 activations)", format.name(), from.name()),
            };
            assert_eq!(model.head_description(), expected);
            for (got, want) in logits(&model, &TOKENS, 4).iter().zip(&want) {
                assert!((got - want).abs() <= most * largest, "{}: {got} {want}", model.head_description());
            }
        }
    }
}

#[test]
fn chunks_do_not_change_the_bits() {
    let (_directory, checkpoint) = checkpoint(DenseFormat::Q6_K, true);
    let model = load(&checkpoint, HeadMode::Int8).unwrap();
    let bits = |chunk| logits(&model, &TOKENS, chunk).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let one_by_one = bits(1);
    for chunk in [2, 3, 11] {
        assert!(bits(chunk) == one_by_one, "chunks of {chunk}");
    }
}

#[test]
fn the_embedding_is_looked_up_as_before() {
    let (_directory, checkpoint) = checkpoint(DenseFormat::Q6_K, true);
    let rows = |head| {
        let model = load(&checkpoint, head).unwrap();
        model.embedding.rows(&TOKENS).into_data().try_to_vec::<f32>().unwrap()
    };
    assert_eq!(rows(HeadMode::Int8), rows(HeadMode::File));
}

#[test]
fn heads_of_floats_are_refused() {
    for format in [DenseFormat::F32, DenseFormat::F16, DenseFormat::BF16] {
        for tied in [true, false] {
            let (_directory, checkpoint) = checkpoint(format, tied);
            load(&checkpoint, HeadMode::File).unwrap();
            let error = load(&checkpoint, HeadMode::Int8).unwrap_err();
            assert!(
                matches!(&error, ModelError::Head(DenseMatrixError::Int8 { source, .. }) if source.format == format)
            );
            let tensor = if tied { "token_embd.weight" } else { "output.weight" };
            let name = format.name();
            assert_eq!(
                error.to_string(),
                format!(
                    "the output projection {tensor}: {name} weights can't be multiplied by int8 activations; \
                     Q8_0, Q6_K and Q4_0 can"
                )
            );
        }
    }
}

/// stdout, or stderr of a call that fails.
fn bitnet(directory: &TempDir, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.env("BITNET_CACHE_DIR", directory.path().join("cache")).current_dir(directory.path()).args(args);
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if status.success() { Ok(text(stdout)) } else { Err(text(stderr)) }
}

#[test]
fn the_program_has_a_flag_and_names_the_mode() {
    let (directory, _) = checkpoint(DenseFormat::Q6_K, true);
    std::fs::write(directory.path().join("ids.txt"), "1 2 3 4").unwrap();
    let bench = ["bench", "-m", "model.gguf", "-p", "4", "-n", "2", "-r", "1", "--threads", "1"];
    let run = ["run", "-m", "model.gguf", "--tokens-file", "ids.txt", "-n", "2"];
    let logits = ["logits", "-m", "model.gguf", "--tokens-file", "ids.txt", "--out", "logits.npy"];
    let perplexity = ["perplexity", "-m", "model.gguf", "--tokens-file", "ids.txt"];
    for call in [&bench[..], &run, &logits, &perplexity] {
        let name = |flags: &[&str]| {
            let text = bitnet(&directory, &[call, flags, &["--json"]].concat()).unwrap();
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            json["lm_head"].as_str().unwrap().to_owned()
        };
        assert_eq!(name(&[]), "file (Q6_K, f32 activations)");
        assert_eq!(name(&["--lm-head", "file"]), "file (Q6_K, f32 activations)");
        assert_eq!(name(&["--lm-head", "int8"]), "int8 (Q6_K, int8 activations)");
        assert_eq!(name(&["--lm-head", "q4_0"]), "requantised (Q4_0 from Q6_K, int8 activations)");
    }
    let table = bitnet(&directory, &[&bench[..], &["--lm-head", "int8"]].concat()).unwrap();
    assert!(table.contains("lm_head      int8 (Q6_K, int8 activations)"), "{table}");
    let both = [&logits[..], &["--lm-head", "int8", "--activations", "float"]].concat();
    let error = bitnet(&directory, &both).unwrap_err();
    assert!(error.contains("choose one"), "{error}");

    let (directory, _) = checkpoint(DenseFormat::BF16, true);
    let error = bitnet(&directory, &[&bench[..], &["--lm-head", "int8"]].concat()).unwrap_err();
    let expected = "error: the output projection token_embd.weight: BF16 weights can't be multiplied by int8 \
                    activations; Q8_0, Q6_K and Q4_0 can";
    assert!(error.contains(expected) && error.contains("hint: --lm-head file"), "{error}");
}
