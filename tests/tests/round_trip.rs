//! A golden model in every other format -> the same logits, bit for bit, so that what holds of the one (see
//! `golden_hf.rs`, `golden_gguf.rs`) holds of the other.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bitnet_burn::{CacheType, DecoderOptions, FloatPart, ModelConfig, Norm, Projection, RopeScaling};
use bitnet_burn_engine::checkpoint::{Checkpoint, OpenOptions, Rotated, Weights};
use bitnet_burn_engine::gguf::{GgufTypes, TernaryType};
use bitnet_burn_engine::hf::Style;
use bitnet_burn_engine::load::{ActivationRule, LoadOptions};
use bitnet_burn_formats::gguf::{GgufFile, TensorType};
use bitnet_burn_formats::{DenseFormat, DenseTensor};
use bitnet_burn_tests::*;
use bitnet_burn_train::export::{ExportError, ExportOptions, Summary, Target, export};
use burn::tensor::Device;

#[test]
fn a_golden_model_in_another_format_gives_the_same_logits_bit_for_bit() {
    let gguf = |ternary| Target::Gguf(GgufTypes { ternary, requantise: true, ..GgufTypes::default() });
    let hf = |style| Target::Hf { style, dense: None };
    let targets = [
        ("I2_S", gguf(TernaryType::I2_S)),
        ("TQ2_0", gguf(TernaryType::TQ2_0)),
        ("TQ1_0", gguf(TernaryType::TQ1_0)),
        ("packed", hf(Style::PackedAuto)),
        ("inverse", hf(Style::PackedInverse)),
        ("master", hf(Style::Online)),
    ];
    let temporary = tempfile::tempdir().unwrap();
    let mut compared = 0;
    for dir in hf_models() {
        let checkpoint = Checkpoint::open(&dir, &OpenOptions::default()).unwrap();
        let online = checkpoint.master(0, Projection::Q).unwrap().is_some();
        let goldens = read_goldens(&dir.join("goldens.safetensors"));
        for device in host_devices() {
            let model = load(&dir, &device, &LoadOptions::default());
            let prompts = [1, 16, 64].map(|n| goldens[&format!("seq{n}.input_ids")].ids());
            let expected = prompts.each_ref().map(|ids| all_logits(&model, ids, 256, CacheType::F32));
            for (name, target) in targets.iter().filter(|(name, _)| online || *name != "master") {
                let what = format!("{} as {name}", name_of(&dir));
                let path = temporary.path().join("model");
                let options = ExportOptions { overwrite: true, ..ExportOptions::new(*target) };
                let summary =
                    export(&checkpoint, &path, &options, &mut |_| ControlFlow::Continue(())).unwrap();
                match name {
                    // An f16 can't hold a scale of f32, and not every f32 is a reciprocal.
                    &"TQ2_0" | &"TQ1_0" | &"inverse" if !summary.is_exact() => {}
                    _ => {
                        assert!(summary.is_exact(), "{what}: {summary:?}");
                        let copy = load(&path, &device, &LoadOptions::default());
                        for (ids, expected) in prompts.iter().zip(&expected) {
                            let logits = all_logits(&copy, ids, 256, CacheType::F32);
                            assert_same_bits(expected, &logits, &what);
                        }
                        compared += 1;
                    }
                }
                if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }
                    .unwrap();
            }
        }
    }
    // The packed goldens of A have scales of bf16, which f16 holds.
    assert!(compared >= 8, "{compared}");
}

/// Files of `golden/2026` that are refused.
const REFUSED: [&str; 1] = ["legacy-type42.gguf"];

const BLOCKS: [TernaryType; 5] =
    [TernaryType::Q2_0, TernaryType::PQ2_0, TernaryType::PTQ1_0, TernaryType::TQ1_0, TernaryType::TQ2_0];

fn golden() -> Option<PathBuf> {
    golden_dir("models of other architectures").map(|dir| dir.join("2026"))
}

/// The models of `golden/2026` that are read.
fn models_of_2026(golden: &Path) -> Vec<PathBuf> {
    let list = |dir: &str| std::fs::read_dir(golden.join(dir)).unwrap().map(|entry| entry.unwrap().path());
    let model = |path: &PathBuf| path.is_dir() || path.extension().is_some_and(|e| e == "gguf");
    let read =
        |path: &PathBuf| model(path) && !path.file_name().is_some_and(|n| REFUSED.iter().any(|r| n == *r));
    let mut all: Vec<_> = list("hf").chain(list("gguf")).filter(read).collect();
    all.sort();
    all
}

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path, &OpenOptions::default()).unwrap_or_else(|error| panic!("{error}"))
}

