//! Models that are not BitNet's: ternary by group, row or shard, other architectures. Against transformers and llama.cpp,
//! with the goldens of `golden/2026`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bitnet_burn::{BitBlock, BitLinear, BitNet, CacheType, Projection, Row};
use bitnet_burn_engine::load::{ActivationRule, LoadOptions};
use bitnet_burn_manager::ScaleKind;
use bitnet_burn_tests::*;
use burn::tensor::Device;

/// With float activations, against float activations: the goldens' README.
const TOLERANCE: f32 = 1e-4;

/// A model, its goldens, and whether it declares int8 activations.
struct Set {
    name: &'static str,
    int8: bool,
}

const fn float(name: &'static str) -> Set {
    Set { name, int8: false }
}

/// What is read.
const HF: [Set; 15] = [
    float("llama-attn-bias"),
    float("llama-rope-linear"),
    float("llama-rope-llama3"),
    float("llama-rope-yarn"),
    float("llama-row"),
    float("llama-tensor"),
    float("maple-small"),
    float("minicpm-longrope"),
    float("qwen2-qkv-bias"),
    float("qwen3-g128-tied"),
    float("qwen3-g64-untied"),
    float("qwen35-gdn"),
    float("qwen3moe-row"),
    float("trilm-shards"),
    Set { name: "falcon-e-like", int8: true },
];

/// GGUF files, and the Hugging Face directory whose goldens hold where the file's have none (64 tokens).
const GGUF: [(&str, Option<&str>); 26] = [
    ("falcon-e-like-q2_0", None),
    ("llama-attn-bias-pq2_0", Some("llama-attn-bias")),
    ("llama-attn-bias-q2_0", Some("llama-attn-bias")),
    ("llama-rope-linear-q2_0", Some("llama-rope-linear")),
    ("llama-rope-llama3-q2_0", Some("llama-rope-llama3")),
    ("llama-rope-yarn-q2_0", Some("llama-rope-yarn")),
    ("llama-row-tq1_0-q6_k", None),
    ("llama-row-tq2_0", None),
    ("llama-tensor-q2_0", None),
    ("maple-row-tq1_0-q8_0", None),
    ("maple-row-tq2_0", None),
    ("maple-small-ptq1_0", Some("maple-small")),
    ("maple-small-q2_0", Some("maple-small")),
    ("minicpm-longrope-q2_0", None),
    ("qwen2-qkv-bias-q2_0", None),
    ("qwen3-g128-pq2_0", Some("qwen3-g128-tied")),
    ("qwen3-g128-ptq1_0", Some("qwen3-g128-tied")),
    ("qwen3-g128-q2_0", Some("qwen3-g128-tied")),
    ("qwen3-g128-q2_0-q6_k", None),
    ("qwen3-g64-q2_0", Some("qwen3-g64-untied")),
    ("qwen3-g64-q2_0-f16-q8_0", None),
    ("qwen3-hadamard-pq2_0", None),
    ("qwen3-hadamard-ptq1_0", None),
    ("qwen35-gdn-q2_0", Some("qwen35-gdn")),
    ("qwen3moe-row-ptq1_0", Some("qwen3moe-row")),
    ("qwen3moe-row-q2_0", Some("qwen3moe-row")),
];

/// Files whose router chooses another expert for one of 16 rows with quantised activations, ours or llama.cpp's: that row
/// differs by everything, the others by a few percent.
const ROUTER_FLIPS: [&str; 2] = ["maple-row-tq2_0", "maple-row-tq1_0-q8_0"];

/// What is refused, and a word of the reason.
const REFUSED: [(&str, &str); 1] = [("gguf/legacy-type42.gguf", "128")];

fn golden() -> Option<PathBuf> {
    golden_dir("models of other architectures").map(|dir| dir.join("2026"))
}

/// int8 activations end to end: a rounding that flips moves logits by percents (the goldens' README).
const INT8_RMS: f64 = 0.1;

fn options(activations: ActivationRule) -> LoadOptions {
    LoadOptions { activations, ..LoadOptions::default() }
}

