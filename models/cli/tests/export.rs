//! `bitnet export` and `bitnet convert`, as a library and as a program: what is the same afterwards, what is
//! said about the rest, and what is refused.

use bitnet_burn_engine::load::load;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bitnet_burn::CacheType;
use bitnet_burn::names::{EMBEDDING, HEAD};
use bitnet_burn::{GatedActivation, ModelConfig};
use bitnet_burn::{Norm, Projection};
use bitnet_burn::{Row, names};
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions, TokenizerSource};
use bitnet_burn_engine::gguf::{Architecture, GgufTypes, TernaryType, write_checkpoint};
use bitnet_burn_engine::hf;
use bitnet_burn_engine::hf::Style;
use bitnet_burn_engine::load::LoadOptions;
use bitnet_burn_engine::synth::shape;
use bitnet_burn_engine::tokenizer::Tokenizer;
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::gguf::{Array, GgufFile, GgufWriter, Value};
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_train::export::{
    ExportError, ExportOptions, Progress, Summary, Target, export, newest_checkpoint,
};
use burn::tensor::Device;
use serde_json::json;
use tempfile::TempDir;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/testdata/golden");

fn gguf(ternary: TernaryType) -> Target {
    Target::Gguf(GgufTypes { ternary, ..GgufTypes::default() })
}

fn requantised(ternary: TernaryType) -> Target {
    Target::Gguf(GgufTypes { ternary, requantise: true, ..GgufTypes::default() })
}

fn hf(style: Style) -> Target {
    Target::Hf { style, dense: None }
}

const I2_S: Target = Target::Gguf(GgufTypes {
    ternary: TernaryType::I2_S,
    dense: None,
    architecture: None,
    requantise: false,
});

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path, &OpenOptions::default()).unwrap()
}

fn try_export(from: &Path, to: &Path, options: &ExportOptions) -> Result<Summary, ExportError> {
    export(&open(from), to, options, &mut |_| ControlFlow::Continue(()))
}

fn converted(from: &Path, to: &Path, target: Target) -> Summary {
    try_export(from, to, &ExportOptions::new(target)).unwrap()
}

fn refused(from: &Path, to: &Path, target: Target) -> String {
    try_export(from, to, &ExportOptions::new(target)).unwrap_err().to_string()
}

/// The small model of the tests, as training writes it: random masters, and a tokenizer made with the
/// `tokenizers` crate.
fn masters(dir: &Path, config: &ModelConfig) {
    let mut random = SplitMix64::new(11);
    let mut value = || (random.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0) * 0.07;
    let mut tensor = |name: String, shape: Vec<usize>| {
        let n = shape.iter().product();
        (name, shape, (0..n).map(|_| value()).collect::<Vec<f32>>())
    };
    let matrix = vec![config.vocab_size, config.hidden_size];
    let mut tensors = vec![tensor(EMBEDDING.into(), matrix.clone())];
    if !config.tied_embeddings {
        tensors.push(tensor(HEAD.into(), matrix));
    }
    for layer in 0..config.n_layers {
        for norm in Norm::of_layer(layer, config) {
            tensors.push(tensor(names::norm_name(norm), vec![norm.len(config)]));
        }
        for which in Projection::ALL {
            let (n, k) = which.shape(config);
            tensors.push(tensor(names::projection_name(layer, which), vec![n, k]));
        }
    }
    tensors.push(tensor(names::norm_name(Norm::Output), vec![config.hidden_size]));
    std::fs::create_dir_all(dir).unwrap();
    hf::write_masters(dir, config, tensors).unwrap();
}

const END: &str = "<|endoftext|>";

/// A byte-level BPE vocabulary of at most `size` tokens, as training makes it.
fn train_tokenizer(dir: &Path, size: usize) {
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
        .with_post_processor(None::<tokenizers::PostProcessorWrapper>)
        .with_decoder(Some(ByteLevel::default()))
        .build()
        .unwrap();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END, true)])
        .build();
    let text = include_str!("../../../README.md");
    tokenizer.train(&mut trainer, text.lines()).unwrap();
    tokenizer.save(dir.join("tokenizer.json"), true).unwrap();
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// BitNet's shape; K is a multiple of 256 everywhere.
fn bitnet_shape() -> ModelConfig {
    ModelConfig { intermediate_size: 768, bos_token: None, eos_tokens: vec![0], ..shape("tiny").unwrap() }
}

fn llama_shape() -> ModelConfig {
    ModelConfig { sub_norms: false, activation: GatedActivation::Silu, ..bitnet_shape() }
}

/// Codes, scales, norms, embedding and head, bit for bit.
#[track_caller]
fn assert_same_weights(a: &Checkpoint, b: &Checkpoint) {
    let config = a.config();
    let layers = (0..config.n_layers).flat_map(|layer| Norm::of_layer(layer, config));
    for norm in layers.chain([Norm::Output]) {
        assert_eq!(a.norm(norm).unwrap(), b.norm(norm).unwrap(), "{norm:?}");
    }
    for layer in 0..config.n_layers {
        for which in Projection::ALL {
            let [a, b] = [a, b].map(|c| c.projection(layer, which).unwrap());
            assert!(a.codes == b.codes, "codes of layer {layer} {which:?}");
            assert_eq!(a.scale.to_bits(), b.scale.to_bits(), "scale of layer {layer} {which:?}");
        }
    }
    let values = |checkpoint: &Checkpoint| {
        [Some(checkpoint.embedding().unwrap()), checkpoint.output().unwrap()].map(|matrix| {
            matrix.map(|m| {
                let mut row = vec![0.0; m.k];
                let decode = |n| {
                    m.format.decode_row(m.row(n).unwrap(), &mut row).unwrap();
                    row.clone()
                };
                (0..m.n).flat_map(decode).collect::<Vec<f32>>()
            })
        })
    };
    assert!(values(a) == values(b), "embedding or head");
}