fn written(source: &Checkpoint, out: &Path, target: Target) -> Result<Summary, ExportError> {
    let options = ExportOptions { overwrite: true, ..ExportOptions::new(target) };
    export(source, out, &options, &mut |_| ControlFlow::Continue(()))
}

fn in_blocks(ternary: TernaryType, requantise: bool) -> Target {
    Target::Gguf(GgufTypes { ternary, requantise, ..GgufTypes::default() })
}

fn projections(config: &ModelConfig) -> impl Iterator<Item = (usize, Projection)> {
    let of = |layer| Projection::of_layer(layer, config).into_iter().map(move |which| (layer, which));
    (0..config.n_layers).flat_map(of)
}

fn values(weights: &Weights) -> Vec<f32> {
    let (n, k) = weights.shape();
    let mut values = vec![0.0; n * k];
    values.chunks_mut(k).enumerate().for_each(|(row, values)| weights.decode_row(row, values).unwrap());
    values
}

/// Whether all blocks of a length in all projections have values -s, 0 and s with an s that is an f16.
fn fits(source: &Checkpoint, block: usize) -> bool {
    projections(source.config()).all(|(layer, which)| {
        let weights = source.weights(layer, which).unwrap();
        let (_, k) = weights.shape();
        k.is_multiple_of(block)
            && values(&weights).chunks(block).all(|block| {
                let s = block.iter().find(|v| **v != 0.0).map_or(0.0, |v| v.abs());
                half::f16::from_f32(s).to_f32() == s && block.iter().all(|v| [0.0, s].contains(&v.abs()))
            })
    })
}

/// Everything but the weights of projections.
fn assert_same_rest(source: &Checkpoint, copy: &Checkpoint, what: &str) {
    let config = source.config();
    // Llama 3's scaling is divisors in GGUF, and those a LongRoPE in Hugging Face's; the logits show that nothing changed.
    let options =
        DecoderOptions { rope_scaling: copy.config().options.rope_scaling.clone(), ..config.options.clone() };
    let scaled = [config, copy.config()].map(|config| config.options.rope_scaling.is_some());
    assert_eq!(scaled[0], scaled[1], "{what}");
    let expected = ModelConfig {
        architecture: copy.config().architecture.clone(),
        name: copy.config().name.clone(),
        // A GGUF file's are also the tokens whose texts say so.
        eos_tokens: copy.config().eos_tokens.clone(),
        options,
        ..config.clone()
    };
    assert_eq!(copy.config(), &expected, "{what}");
    assert!(copy.config().eos_tokens.starts_with(&config.eos_tokens), "{what}");
    let (ours, theirs) = (&config.architecture, &copy.config().architecture);
    assert_eq!(ours.replace('_', ""), theirs.replace('_', ""), "{what}");
    let layers = (0..config.n_layers).flat_map(|layer| Norm::of_layer(layer, config));
    for norm in layers.chain([Norm::Output]) {
        assert_eq!(source.norm(norm).unwrap(), copy.norm(norm).unwrap(), "{what}: {norm:?}");
    }
    for (layer, which) in projections(config) {
        if which.has_bias(config) {
            let [a, b] = [source, copy].map(|checkpoint| checkpoint.bias(layer, which).unwrap());
            assert_eq!(a, b, "{what}: bias of {which:?}");
        }
        let of = Rotated::Projection(layer, which);
        assert_eq!(source.rotation(of), copy.rotation(of), "{what}: {which:?}");
    }
    for layer in 0..config.n_layers {
        for which in FloatPart::of_layer(layer, config) {
            let [a, b] = [source, copy].map(|c| values(&Weights::Dense(c.float_part(layer, which).unwrap())));
            assert!(a == b, "{what}: layer {layer} {which:?}");
        }
    }
    for of in [Rotated::Embedding, Rotated::Output] {
        assert_eq!(source.rotation(of), copy.rotation(of), "{what}");
    }
    let dense = |tensor: DenseTensor| values(&Weights::Dense(tensor));
    assert!(dense(source.embedding().unwrap()) == dense(copy.embedding().unwrap()), "{what}: embedding");
    let [a, b] = [source, copy].map(|checkpoint| checkpoint.output().unwrap().map(dense));
    assert!(a == b, "{what}: head");
}

fn logits(path: &Path, ids: &[u32], activations: ActivationRule) -> Vec<f32> {
    let options = LoadOptions { activations, ..LoadOptions::default() };
    all_logits(&load(path, &Device::flex(), &options), ids, 256, CacheType::F32)
}