/// With activations as by default: where the model declares nothing, int8 by groups. Near the oracle, and the same bits in
/// chunks, beside others, and by every kernel.
fn quantised(path: &Path, name: &str, goldens: &HashMap<String, Golden>) {
    let model = load(path, &Device::flex(), &options(ActivationRule::Model));
    let groups = |(_, layer): (Projection, &BitLinear)| {
        layer.matrix().is_some_and(|matrix| matrix.scales != ScaleKind::One)
    };
    assert!(model.blocks.iter().flat_map(BitBlock::projections).all(groups), "{name}: other kernels");
    for n in [1, 16, 64] {
        let (golden, ids) =
            (&goldens[&format!("seq{n}.logits")], goldens[&format!("seq{n}.input_ids")].ids());
        let logits = all_logits(&model, &ids, 256, CacheType::F32);
        let rms = rms_but_flips(name, &logits, &golden.values, ids.len());
        println!("{name} seq{n}: {:.1} % from float activations", rms * 100.0);
        assert!(rms < INT8_RMS, "{name} seq{n}: {rms}");
        for chunk in [1, 5] {
            let chunked = all_logits(&model, &ids, chunk, CacheType::F32);
            assert!(chunked == logits, "{name} seq{n}: chunks of {chunk} rows give other bits");
        }
        beside_another(&model, name, &ids, &logits);
    }
}

/// The logits that a set's oracle has for `ids`, and ours, compared for the three prompts.
fn compare(model: &BitNet, name: &str, goldens: &HashMap<String, Golden>, int8: bool) {
    for n in [1, 16, 64] {
        let golden = goldens.get(&format!("seq{n}.logits")).unwrap_or_else(|| panic!("{name}: seq{n}"));
        let ids = goldens[&format!("seq{n}.input_ids")].ids();
        let logits = all_logits(model, &ids, 256, CacheType::F32);
        let difference = max_difference(&logits, &golden.values);
        println!("{name} seq{n}: {difference:.1e}");
        // int8 activations: beyond a rounding that flips, logits differ by a few percent.
        let tolerance = if int8 { 0.5 } else { TOLERANCE };
        assert!(difference < tolerance, "{name} seq{n}: {difference:e}");
        // Chunks change nothing, and neither does what else is in the batch.
        for chunk in [1, 5] {
            let chunked = all_logits(model, &ids, chunk, CacheType::F32);
            assert!(chunked == logits, "{name} seq{n}: chunks of {chunk} rows give other bits");
        }
        beside_another(model, name, &ids, &logits);
        // What training computes, without a cache.
        let whole = model.forward_sequences(&ids, n).unwrap().into_data().try_to_vec::<f32>().unwrap();
        let difference = max_difference(&whole, &golden.values);
        assert!(difference < tolerance, "{name} seq{n} without a cache: {difference:e}");
        // (falcon-e-like in GGUF has no generations.)
        if let Some(expected) = goldens.get(&format!("seq{n}.gen_ids")) {
            greedy(model, name, &ids, &expected.ids());
        }
    }
}

/// The same rows in a batch with another sequence: the same bits.
fn beside_another(model: &BitNet, name: &str, ids: &[u32], logits: &[f32]) {
    let mut cache = model.cache(2 * ids.len(), CacheType::F32).unwrap();
    let [other, sequence] = [cache.add_sequence(0), cache.add_sequence(0)];
    let mut rows: Vec<Row> =
        (0..3).map(|position| Row { token: 7, sequence: other, position }).take(ids.len()).collect();
    let before = rows.len();
    rows.extend((0..).zip(ids).map(|(position, &token)| Row { token, sequence, position }));
    let wanted: Vec<usize> = (before..rows.len()).collect();
    let batch = model.forward(&rows, &wanted, &mut cache).unwrap().into_data().try_to_vec::<f32>().unwrap();
    assert!(batch == logits, "{name}: other bits beside another sequence");
}