fn logits(path: &Path) -> Vec<f32> {
    const TOKENS: [u32; 9] = [3, 9, 27, 81, 243, 17, 51, 153, 200];
    #[cfg(feature = "flex")]
    let device = Device::flex();
    #[cfg(not(feature = "flex"))]
    #[allow(deprecated, reason = "NdArray still has users")]
    let device = Device::ndarray();
    let model = load(&open(path), &device, &LoadOptions::default(), &mut |_| {}).unwrap();
    let mut cache = model.cache(TOKENS.len(), CacheType::F32).unwrap();
    let sequence = cache.add_sequence(TOKENS.len());
    let row = |(position, &token): (usize, &u32)| Row { token, sequence, position };
    let rows: Vec<Row> = TOKENS.iter().enumerate().map(row).collect();
    let wanted: Vec<usize> = (0..rows.len()).collect();
    model.forward(&rows, &wanted, &mut cache).unwrap().into_data().try_to_vec::<f32>().unwrap()
}

fn tokenizer(path: &Path) -> Tokenizer {
    let checkpoint = open(path);
    Tokenizer::from_source(&checkpoint.tokenizer_source(), checkpoint.config().vocab_size).unwrap()
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn every_way_round_keeps_every_bit() {
    for config in [
        bitnet_shape(),
        llama_shape(),
        ModelConfig { tied_embeddings: false, activation: GatedActivation::Silu, ..bitnet_shape() },
        ModelConfig { sub_norms: false, tied_embeddings: false, rope_theta: 1e4, ..bitnet_shape() },
    ] {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        masters(&at("run"), &config);
        train_tokenizer(&at("run"), 400);
        let source = open(&at("run"));
        let expected = logits(&at("run"));
        for (from, to, target) in [
            ("run", "a.gguf", I2_S),
            ("run", "packed", hf(Style::PackedAuto)),
            ("run", "master", hf(Style::Online)),
            ("packed", "b.gguf", I2_S),
            ("master", "c.gguf", I2_S),
            ("master", "packed-too", hf(Style::PackedAuto)),
            ("a.gguf", "d", hf(Style::PackedAuto)),
            ("d", "e.gguf", I2_S),
            ("e.gguf", "f.gguf", I2_S),
        ] {
            let summary = converted(&at(from), &at(to), target);
            assert!(summary.is_exact() && summary.converted.is_empty(), "{from} to {to}: {summary:?}");
            assert_eq!(summary.ternary_weights, config.ternary_parameters());
            let copy = open(&at(to));
            assert_eq!(copy.warnings(), [""; 0]);
            assert_same_weights(&source, &copy);
            let (ours, theirs) = (copy.config(), source.config());
            assert_eq!((ours.activation, ours.rope_theta), (theirs.activation, theirs.rope_theta));
            assert!(logits(&at(to)) == expected, "logits after {from} to {to}");
        }
        // All the ways to I2_S lead to the same tensors.
        let [a, e] = ["a.gguf", "e.gguf"].map(|name| GgufFile::open(&at(name)).unwrap());
        for tensor in a.tensors() {
            assert_eq!(a.tensor_bytes(&tensor.name).unwrap(), e.tensor_bytes(&tensor.name).unwrap());
        }
        // Masters stay masters, and are those of the source.
        let [run, master] = ["run", "master"].map(|name| open(&at(name)));
        for which in Projection::ALL {
            assert_eq!(run.master(1, which).unwrap().unwrap(), master.master(1, which).unwrap().unwrap());
        }
        assert_eq!(open(&at("packed")).master(0, Projection::Q).unwrap(), None);
    }
}

#[test]
fn architectures_are_those_that_other_programs_compute() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let relu2_without = ModelConfig { sub_norms: false, ..bitnet_shape() };
    let silu_with = ModelConfig { activation: GatedActivation::Silu, ..bitnet_shape() };
    for (config, architecture, model_type) in [
        (bitnet_shape(), "bitnet-b1.58", "bitnet"),
        (silu_with, "bitnet", "bitnet"),
        (llama_shape(), "llama", "llama"),
        (relu2_without, "bitnet-b1.58", "llama"),
    ] {
        masters(&source, &config);
        for (target, expected) in [
            (I2_S, architecture),
            (requantised(TernaryType::TQ2_0), architecture),
            (hf(Style::PackedAuto), model_type),
        ] {
            let out = tempfile::tempdir_in(dir.path()).unwrap();
            let summary = converted(&source, &out.path().join("model"), target);
            assert_eq!(summary.architecture, expected);
            // There is no program that does not read squared ReLU as SiLU, or refuse it, somewhere.
            let warned = matches!(target, Target::Gguf(_)) && config.activation == GatedActivation::Relu2;
            assert_eq!(!summary.warnings.is_empty(), warned, "{summary:?}");
        }
    }
    // Another one, where asked for. It states its activation, so the copy is the same model here.
    let named =
        |architecture| Target::Gguf(GgufTypes { architecture: Some(architecture), ..GgufTypes::default() });
    masters(&source, &bitnet_shape());
    let out = dir.path().join("bitnet.gguf");
    let summary = converted(&source, &out, named(Architecture::Bitnet));
    assert_eq!((&*summary.architecture, open(&out).config().activation), ("bitnet", GatedActivation::Relu2));
    assert!(summary.warnings[0].contains("SiLU where this model has squared ReLU"), "{summary:?}");
    let llama = refused(&source, &dir.path().join("x"), named(Architecture::Llama));
    assert!(llama.contains("`llama` has no sub-norms") && llama.contains("`bitnet-b1.58`"), "{llama}");
}

/// llama.cpp rotates the rows 2i and 2i + 1 of a head in a `llama` file, Hugging Face the rows i and
/// i + head / 2: the file has them in its own order.
#[test]
fn llama_files_have_their_rows_in_llama_cpps_order() {
    let dir = tempfile::tempdir().unwrap();
    let [source, out] = ["source", "out.gguf"].map(|name| dir.path().join(name));
    let config = llama_shape();
    masters(&source, &config);
    converted(&source, &out, I2_S);
    let (source, file) = (open(&source), GgufFile::open(&out).unwrap());
    let (head, row) = (config.head_dim, config.hidden_size / 4);
    for (which, name, reordered) in [
        (Projection::Q, "blk.1.attn_q.weight", true),
        (Projection::K, "blk.1.attn_k.weight", true),
        (Projection::V, "blk.1.attn_v.weight", false),
        (Projection::O, "blk.1.attn_output.weight", false),
    ] {
        let (stored, _) = file.i2_s(name).unwrap();
        let codes = source.projection(1, which).unwrap().codes;
        for n in 0..codes.len() / row {
            let (h, i) = (n / head, n % head);
            let from = if reordered { h * head + i % 2 * (head / 2) + i / 2 } else { n };
            assert!(stored[n * row..][..row] == codes[from * row..][..row], "{name} row {n}");
        }
    }
}