/// All that is read, in all formats: the same model, or an error where the format can't hold it.
#[test]
fn models_with_many_scales_keep_every_bit_in_every_format() {
    let Some(golden) = golden() else { return };
    let temporary = tempfile::tempdir().unwrap();
    let ids: Vec<u32> = (0..24).map(|i| (i * 53 + 7) % 317).collect();
    let (mut exact, mut refused) = (0, 0);
    for path in models_of_2026(&golden) {
        let source = open(&path);
        let config = source.config();
        let int8 = matches!(source.weights(0, Projection::first(config)).unwrap(), Weights::Ternary(_));
        let expected = logits(&path, &ids, ActivationRule::Model);
        // No writer changes the order of a DeltaNet's value heads, and none writes a directory with one.
        let delta = config.options.delta_net.as_ref();
        let ordered = delta.is_none_or(|delta| delta.tiled || delta.key_heads == delta.value_heads);
        let block = |ternary: TernaryType| TensorType::from(ternary).block_size() as usize;
        let mut cases: Vec<_> = BLOCKS
            .map(|ternary| {
                let possible = ordered && fits(&source, block(ternary));
                (in_blocks(ternary, false), possible, format!("{ternary:?}"))
            })
            .to_vec();
        let hf = |style| Target::Hf { style, dense: None };
        cases.push((in_blocks(TernaryType::I2_S, false), int8, "I2_S".into()));
        cases.push((hf(Style::Values), !int8 && !source.is_rotated() && delta.is_none(), "values".into()));
        cases.push((hf(Style::PackedAuto), int8, "packed".into()));
        for (target, possible, name) in cases {
            let what = format!("{} as {name}", name_of(&path));
            let out = temporary.path().join("model");
            match written(&source, &out, target) {
                Ok(summary) => {
                    assert!(possible && summary.is_exact(), "{what}: {summary:?}");
                    exact += 1;
                    let copy = open(&out);
                    assert_same_rest(&source, &copy, &what);
                    for (layer, which) in projections(config) {
                        let [a, b] = [&source, &copy].map(|c| c.weights(layer, which).unwrap());
                        assert!(values(&a) == values(&b), "{what}: layer {layer} {which:?}");
                        assert_eq!(
                            matches!(a, Weights::Ternary(_)),
                            matches!(b, Weights::Ternary(_)),
                            "{what}"
                        );
                    }
                    let llama3 = matches!(config.options.rope_scaling, Some(RopeScaling::Llama3 { .. }));
                    if llama3 && matches!(target, Target::Gguf(_)) {
                        // GGUF has divisors in f32.
                        let [a, b] = [&path, &out].map(|path| logits(path, &ids, ActivationRule::Float));
                        let difference = max_difference(&a, &b);
                        assert!(difference < 1e-4, "{what}: {difference}");
                    } else {
                        assert_same_bits(&expected, &logits(&out, &ids, ActivationRule::Model), &what);
                    }
                }
                Err(error) => {
                    assert!(!possible, "{what}: {error}");
                    refused += 1;
                    assert!(!out.exists(), "{what}");
                    let said = error.to_string();
                    let known = match error {
                        ExportError::Matrix { .. } => said.contains("tensor `") && said.contains("row "),
                        ExportError::Shape { .. } => said.contains("multiple of"),
                        ExportError::Activations { .. } => said.contains("activations"),
                        ExportError::Hf(_) => said.contains("Hadamard") || said.contains("DeltaNets"),
                        ExportError::Gguf(_) => said.contains("DeltaNets"),
                        _ => false,
                    };
                    assert!(known, "{what}: {said}");
                }
            }
            if out.is_dir() {
                std::fs::remove_dir_all(&out).unwrap();
            } else if out.exists() {
                std::fs::remove_file(&out).unwrap();
            }
        }
    }
    println!("{exact} exact copies, {refused} refused");
    assert!(exact >= 100 && refused >= 50, "{exact} {refused}");
}