/// All margins of the goldens are wide.
fn greedy(model: &BitNet, name: &str, ids: &[u32], expected: &[u32]) {
    let mut all = ids.to_vec();
    all.extend(&expected[..expected.len() - 1]);
    let logits = all_logits(model, &all, 256, CacheType::F32);
    let vocabulary = logits.len() / all.len();
    let argmax = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
    let tokens: Vec<u32> = logits.chunks(vocabulary).skip(ids.len() - 1).map(argmax).collect();
    assert_eq!(tokens, expected, "{name}");
}

#[test]
fn hugging_face_directories_compute_what_transformers_computes() {
    let Some(golden) = golden() else { return };
    let device = Device::flex();
    setup();
    for Set { name, int8 } in HF {
        let dir = golden.join("hf").join(name);
        let rule = if int8 { ActivationRule::Model } else { ActivationRule::Float };
        let goldens = read_goldens(&dir.join("goldens.safetensors"));
        compare(&load(&dir, &device, &options(rule)), name, &goldens, int8);
        if !int8 {
            quantised(&dir, name, &goldens);
        }
    }
}

#[test]
fn gguf_files_compute_what_transformers_computes() {
    let Some(golden) = golden() else { return };
    setup();
    for (name, directory) in GGUF {
        let file = golden.join(format!("gguf/{name}.gguf"));
        let model = load(&file, &Device::flex(), &options(ActivationRule::Float));
        let mut goldens = read_goldens(&golden.join(format!("gguf/{name}.goldens.safetensors")));
        if let Some(directory) = directory {
            let more = read_goldens(&golden.join("hf").join(directory).join("goldens.safetensors"));
            more.into_iter().for_each(|(name, golden)| _ = goldens.entry(name).or_insert(golden));
        }
        compare(&model, name, &goldens, false);
        quantised(&file, name, &goldens);
        // llama.cpp quantises activations: a distance of a few percent.
        let ids = goldens["seq16.input_ids"].ids();
        if let Some(theirs) = goldens.get("seq16.llama_cpp") {
            let ours = all_logits(&model, &ids, 256, CacheType::F32);
            let rms = rms_but_flips(name, &ours, &theirs.values, ids.len());
            println!("{name} seq16: {:.1} % from llama.cpp", rms * 100.0);
            assert!(rms < 0.1, "{name}: {rms}");
        }
        for n in [16, 64] {
            let Some(theirs) = goldens.get(&format!("seq{n}.llama_cpp_f32")) else { continue };
            let ids = goldens[&format!("seq{n}.input_ids")].ids();
            let ours = all_logits(&model, &ids, 256, CacheType::F32);
            let difference = max_difference(&ours, &theirs.values);
            assert!(difference < 2e-4, "{name} seq{n}: {difference:e} from llama.cpp with float activations");
        }
    }
}

/// [`relative_rms`] of `rows` rows of logits, but for one in 16 where a router flips.
fn rms_but_flips(name: &str, a: &[f32], b: &[f32], rows: usize) -> f64 {
    let width = a.len() / rows;
    let far = |(a, b): &(&[f32], &[f32])| relative_rms(a, b) >= INT8_RMS;
    let (far, near): (Vec<_>, Vec<_>) = a.chunks(width).zip(b.chunks(width)).partition(far);
    if !ROUTER_FLIPS.contains(&name) || far.is_empty() {
        return relative_rms(a, b);
    }
    assert!(far.len() <= rows.div_ceil(16), "{name}: {} of {rows} rows are far", far.len());
    let (a, b): (Vec<_>, Vec<_>) = near.into_iter().unzip();
    relative_rms(&a.concat(), &b.concat())
}

fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let error: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    (error / b.iter().map(|&b| square(f64::from(b))).sum::<f64>()).sqrt()
}

#[test]
fn what_is_not_known_is_refused_by_its_name() {
    let Some(golden) = golden() else { return };
    for (name, word) in REFUSED {
        let opened = bitnet_burn_engine::checkpoint::Checkpoint::open(
            &golden.join(name),
            &bitnet_burn_engine::checkpoint::OpenOptions::default(),
        );
        let error = opened.unwrap_err().to_string();
        assert!(error.contains(word), "{name}: {error}");
    }
}