#[test]
fn scales_that_f16_cannot_hold_are_rounded_only_if_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    masters(&at("source"), &bitnet_shape());
    let source = open(&at("source"));
    for (ternary, name, back) in [(TernaryType::TQ2_0, "a.gguf", "a"), (TernaryType::PTQ1_0, "b.gguf", "b")] {
        let error = refused(&at("source"), &at(name), gguf(ternary));
        for part in ["model.layers.0.self_attn.q_proj.weight", "row 0", "f16", "i2_s", "--requantise"] {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(entries(dir.path()).iter().filter(|e| e.contains(name)).count(), 0);
        let summary = converted(&at("source"), &at(name), requantised(ternary));
        assert!(!summary.is_exact() && summary.scales.is_none());
        let lost = summary.requantised.unwrap();
        assert!(lost.tensors > 7 && lost.rms > 0.0 && lost.rms <= 1.0 / 2048.0, "{lost:?}");
        assert!(lost.worst.1 >= lost.rms && lost.worst.1 <= 1.0 / 2048.0, "{lost:?}");
        let copy = open(&at(name));
        let mut largest = 0.0f32;
        for layer in 0..2 {
            for which in Projection::ALL {
                let [a, b] = [&source, &copy].map(|c| c.projection(layer, which).unwrap());
                assert!(a.codes == b.codes);
                assert_eq!(b.scale, half::f16::from_f32(a.scale).to_f32());
                largest = largest.max((b.scale - a.scale).abs());
            }
        }
        assert_eq!(largest, lost.max_error);
        // From there on nothing is lost any more: not on the way to the others, and not on the way back.
        let again = at(&format!("{back}-again.gguf"));
        for (from, to, target) in [
            (at(name), at(back), hf(Style::PackedAuto)),
            (at(back), at(&format!("{back}-i2_s.gguf")), I2_S),
            (at(&format!("{back}-i2_s.gguf")), again.clone(), gguf(ternary)),
        ] {
            assert!(converted(&from, &to, target).is_exact());
        }
        assert_same_weights(&copy, &open(&again));
    }
}

/// Types that stand for float activations under `llama` say in a key that these weights have int8 activations.
#[test]
fn int8_activations_survive_in_every_type() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    masters(&at("source"), &llama_shape());
    // From there on all scales are f16.
    converted(&at("source"), &at("first.gguf"), requantised(TernaryType::TQ2_0));
    let (source, expected) = (open(&at("first.gguf")), logits(&at("first.gguf")));
    for ternary in TernaryType::ALL {
        let summary = converted(&at("first.gguf"), &at("a.gguf"), gguf(ternary));
        assert!(summary.is_exact() && summary.architecture == "llama", "{summary:?}");
        assert_same_weights(&source, &open(&at("a.gguf")));
        assert!(logits(&at("a.gguf")) == expected, "{ternary:?}");
        let key = GgufFile::open(&at("a.gguf")).unwrap().value("llama.int8_activations").cloned();
        let by_group = matches!(ternary, TernaryType::Q2_0 | TernaryType::PQ2_0 | TernaryType::PTQ1_0);
        assert_eq!(key, by_group.then(|| Value::from(true)), "{ternary:?}");
        // Not as float values, which mean other activations.
        let error = refused(&at("a.gguf"), &at("x"), hf(Style::Values));
        assert!(error.contains("int8 activations by row") && error.contains("packed"), "{error}");
        converted(&at("a.gguf"), &at("b"), hf(Style::PackedAuto));
        assert_same_weights(&source, &open(&at("b")));
        std::fs::remove_file(at("a.gguf")).unwrap();
        std::fs::remove_dir_all(at("b")).unwrap();
    }
}

#[test]
fn the_inverse_style_keeps_scales_up_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    masters(&at("source"), &bitnet_shape());
    let summary = converted(&at("source"), &at("inverse"), hf(Style::PackedInverse));
    let (source, copy) = (open(&at("source")), open(&at("inverse")));
    let mut rounded = 0;
    for layer in 0..2 {
        for which in Projection::ALL {
            let [a, b] = [&source, &copy].map(|c| c.projection(layer, which).unwrap());
            assert_eq!((b.stored_as, &a.codes), ("U8 packed (bitlinear)", &b.codes));
            assert!((b.scale / a.scale - 1.0).abs() <= f32::EPSILON);
            rounded += usize::from(a.scale != b.scale);
        }
    }
    assert_eq!(summary.scales.map_or(0, |s| s.tensors), rounded);
}