/// What is written with `requantise` is as near as a scale for each block allows, and the summary has the difference.
#[test]
fn requantised_models_say_what_was_lost() {
    let Some(golden) = golden() else { return };
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("model.gguf");
    let mut seen = 0;
    for (name, ternary) in [
        ("hf/trilm-shards", TernaryType::PQ2_0),         // groups of 64
        ("hf/falcon-e-like", TernaryType::Q2_0),         // a scale that is no f16
        ("gguf/qwen3-g64-q2_0.gguf", TernaryType::Q2_0), // nothing is lost
        ("hf/minicpm-longrope", TernaryType::PTQ1_0),
    ] {
        let source = open(&golden.join(name));
        let summary = written(&source, &out, in_blocks(ternary, true)).unwrap();
        let copy = open(&out);
        let (mut squares, mut all, mut tensors, mut largest) = (0.0, 0.0, 0, 0f32);
        for (layer, which) in projections(source.config()) {
            let [a, b] = [&source, &copy].map(|c| values(&c.weights(layer, which).unwrap()));
            let errors: Vec<f32> = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).collect();
            let most = errors.iter().fold(0.0, |most: f32, &e| most.max(e));
            if most > 0.0 {
                tensors += 1;
                squares += errors.iter().map(|&e| f64::from(e).powi(2)).sum::<f64>();
                all += a.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
                largest = largest.max(most);
            }
        }
        let Some(lost) = &summary.requantised else {
            assert_eq!(tensors, 0, "{name}");
            continue;
        };
        seen += 1;
        println!("{name} as {ternary:?}: {lost:?}");
        assert_eq!((lost.tensors, lost.max_error), (tensors, largest), "{name}");
        assert!((lost.rms - (squares / all).sqrt()).abs() < 1e-9 && lost.rms < 0.5, "{name}: {lost:?}");
    }
    assert!(seen >= 2, "{seen}");
}

/// A golden directory with other values in its `config.json`.
fn changed(golden: &Path, name: &str, out: &Path, change: impl Fn(&mut serde_json::Value)) -> Checkpoint {
    let (from, out) = (golden.join("hf").join(name), out.join(name));
    std::fs::create_dir_all(&out).unwrap();
    for file in ["model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(file), out.join(file)).unwrap();
    }
    let mut config = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(out.join("config.json"), config.to_string()).unwrap();
    open(&out)
}

/// What no key of a GGUF file says is refused, and a Hugging Face directory says it. What has a key has it.
#[test]
fn nothing_is_dropped_in_silence() {
    type Change = fn(&mut serde_json::Value);
    let Some(golden) = golden() else { return };
    let temporary = tempfile::tempdir().unwrap();
    let (gguf, hf) = (temporary.path().join("model.gguf"), temporary.path().join("copy"));
    let refused: [(&str, &str, Change); 4] = [
        ("qwen3moe-row", "norm_topk_prob", |c| c["norm_topk_prob"] = false.into()),
        ("maple-small", "nope_on_global_attention", |c| c["nope_on_global_attention"] = false.into()),
        ("maple-small", "norm_topk_prob", |c| c["norm_topk_prob"] = false.into()),
        ("llama-rope-yarn", "truncate", |c| c["rope_parameters"]["truncate"] = false.into()),
    ];
    let kept: [(&str, Change); 5] = [
        ("llama-rope-yarn", |c| {
            c["rope_parameters"]["beta_fast"] = 16.0.into();
            c["rope_parameters"]["beta_slow"] = 2.0.into();
            c["rope_parameters"]["attention_factor"] = 1.25.into();
        }),
        ("minicpm-longrope", |c| {
            c["max_position_embeddings"] = 1024.into();
            c["rope_scaling"]["attention_factor"] = 1.5.into();
            c["scale_emb"] = 9.5.into();
        }),
        ("llama-rope-linear", |c| c["rope_scaling"]["factor"] = 1.25.into()),
        ("qwen3moe-row", |c| c["num_experts_per_tok"] = 3.into()),
        ("maple-small", |c| c["sliding_window"] = 5.into()),
    ];
    let q2_0 = in_blocks(TernaryType::Q2_0, false);
    let values = Target::Hf { style: Style::Values, dense: None };
    for (name, key, change) in refused {
        let source = changed(&golden, name, temporary.path(), change);
        let error = written(&source, &gguf, q2_0).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("Hugging Face"), "{name}: {error}");
        assert!(written(&source, &hf, values).unwrap().is_exact());
        assert_eq!(open(&hf).config().options, source.config().options, "{name}");
    }
    for (name, change) in kept {
        let source = changed(&golden, name, temporary.path(), change);
        assert_ne!(source.config().options, open(&golden.join("hf").join(name)).config().options, "{name}");
        for (out, target) in [(&gguf, q2_0), (&hf, values)] {
            let summary = written(&source, out, target).unwrap();
            assert!(summary.is_exact(), "{name}: {summary:?}");
            assert_eq!(open(out).config().options, source.config().options, "{name}");
        }
    }
    // A factor that is no f32 is rounded, and that is said.
    let source =
        changed(&golden, "llama-rope-linear", temporary.path(), |c| c["rope_scaling"]["factor"] = 1.1.into());
    let notes = written(&source, &gguf, q2_0).unwrap().notes;
    assert!(notes.iter().any(|note| note.contains("frequencies of RoPE")), "{notes:?}");
}