#[test]
fn an_embedding_in_another_type_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let config = ModelConfig { tied_embeddings: false, ..bitnet_shape() };
    masters(&at("source"), &config);
    let source = open(&at("source"));
    let row_of = |checkpoint: &Checkpoint, n: usize| {
        let embedding = checkpoint.embedding().unwrap();
        let mut row = vec![0.0; embedding.k];
        embedding.format.decode_row(embedding.row(n).unwrap(), &mut row).unwrap();
        row
    };
    // Largest error: half a step of the largest value, 0.07 (a whole one for Q6_K and Q4_0, whose extreme
    // codes are not symmetric); steps are f16, off by 1 / 2048 of up to 127, and
    // those of Q6_K 8-bit multiples of one.
    for (dense, bound) in [
        (DenseFormat::F32, 0.0),
        (DenseFormat::F16, 0.07 / 2048.0),
        (DenseFormat::BF16, 0.07 / 256.0),
        (DenseFormat::Q8_0, 0.07 / 254.0 * 1.13),
        (DenseFormat::Q6_K, 0.07 / 25.0),
        (DenseFormat::Q4_0, 0.07 / 7.0),
    ] {
        let out = at(&format!("{}.gguf", dense.name()));
        let target = Target::Gguf(GgufTypes {
            ternary: TernaryType::I2_S,
            dense: Some(dense),
            ..GgufTypes::default()
        });
        let summary = converted(&at("source"), &out, target);
        let copy = open(&out);
        assert_eq!((copy.embedding().unwrap().format, summary.embedding), (dense, dense.name()));
        assert_eq!(copy.output().unwrap().unwrap().format, dense);
        if dense == DenseFormat::F32 {
            assert!(summary.converted.is_empty());
            continue;
        }
        let [embedding, head] = &summary.converted[..] else { panic!("{summary:?}") };
        assert_eq!((&*embedding.tensor, embedding.from, embedding.to), (EMBEDDING, "F32", dense.name()));
        assert_eq!(head.tensor, HEAD);
        let errors = (0..config.vocab_size).flat_map(|n| {
            let [a, b] = [&source, &copy].map(|c| row_of(c, n));
            a.into_iter().zip(b).map(|(a, b)| (a - b).abs()).collect::<Vec<_>>()
        });
        assert_eq!(errors.fold(0.0, f32::max), embedding.max_error);
        assert!(embedding.max_error > 0.0 && embedding.max_error <= bound, "{embedding:?}");
        assert!(!summary.is_exact());
        // What safetensors files have no type for becomes F32, exactly.
        let back = at(&format!("{}-hf", dense.name()));
        let summary = converted(&out, &back, hf(Style::PackedAuto));
        assert!(summary.is_exact(), "{summary:?}");
        assert_same_weights(&copy, &open(&back));
    }
    // A Hugging Face directory has one type for embedding and norms; the norms are rounded only if asked for.
    let target = |dense| Target::Hf { style: Style::PackedAuto, dense: Some(dense) };
    let summary = converted(&at("source"), &at("bf16"), target(DenseFormat::BF16));
    let norms = summary.converted.iter().find(|c| c.tensor == "norms").unwrap();
    assert!(norms.max_error > 0.0 && norms.max_error <= 0.07 / 256.0, "{norms:?}");
    assert!(open(&at("bf16")).tensors().iter().all(|t| ["BF16", "U8"].contains(&&*t.type_name)
        || t.name.ends_with("weight_scale") && t.type_name == "F32"));
    assert!(refused(&at("source"), &at("q6"), target(DenseFormat::Q6_K)).contains("F32, F16 or BF16"));
}

#[test]
fn the_golden_models_go_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let golden = |name: &str| Path::new(GOLDEN).join(name);
    for name in ["hf/A-packed-auto", "hf/A-packed-bitlinear"] {
        let short = name.trim_start_matches("hf/");
        let [file, back] = [at(&format!("{short}.gguf")), at(short)];
        assert!(converted(&golden(name), &file, I2_S).is_exact());
        let summary = converted(&file, &back, hf(Style::PackedAuto));
        assert!(summary.is_exact() && summary.notes.iter().any(|n| n.contains("no tokenizer")));
        assert_same_weights(&open(&golden(name)), &open(&back));
        assert_eq!(logits(&back), logits(&golden(name)));
    }
    // An independent writer's file, with a tokenizer, and back: the same tensors, byte for byte.
    let file = golden("gguf/tiny_a-i2_s.gguf");
    assert!(converted(&file, &at("tiny"), hf(Style::PackedAuto)).is_exact());
    let f16 = Target::Gguf(GgufTypes {
        ternary: TernaryType::I2_S,
        dense: Some(DenseFormat::F16),
        ..GgufTypes::default()
    });
    assert!(converted(&at("tiny"), &at("tiny.gguf"), f16).is_exact());
    let [a, b] = [&file, &at("tiny.gguf")].map(|path| GgufFile::open(path).unwrap());
    for tensor in a.tensors() {
        assert!(a.tensor_bytes(&tensor.name).unwrap() == b.tensor_bytes(&tensor.name).unwrap());
    }
}

/// What a GGUF file is asked for by programs of llama.cpp's family.
#[test]
fn metadata_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (config, architecture) in [(bitnet_shape(), "bitnet-b1.58"), (llama_shape(), "llama")] {
        let out = at(&format!("{architecture}.gguf"));
        masters(&at("stories"), &config);
        train_tokenizer(&at("stories"), 400);
        converted(&at("stories"), &out, I2_S);
        let file = GgufFile::open(&out).unwrap();
        let get = |key: &str| file.value(key).unwrap_or_else(|| panic!("{key} is missing"));
        for (key, expected) in [
            ("context_length", 512),
            ("embedding_length", 256),
            ("block_count", 2),
            ("feed_forward_length", 768),
            ("rope.dimension_count", 64),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
            ("vocab_size", 512),
        ] {
            assert_eq!(get(&format!("{architecture}.{key}")), &Value::U32(expected), "{key}");
        }
        assert_eq!(get(&format!("{architecture}.rope.freq_base")), &Value::F32(500_000.0));
        assert_eq!(get(&format!("{architecture}.attention.layer_norm_rms_epsilon")), &Value::F32(1e-5));
        for (key, expected) in [
            ("general.architecture", architecture),
            ("general.name", "synthetic tiny"),
            ("general.type", "model"),
            ("tokenizer.ggml.model", "gpt2"),
            ("tokenizer.ggml.pre", "gpt-2"),
        ] {
            assert_eq!(get(key).as_str(), Some(expected), "{key}");
        }
        assert_eq!(get("general.file_type"), &Value::U32(40));
        assert_eq!(get("general.quantization_version"), &Value::U32(2));
        assert_eq!(get("tokenizer.ggml.eos_token_id"), &Value::U32(0));
        for key in ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"] {
            assert_eq!(get(key), &Value::Bool(false), "{key}");
        }
        // As many tokens as rows, the missing ones filled up; the end of text is a control token.
        let types = get("tokenizer.ggml.token_type").as_array().unwrap().to_i64().unwrap();
        assert_eq!((types.len(), types[0], types[1], types[511]), (512, 3, 1, 5));
        let tokens: Vec<&str> = get("tokenizer.ggml.tokens").as_array().unwrap().strings().collect();
        assert_eq!((tokens[0], tokens[511]), (END, "[PAD511]"));
    }
}

/// Texts that a tokenizer cuts wrongly where anything of it was lost.
const TEXTS: [&str; 9] = [
    "Hello, world! It's 12345 o'clock; we'll see.",
    "  two spaces,\ttabs\r\n\r\nand lines   ",
    "Grüße, 世界! Привет 👩‍👩‍👧‍👦 cafe\u{301} नमस्ते \u{a0}\u{200b}",
    "<|endoftext|> in <|endoftext|><|endoftext|>the middle",
    "fn main() { println!(\"{}\", a[0]); } // 3.14e-10",
    "ĠĊ ▁▁ <0x0A> [PAD511]",
    "aaaaaaaaaaaa     bbbbbbbbbb",
    "",
    "I\u{307} \u{fffd} \u{10ffff}",
];

#[test]
fn a_trained_tokenizer_gives_the_same_ids_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    masters(&at("run"), &bitnet_shape());
    train_tokenizer(&at("run"), 500);
    converted(&at("run"), &at("a.gguf"), I2_S);
    converted(&at("a.gguf"), &at("b"), hf(Style::PackedAuto));
    converted(&at("b"), &at("c.gguf"), I2_S);
    converted(&at("run"), &at("d"), hf(Style::PackedAuto));
    let json = |name: &str| std::fs::read(at(name).join("tokenizer.json")).unwrap();
    assert_eq!(json("run"), json("d"), "copied byte for byte");
    let original = tokenizer(&at("run"));
    assert!(original.encode("bitnet", false).unwrap().len() < 6, "it has merges");
    for copy in ["a.gguf", "b", "c.gguf", "d"].map(|name| tokenizer(&at(name))) {
        for text in TEXTS {
            let ids = original.encode(text, true).unwrap();
            assert_eq!(copy.encode(text, true).unwrap(), ids, "{text:?}");
            assert_eq!(copy.decode(&ids, false).unwrap(), text);
        }
        assert_eq!((copy.eos(), copy.end_of_generation()), (Some(0), &[0][..]));
        assert_eq!(original.id(END), Some(0));
    }
}

/// Gives a directory the golden tokenizer in Llama 3's manner: BOS in front, a chat template.
fn llama3_tokenizer(dir: &Path) {
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(Path::new(GOLDEN).join("hf/tokenizer-A").join(name), dir.join(name)).unwrap();
    }
}

fn goldens(path: &str) -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/testdata").join(path);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn llama3_tokenizers_keep_their_golden_ids() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let config =
        ModelConfig { vocab_size: 320, bos_token: Some(312), eos_tokens: vec![313, 319], ..llama_shape() };
    masters(&at("source"), &config);
    llama3_tokenizer(&at("source"));
    converted(&at("source"), &at("a.gguf"), I2_S);
    converted(&at("a.gguf"), &at("b"), hf(Style::PackedAuto));
    let file = GgufFile::open(&at("a.gguf")).unwrap();
    assert_eq!(file.value("tokenizer.ggml.pre").unwrap().as_str(), Some("llama-bpe"));
    assert_eq!(file.value("tokenizer.ggml.add_bos_token"), Some(&Value::Bool(true)));
    assert_eq!(file.value("tokenizer.ggml.eot_token_id"), Some(&Value::U32(319)));
    let original = tokenizer(&at("source"));
    let goldens = goldens("golden/hf/tokenizer-A/tokenizer_goldens.json");
    for copy in ["a.gguf", "b"].map(|name| tokenizer(&at(name))) {
        for golden in goldens["encode"].as_array().unwrap() {
            let text = golden["text"].as_str().unwrap();
            assert_eq!(copy.encode(text, true).unwrap(), ids(&golden["ids"]), "{text:?}");
            assert_eq!(copy.encode(text, false).unwrap(), ids(&golden["ids_no_special"]), "{text:?}");
        }
        assert_eq!(copy.chat_template(), original.chat_template());
        assert_eq!(copy.end_of_generation(), original.end_of_generation());
        assert_eq!(copy.template_tokens(), original.template_tokens());
    }
}

#[test]
fn sentencepiece_goes_both_ways() {
    let goldens = goldens("tokenizer/spm_goldens.json");
    let tokens: Vec<String> = serde_json::from_value(goldens["tokens"].clone()).unwrap();
    let scores: Vec<f32> = serde_json::from_value(goldens["scores"].clone()).unwrap();
    let types: Vec<i32> = serde_json::from_value(goldens["types"].clone()).unwrap();
    let id = |key: &str| goldens[key].as_u64().unwrap() as u32;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let config = ModelConfig {
        vocab_size: tokens.len(),
        bos_token: Some(id("bos")),
        eos_tokens: vec![id("eos")],
        ..llama_shape()
    };
    masters(&at("source"), &config);
    let source = open(&at("source"));
    let mut writer = GgufWriter::new();
    write_checkpoint(&mut writer, source.config(), &source, GgufTypes::default()).unwrap();
    writer.set("tokenizer.ggml.model", "llama").unwrap();
    writer.set("tokenizer.ggml.tokens", Array::from_strings(tokens)).unwrap();
    writer.set("tokenizer.ggml.scores", Array::from_f32(scores)).unwrap();
    writer.set("tokenizer.ggml.token_type", Array::from_i32(types)).unwrap();
    writer.set("tokenizer.ggml.unknown_token_id", id("unk")).unwrap();
    writer.set("general.license", "MIT").unwrap();
    writer.write(&at("a.gguf")).unwrap();

    converted(&at("a.gguf"), &at("b"), hf(Style::PackedAuto));
    converted(&at("b"), &at("c.gguf"), I2_S);
    converted(&at("a.gguf"), &at("d.gguf"), I2_S);
    for copy in ["b", "c.gguf", "d.gguf"].map(|name| tokenizer(&at(name))) {
        for golden in goldens["encode"].as_array().unwrap() {
            let text = golden["text"].as_str().unwrap();
            assert_eq!(copy.encode(text, false).unwrap(), ids(&golden["ids"]), "{text:?}");
            let decoded = copy.decode(&ids(&golden["ids"]), true).unwrap();
            assert_eq!(decoded, golden["decoded"].as_str().unwrap());
        }
        let with_bos = copy.encode("a", true).unwrap();
        assert_eq!(with_bos[0], id("bos"));
    }
    // What nothing here reads goes from GGUF to GGUF all the same.
    let file = GgufFile::open(&at("d.gguf")).unwrap();
    assert_eq!(file.value("general.license").unwrap().as_str(), Some("MIT"));
}