/// The blocks, norms, routers and RoPE divisors of files that llama.cpp's converter and an independent encoder wrote.
#[test]
fn files_have_the_bytes_that_other_writers_gave_them() {
    let Some(golden) = golden() else { return };
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("model.gguf");
    let mut compared = 0;
    for (hf, ternary, gguf) in [
        ("qwen3-g128-tied", TernaryType::PQ2_0, "qwen3-g128-pq2_0"),
        ("qwen3-g128-tied", TernaryType::PTQ1_0, "qwen3-g128-ptq1_0"),
        ("qwen3-g128-tied", TernaryType::Q2_0, "qwen3-g128-q2_0"),
        ("qwen3-g64-untied", TernaryType::Q2_0, "qwen3-g64-q2_0"),
        ("llama-attn-bias", TernaryType::PQ2_0, "llama-attn-bias-pq2_0"),
        ("llama-attn-bias", TernaryType::Q2_0, "llama-attn-bias-q2_0"),
        ("llama-rope-linear", TernaryType::Q2_0, "llama-rope-linear-q2_0"),
        ("llama-rope-llama3", TernaryType::Q2_0, "llama-rope-llama3-q2_0"),
        ("llama-rope-yarn", TernaryType::Q2_0, "llama-rope-yarn-q2_0"),
        ("llama-row", TernaryType::TQ2_0, "llama-row-tq2_0"),
        ("llama-row", TernaryType::TQ1_0, "llama-row-tq1_0-q6_k"),
        ("llama-tensor", TernaryType::Q2_0, "llama-tensor-q2_0"),
        ("maple-small", TernaryType::Q2_0, "maple-small-q2_0"),
        ("maple-small", TernaryType::PTQ1_0, "maple-small-ptq1_0"),
        ("minicpm-longrope", TernaryType::Q2_0, "minicpm-longrope-q2_0"),
        ("qwen2-qkv-bias", TernaryType::Q2_0, "qwen2-qkv-bias-q2_0"),
        ("qwen3moe-row", TernaryType::Q2_0, "qwen3moe-row-q2_0"),
        ("qwen3moe-row", TernaryType::PTQ1_0, "qwen3moe-row-ptq1_0"),
    ] {
        let target = in_blocks(ternary, false);
        written(&open(&golden.join("hf").join(hf)), &out, target).unwrap();
        let (ours, theirs) = (
            GgufFile::open(&out).unwrap(),
            GgufFile::open(&golden.join(format!("gguf/{gguf}.gguf"))).unwrap(),
        );
        assert_eq!(ours.value("general.architecture"), theirs.value("general.architecture"), "{gguf}");
        assert_eq!(ours.tensors().len(), theirs.tensors().len(), "{gguf}");
        for theirs_info in theirs.tensors() {
            let name = &theirs_info.name;
            let ours_info = ours.tensor(name).unwrap_or_else(|| panic!("{gguf}: {name} is missing"));
            assert_eq!(ours_info.shape(), theirs_info.shape(), "{gguf}: {name}");
            let (a, b) = (ours.tensor_bytes(name).unwrap(), theirs.tensor_bytes(name).unwrap());
            let block = TensorType::from(ternary);
            match (ours_info.tensor_type, theirs_info.tensor_type) {
                // The converter computes them in f32.
                _ if name == "rope_freqs.weight" => {
                    let floats = |bytes: &[u8]| {
                        let of = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
                        bytes.chunks(4).map(of).collect::<Vec<_>>()
                    };
                    let near = floats(&a).iter().zip(floats(&b)).all(|(a, b)| (a / b - 1.0).abs() < 1e-6);
                    assert!(near, "{gguf}: {:?} instead of {:?}", floats(&a), floats(&b));
                }
                (ours, theirs) if ours == theirs => assert!(a == b, "{gguf}: {name}"),
                // Floats in another type.
                (TensorType::Dense(ours), TensorType::Dense(DenseFormat::F32)) if ours.dtype().is_some() => {
                    let decode = |format: DenseFormat, bytes: &[u8]| {
                        let mut values = vec![0.0; bytes.len() / format.block_bytes()];
                        format.decode_row(bytes, &mut values).unwrap();
                        values
                    };
                    assert_eq!(decode(ours, &a), decode(DenseFormat::F32, &b), "{gguf}: {name}");
                }
                // An embedding that was given another type.
                (ours, theirs) => {
                    let dense =
                        theirs != block && (name.starts_with("token_embd") || name.starts_with("output."));
                    assert!(dense, "{gguf}: {name} is {ours} instead of {theirs}");
                    continue;
                }
            }
            compared += 1;
        }
    }
    assert!(compared > 200, "{compared}");
}