#[test]
fn tokenizers_that_cannot_be_said_in_gguf_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    masters(&at("source"), &bitnet_shape());
    train_tokenizer(&at("source"), 400);
    let path = at("source").join("tokenizer.json");
    let good: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    type Change = fn(&mut serde_json::Value);
    let changes: [(Change, &[&str]); 6] = [
        (|t| t["normalizer"] = json!({"type": "Lowercase"}), &["normalizer", "Lowercase"]),
        (|t| t["pre_tokenizer"]["add_prefix_space"] = json!(true), &["pre-tokenizer", "--pre"]),
        (|t| t["added_tokens"][0]["lstrip"] = json!(true), &[END, "instead of"]),
        (|t| t["model"]["end_of_word_suffix"] = json!("</w>"), &["end_of_word_suffix"]),
        (|t| t["model"]["vocab"]["more"] = json!(600), &["600", "\"more\"", "512 tokens"]),
        (
            |t| {
                *t = json!({
                    "version": "1.0", "added_tokens": [],
                    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
                })
            },
            &["WordLevel"],
        ),
    ];
    for (change, parts) in changes {
        let mut tokenizer = good.clone();
        change(&mut tokenizer);
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let error = match try_export(&at("source"), &at("a.gguf"), &ExportOptions::new(I2_S)) {
            Err(error) => error.to_string(),
            Ok(summary) => panic!("{parts:?}: {summary:?}"),
        };
        for part in parts {
            assert!(error.contains(part), "{error:?} does not say {part:?}");
        }
        assert_eq!(entries(dir.path()), ["source"]);
    }
    // Without it the model is written all the same, and says that it has none.
    let options = ExportOptions { tokenizer: false, ..ExportOptions::new(I2_S) };
    try_export(&at("source"), &at("a.gguf"), &options).unwrap();
    let TokenizerSource::Gguf(keys) = open(&at("a.gguf")).tokenizer_source() else { panic!("GGUF") };
    assert_eq!((keys.is_empty(), keys.model.as_deref()), (true, Some("no_vocab")));

    // Expressions that GGUF has no name for, but that cut as one of its own: Qwen 2's without contractions in
    // capitals is not, Llama 3's written otherwise is.
    let mut tokenizer = good.clone();
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let split = |regex: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]})
    };
    tokenizer["pre_tokenizer"] =
        split(&llama3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:'s|'t|'re|'ve|'m|'d|'ll)"));
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let summary = converted(&at("source"), &at("b.gguf"), I2_S);
    assert!(summary.notes.iter().any(|n| n.contains("`dbrx`")), "{:?}", summary.notes);
    tokenizer["pre_tokenizer"] = split(r"\p{L}+|\P{L}");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    assert!(refused(&at("source"), &at("c.gguf"), I2_S).contains("none that GGUF has a name for"));
    let options = ExportOptions { pre: Some("qwen2".into()), ..ExportOptions::new(I2_S) };
    let error = try_export(&at("source"), &at("c.gguf"), &options).unwrap_err().to_string();
    assert!(error.contains("with the pre-tokenizer `qwen2`"), "{error}");

    // NFC is a note: GGUF has no key for it, and texts in that form are cut alike.
    let mut tokenizer = good;
    tokenizer["normalizer"] = json!({"type": "NFC"});
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let summary = converted(&at("source"), &at("nfc.gguf"), I2_S);
    assert!(summary.notes.iter().any(|n| n.contains("NFC")), "{:?}", summary.notes);
}

#[test]
fn what_a_format_cannot_hold_is_refused_with_what_can() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let says = |error: String, parts: &[&str]| {
        parts.iter().for_each(|part| assert!(error.contains(part), "{error:?} does not say {part:?}"));
    };
    let narrow =
        ModelConfig { hidden_size: 192, n_heads: 3, n_kv_heads: 1, intermediate_size: 320, ..bitnet_shape() };
    masters(&at("narrow"), &narrow);
    says(
        refused(&at("narrow"), &at("x"), I2_S),
        &["192", "multiple of 128", "Q2_0 needs 64", "Hugging Face"],
    );
    says(refused(&at("narrow"), &at("x"), gguf(TernaryType::TQ1_0)), &["TQ1_0", "Hugging Face"]);
    assert!(converted(&at("narrow"), &at("narrow-packed"), hf(Style::PackedAuto)).is_exact());
    assert_same_weights(&open(&at("narrow")), &open(&at("narrow-packed")));

    masters(&at("tiny"), &ModelConfig { intermediate_size: 640, ..bitnet_shape() });
    says(refused(&at("tiny"), &at("x"), gguf(TernaryType::TQ2_0)), &["640", "multiple of 256", "I2_S"]);
    converted(&at("tiny"), &at("tiny.gguf"), I2_S);
    says(refused(&at("tiny.gguf"), &at("x"), hf(Style::Online)), &["masters", "I2_S", "packed"]);

    let odd = ModelConfig { intermediate_size: 770, ..bitnet_shape() };
    masters(&at("odd"), &odd);
    // None of the two sends to the other, which would refuse it too.
    for target in [hf(Style::PackedAuto), I2_S] {
        says(refused(&at("odd"), &at("x"), target), &["770", "multiple of", "neither", "--style master"]);
    }
    assert!(converted(&at("odd"), &at("odd-master"), hf(Style::Online)).is_exact());
    let wide = ModelConfig { hidden_size: 128, n_heads: 2, n_kv_heads: 1, ..bitnet_shape() };
    masters(&at("wide"), &wide);
    let q6 = Target::Gguf(GgufTypes {
        ternary: TernaryType::I2_S,
        dense: Some(DenseFormat::Q6_K),
        ..GgufTypes::default()
    });
    says(refused(&at("wide"), &at("x"), q6), &["embedding", "Q6_K", "256", "Q8_0"]);
    assert!(!at("x").exists());
}

#[test]
fn a_failure_leaves_nothing_and_replaces_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // A code that stands for no weight, which is found when its tensor's turn comes.
    let golden = Path::new(GOLDEN).join("gguf/tiny_a-i2_s.gguf");
    let mut bytes = std::fs::read(&golden).unwrap();
    let length = bytes.len();
    let file = GgufFile::open(&golden).unwrap();
    let codes = file.tensor_bytes("blk.1.ffn_down.weight").unwrap();
    let place = bytes.windows(64).position(|window| window == &codes[..64]).unwrap();
    bytes[place] = 0xff;
    assert_eq!(bytes.len(), length);
    std::fs::write(at("bad.gguf"), bytes).unwrap();
    std::fs::write(at("precious.gguf"), "precious").unwrap();
    let before = entries(dir.path());
    let force = |target| ExportOptions { overwrite: true, ..ExportOptions::new(target) };
    for (out, target) in [
        ("precious.gguf", I2_S),
        ("precious.gguf", requantised(TernaryType::TQ2_0)),
        ("new.gguf", I2_S),
        ("new", hf(Style::PackedAuto)),
    ] {
        let error = try_export(&at("bad.gguf"), &at(out), &force(target)).unwrap_err().to_string();
        assert!(error.contains("blk.1.ffn_down.weight") && error.contains("code 3"), "{error}");
        assert_eq!(entries(dir.path()), before);
    }
    // Interrupted while writing, and while comparing.
    for target in [I2_S, hf(Style::PackedAuto)] {
        for phase in [0, 1] {
            let mut calls = 0;
            let result = export(&open(&golden), &at("new"), &force(target), &mut |progress| {
                let (now, done, total) = match progress {
                    Progress::Writing { done, total } => (0, done, total),
                    Progress::Comparing { done, total } => (1, done, total),
                };
                assert!(done <= total, "{progress:?}");
                calls += usize::from(now == phase);
                if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(matches!(result, Err(ExportError::Interrupted)), "{result:?}");
            assert_eq!(entries(dir.path()), before);
        }
    }
    assert_eq!(std::fs::read(at("precious.gguf")).unwrap(), b"precious");
    let nowhere = at("missing").join("x.gguf");
    assert!(matches!(try_export(&golden, &nowhere, &force(I2_S)), Err(ExportError::Io { .. })));
}

#[test]
fn only_models_are_replaced_and_only_if_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    masters(&at("source"), &bitnet_shape());
    let force = |target| ExportOptions { overwrite: true, ..ExportOptions::new(target) };
    converted(&at("source"), &at("a.gguf"), I2_S);
    converted(&at("source"), &at("b"), hf(Style::PackedAuto));
    let again = |out: &str, target| try_export(&at("source"), &at(out), &ExportOptions::new(target));
    assert!(matches!(again("a.gguf", I2_S), Err(ExportError::Exists { .. })));
    assert!(matches!(again("b", hf(Style::Online)), Err(ExportError::Exists { .. })));
    assert_eq!(open(&at("b")).master(0, Projection::Q).unwrap(), None, "still packed");

    try_export(&at("source"), &at("a.gguf"), &force(requantised(TernaryType::TQ2_0))).unwrap();
    assert_eq!(open(&at("a.gguf")).projection(0, Projection::Q).unwrap().stored_as, "TQ2_0");
    std::fs::write(at("b").join("model-00001-of-00002.safetensors"), "stale").unwrap();
    try_export(&at("source"), &at("b"), &force(hf(Style::Online))).unwrap();
    assert!(open(&at("b")).master(0, Projection::Q).unwrap().is_some());
    assert_eq!(entries(&at("b")), ["config.json", "generation_config.json", "model.safetensors"]);

    // An empty directory is free; one with other things in it is not a model's to replace.
    std::fs::create_dir(at("empty")).unwrap();
    again("empty", hf(Style::PackedAuto)).unwrap();
    std::fs::create_dir(at("home")).unwrap();
    std::fs::write(at("home").join("thesis.txt"), "precious").unwrap();
    let error =
        |out: &str, target| try_export(&at("source"), &at(out), &force(target)).unwrap_err().to_string();
    assert!(error("home", hf(Style::PackedAuto)).contains("thesis.txt"));
    assert!(error("home", I2_S).contains("is a directory"));
    assert!(error("a.gguf", hf(Style::PackedAuto)).contains("is a file"));
    // The source itself, by any name, is not replaced.
    assert!(error("source", hf(Style::PackedAuto)).contains("is the source"));
    let through = at("b").join("..").join("source");
    let through = try_export(&at("source"), &through, &force(hf(Style::Online))).unwrap_err();
    assert!(through.to_string().contains("is the source"));
    std::fs::create_dir(at("inside")).unwrap();
    std::fs::rename(at("a.gguf"), at("inside").join("a.gguf")).unwrap();
    let inside = try_export(&at("inside").join("a.gguf"), &at("inside"), &force(hf(Style::PackedAuto)));
    assert!(inside.unwrap_err().to_string().contains("has it inside"));
    assert_eq!(entries(dir.path()), ["b", "empty", "home", "inside", "source"]);
}

#[test]
fn a_run_stands_for_its_newest_finished_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let run = at("stories");
    std::fs::create_dir_all(run.join("checkpoints")).unwrap();
    assert!(matches!(newest_checkpoint(&run), Err(ExportError::NoCheckpoint { .. })));
    let config = ModelConfig { name: None, ..bitnet_shape() };
    for step in ["step-00000900", "step-00001000", ".step-00002000", "step-x"] {
        masters(&run.join("checkpoints").join(step), &config);
    }
    let newest = newest_checkpoint(&run).unwrap();
    assert_eq!(newest, run.join("checkpoints/step-00001000"));
    for itself in [newest, at("elsewhere")] {
        assert_eq!(newest_checkpoint(&itself).unwrap(), itself);
    }
    // The program, which names the model after the run.
    let report = json_of(dir.path(), &["export", "stories", "--to", "gguf", "--json"]);
    assert_eq!(report["path"], "stories-i2_s.gguf");
    let copy = open(&at("stories-i2_s.gguf"));
    assert_eq!(copy.config().name.as_deref(), Some("stories"));
    assert_same_weights(&copy, &open(&run.join("checkpoints/step-00001000")));
}

fn bitnet(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.env("BITNET_CACHE_DIR", "").env_remove("RUST_LOG").current_dir(dir).args(args);
    command.output().unwrap()
}

fn json_of(dir: &Path, args: &[&str]) -> serde_json::Value {
    let output = bitnet(dir, args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A directory with a checkpoint of training in it, and what the program says there.
fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    masters(&model, &bitnet_shape());
    train_tokenizer(&model, 400);
    (dir, model)
}

#[test]
fn the_program_says_what_it_wrote() {
    let (dir, _) = place();
    let text = |args: &[&str]| {
        let Output { status, stdout, stderr } = bitnet(dir.path(), args);
        let stderr = String::from_utf8(stderr).unwrap();
        assert!(status.success() && stdout.is_empty(), "{stderr}");
        stderr
    };
    let said = text(&["convert", "model", "--to", "gguf"]);
    assert!(said.starts_with("model-i2_s.gguf: ") && said.contains("architecture bitnet-b1.58"), "{said}");
    assert!(said.contains("as in the source") && !said.contains("rounded"), "{said}");
    assert!(
        said.contains("warning: under architecture `bitnet-b1.58`, bitnet.cpp since July 2026"),
        "{said}"
    );
    let to_tq1_0 =
        ["convert", "model-i2_s.gguf", "--to", "gguf", "--ternary", "tq1_0", "--embedding", "q8_0"];
    let said = text(&[&to_tq1_0[..], &["--requantise"]].concat());
    assert!(
        said.starts_with("model-i2_s-tq1_0.gguf: ") && said.contains("14 tensors requantised: rms"),
        "{said}"
    );
    assert!(said.contains("from F32 to Q8_0, rounded: by"), "{said}");
    let said = text(&["export", "model", "--to", "hf", "--style", "master", "--out", "m", "--name", "Mine"]);
    assert!(said.starts_with("m: ") && said.contains("F32 master (absmean)"), "{said}");
    assert_eq!(open(&dir.path().join("m")).config().name.as_deref(), Some("Mine"));

    let report =
        json_of(dir.path(), &["convert", "m", "--to", "hf", "--out", "p", "--embedding", "f16", "--json"]);
    assert_eq!(
        (&report["format"], &report["projections"]),
        (&"Hugging Face".into(), &"U8 packed (autobitlinear)".into())
    );
    assert!(report["scales"].is_null() && report["requantised"].is_null());
    assert!(report["converted"][0]["max_error"].as_f64().unwrap() > 0.0);
    let sizes = report["files"].as_array().unwrap().iter().map(|file| file[1].as_u64().unwrap());
    assert_eq!(sizes.sum::<u64>(), report["bytes"].as_u64().unwrap());
    assert_eq!(entries(dir.path()), ["m", "model", "model-i2_s-tq1_0.gguf", "model-i2_s.gguf", "p"]);
    // What was written runs, from text to text.
    for model in ["model-i2_s.gguf", "model-i2_s-tq1_0.gguf", "m", "p"] {
        let report =
            json_of(dir.path(), &["run", "-m", model, "-p", "Hello", "-n", "4", "--greedy", "--json"]);
        assert!(report["generated_tokens"].as_u64().unwrap() > 0);
    }
}

#[test]
fn the_program_helps_where_it_refuses() {
    let (dir, _) = place();
    let says = |args: &[&str], status: i32, parts: &[&str]| {
        let output = bitnet(dir.path(), args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{stderr}");
        parts.iter().for_each(|part| assert!(stderr.contains(part), "{stderr} does not say {part:?}"));
    };
    json_of(dir.path(), &["convert", "model", "--to", "hf", "--json"]);
    says(&["convert", "model", "--to", "hf"], 1, &["model-packed exists", "--force", "--out"]);
    says(
        &["convert", "model-packed", "--to", "hf", "--style", "master", "-o", "x"],
        1,
        &["masters", "--style packed"],
    );
    // A model with many scales has another style.
    json_of(dir.path(), &["synth", "--scales", "group:64", "--out", "groups.gguf", "--json"]);
    let master = ["convert", "groups.gguf", "--to", "hf", "--style", "master", "-o", "x"];
    says(&master, 1, &["masters", "Q2_0", "--style values"]);
    assert!(!String::from_utf8(bitnet(dir.path(), &master).stderr).unwrap().contains("packed"));
    json_of(dir.path(), &["convert", "groups.gguf", "--to", "hf", "--style", "values", "-o", "x", "--json"]);
    std::fs::remove_file(dir.path().join("groups.gguf")).unwrap();
    std::fs::remove_dir_all(dir.path().join("x")).unwrap();
    says(&["convert", "model", "--to", "gguf", "--style", "packed"], 2, &["--ternary"]);
    says(&["convert", "model", "--to", "hf", "--ternary", "i2_s"], 2, &["--style"]);
    says(&["convert", "model", "--to", "hf", "--architecture", "bitnet"], 2, &["--to gguf", "model_type"]);
    says(
        &["convert", "model", "--to", "gguf", "--architecture", "llama"],
        1,
        &["no sub-norms", "bitnet-b1.58"],
    );
    says(&["convert", "model"], 2, &["--to"]);
    says(&["convert", "nowhere", "--to", "gguf"], 1, &["nowhere", "config.json and safetensors"]);
    says(&["convert", "model", "--to", "hf", "--out", "model", "--force"], 1, &["is the source"]);
    std::fs::write(dir.path().join("model/tokenizer.json"), "{}").unwrap();
    says(&["convert", "model", "--to", "gguf"], 1, &["tokenizer.json", "--no-tokenizer"]);
    json_of(dir.path(), &["convert", "model", "--to", "gguf", "--no-tokenizer", "--json"]);
    assert_eq!(entries(dir.path()), ["model", "model-i2_s.gguf", "model-packed"]);
}
